"""The plan as a table of 80 columns, and as one JSON object."""

import dataclasses
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tw_jax.planning.chips import GIB, Topology
from tw_jax.planning.config import PlanConfig
from tw_jax.planning.facts import ProgramFacts, StepFacts
from tw_jax.planning.roofline import AGREEMENT, Estimate

WIDTH = 80
_COLLECTIVES_SHOWN = 8


def show(
    console: Console, config: PlanConfig, topology: Topology, facts: StepFacts, found: Estimate
) -> None:
    """Prints the whole plan."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in facts.mesh.items() if size > 1) or "1"
    how = f"compiled with {facts.compiler}" if facts.compiler else "modelled, not compiled"
    console.print(
        f"[bold]{config.program}[/bold] of {config.model} ({_count(facts.parameters)} "
        f"parameters) on {topology.name}: {topology.devices} devices, mesh {mesh}; {how}"
    )
    console.print(_memory_table(facts, found))
    console.print(_verdict(found))
    console.print(_work_table(facts, found, topology))
    if any(p.collectives for p in facts.programs):
        console.print(_traffic_table(facts))
    console.print(_time_table(found))
    console.print(_assumptions(config, facts))
    for warning in warnings(facts, found, topology):
        console.print(f"[bold red]{warning}[/bold red]")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, width=WIDTH)
    table.add_column(columns[0], ratio=1)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _memory_table(facts: StepFacts, found: Estimate) -> Table:
    table = _table("Memory per device, GiB", "", *(p.name for p in facts.programs))
    names = dict.fromkeys(name for p in facts.programs for name in (*p.arguments, *p.resident))
    for name in names:
        table.add_row(
            name, *(_gib({**p.arguments, **p.resident}.get(name)) for p in facts.programs)
        )
    activations = "gradients, activations, temporaries"
    table.add_row(activations, *(_temporaries(p) for p in facts.programs))
    table.add_row("new results and code", *(_gib(p.results + p.code) for p in facts.programs))
    table.add_row("[bold]all of it[/bold]", *(_gib(p.total_bytes) for p in facts.programs))
    if found.optimistic_gib:
        peaks = (_gib(p.peak + sum(p.resident.values())) for p in facts.programs)
        table.add_row("compiler's peak (optimistic)", *peaks)
    if any(p.host for p in facts.programs):
        table.add_row("in host memory", *(_gib(p.host) for p in facts.programs))
    return table


def _temporaries(program: ProgramFacts) -> str:
    return "too many" if program.exceeded else _gib(program.temporaries)


def _verdict(found: Estimate) -> str:
    spare = found.hbm_limit_gib - found.hbm_gib
    share = f"{found.hbm_gib:.2f} of {found.hbm_limit_gib:.2f} GiB"
    if found.fits:
        return f"[bold green]Fits[/bold green]: {share} per device, {spare:.2f} GiB to spare."
    if 0 < found.optimistic_gib <= found.hbm_limit_gib:
        return (
            f"[bold yellow]May fit[/bold yellow]: it compiles, and its peak is "
            f"{found.optimistic_gib:.2f} GiB, but the sum of all parts is {share}."
        )
    return f"[bold red]Does not fit[/bold red]: {share} per device, {-spare:.2f} GiB too much."


def _work_table(facts: StepFacts, found: Estimate, topology: Topology) -> Table:
    table = _table("Work of a step", "", "all devices", "per device")
    traced = sum(p.runs * p.traced_flops for p in facts.programs)
    attention = sum(p.runs * p.attention_flops for p in facts.programs)
    n = topology.devices
    for name, work in (("FLOP", traced), ("of it in attention", attention)):
        table.add_row(name, f"{work:.4g}", f"{work / n:.4g}")
    if found.flops_agreement:
        compiled = sum(p.runs * p.compiled_flops for p in facts.programs)
        table.add_row("FLOP, as compiled", f"{compiled * n:.4g}", f"{compiled:.4g}")
        table.add_row("compiled / traced", f"{found.flops_agreement:.4f}", "")
    moved = sum(p.runs * p.memory_bytes for p in facts.programs)
    table.add_row("memory traffic, GB", f"{moved * n / 1e9:.4g}", f"{moved / 1e9:.4g}")
    return table


def _traffic_table(facts: StepFacts) -> Table:
    table = _table("Collectives, per device and step", "kind", "mesh axes", "times", "GB sent", "s")
    sums: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for p in facts.programs:
        rates = dict(p.bandwidths)
        for c in p.collectives:
            entry = sums.setdefault((c.kind, c.axes), [0.0, 0.0, 0.0])
            entry[0] += p.runs * c.count
            entry[1] += p.runs * c.wire_bytes
            entry[2] += p.runs * c.wire_bytes / rates[c.axes]
    rows = sorted(sums.items(), key=lambda item: -item[1][2])
    for (kind, axes), (times, wire, seconds) in rows[:_COLLECTIVES_SHOWN]:
        table.add_row(kind, " x ".join(axes), f"{times:.0f}", f"{wire / 1e9:.2f}", f"{seconds:.3f}")
    if rest := rows[_COLLECTIVES_SHOWN:]:
        totals = [sum(entry[i] for _, entry in rest) for i in range(3)]
        table.add_row(
            "others", "", f"{totals[0]:.0f}", f"{totals[1] / 1e9:.2f}", f"{totals[2]:.3f}"
        )
    return table


def _time_table(found: Estimate) -> Table:
    table = _table("Time of a step, seconds: a bracket, uncalibrated", "", "best", "worst")
    for name, part in (*found.parts.items(), ("[bold]step[/bold]", found.step)):
        table.add_row(name, _seconds(part.best), _seconds(part.worst))
    slow, fast = found.tokens_per_s
    table.add_row("tokens/s, all devices", f"{fast:,.0f}", f"{slow:,.0f}")
    table.add_row("MFU", f"{found.mfu[1]:.1%}", f"{found.mfu[0]:.1%}")
    return table


def _assumptions(config: PlanConfig, facts: StepFacts) -> str:
    a = config.assume
    lines = [
        "Assumed, not measured: "
        f"matrix products reach {_range(a.matmul_worst, a.matmul_best)} of peak, tiles of "
        f"attention {_range(a.attention_worst, a.attention_best)}, links "
        f"{_range(a.links_worst, a.links_best)}. Best: all overlap; worst: one after another.",
    ]
    if config.program != "decode":
        lines.append(
            f"Attention visits {config.visible:.0%} of a causal row's tiles (visible=); what it "
            "moves for them is taken to overlap with its products."
        )
        skew = max(p.attention_imbalance for p in facts.programs)
        if skew > 1:
            lines.append(
                f"Along the context axis the busiest device does {skew:.2f} times the mean of it: "
                "later queries see more keys."
            )
        moved = sum(p.runs * p.attention_bytes for p in facts.programs)
        if moved:
            loop = any(p.attention == "xla" for p in facts.programs)
            how = "As the XLA loop that was compiled" if loop else "The kernel"
            moves = "it moves" if loop else "fetches"
            lines.append(f"{how} {moves} {moved / 1e12:.2f} TB per device.")
    if not facts.compiler:
        lines.append("Temporaries, traffic and collectives are formulas: no compiler was asked.")
    return " ".join(lines)


def warnings(facts: StepFacts, found: Estimate, topology: Topology) -> list[str]:
    """What a reader must not miss."""
    said = []
    if not found.agrees:
        said.append(
            f"Compiled and traced work disagree: {found.flops_agreement:.4f} is outside "
            f"{AGREEMENT[0]}..{AGREEMENT[1]}. Devices repeat work, or the reader of compiled "
            "programs misread a loop: do not trust this plan."
        )
    wide = {
        c.axes
        for p in facts.programs
        for c in p.collectives
        if topology.chip.name == "v5p" and c.group_size >= 64 and c.kind == "all-reduce"
    }
    said += [
        f"Groups of 64 devices over {' x '.join(axes)} span three torus dimensions, where this "
        "compiler makes whole all-reduces of gathers and scatters: split fsdp with parallel.data."
        for axes in sorted(wide)
        if axes == ("fsdp",)
    ]
    return said


def as_json(
    config: PlanConfig, topology: Topology, facts: StepFacts, found: Estimate
) -> dict[str, Any]:
    """Every number of the plan."""
    return {
        "program": config.program,
        "topology": topology.name,
        "devices": topology.devices,
        "model": config.model,
        "mesh": dict(facts.mesh),
        "remat": config.memory.remat,
        "tokens_per_step": facts.tokens,
        "compiled": bool(facts.compiler),
        "fits": found.fits,
        "hbm_gib": found.hbm_gib,
        "hbm_limit_gib": found.hbm_limit_gib,
        "hbm_peak_gib": found.optimistic_gib,
        "flops": sum(p.runs * p.traced_flops for p in facts.programs),
        "flops_agreement": found.flops_agreement,
        "wire_gb": found.wire_gb,
        "step_s": dataclasses.asdict(found.step),
        "tokens_per_s": {"worst": found.tokens_per_s[0], "best": found.tokens_per_s[1]},
        "mfu": {"worst": found.mfu[0], "best": found.mfu[1]},
        "calibrated": False,
        "compile_cpu_s": found.compile_cpu_s,
        "warnings": warnings(facts, found, topology),
        "assumed": dataclasses.asdict(config.assume) | {"visible": config.visible},
        "programs": [dataclasses.asdict(p) for p in facts.programs],
        "jax": facts.jax,
        "compiler": facts.compiler,
    }


def _gib(size: int | None) -> str:
    if size is None:
        return ""
    gib = size / GIB
    return f"{gib:.2f}" if gib >= 0.1 or not size else f"{gib:.2g}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _range(worst: float, best: float) -> str:
    return f"{worst:.0%} to {best:.0%}"
