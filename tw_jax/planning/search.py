"""Tries meshes, remat policies and rows per device, and ranks what fits.

What is tried first is what compiles to the least memory per token of work; the search stops after
`search_limit` programs. Candidates are ranked by the middle of their bracket, which is no
prediction but treats all of them alike.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_args

from rich import box
from rich.console import Console
from rich.table import Table

from tw_jax.errors import UserError
from tw_jax.models.config import Qwen3Config
from tw_jax.models.remat import Remat
from tw_jax.parallel.mesh import ParallelConfig
from tw_jax.planning.chips import Topology
from tw_jax.planning.compiling import Progress, facts_of
from tw_jax.planning.config import PlanConfig
from tw_jax.planning.programs import model_of
from tw_jax.planning.report import WIDTH
from tw_jax.planning.roofline import Estimate, estimate

_ROWS_PER_DEVICE = (1, 2)
_MAX_TENSOR = 8
# A scatter or gather over more devices than this spans three torus dimensions.
_MAX_FSDP = 32


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One configuration of a search.

    Attributes:
      config: what was planned.
      estimate: what came out; None where it is impossible.
      problem: why it is.
    """

    config: PlanConfig
    estimate: Estimate | None = None
    problem: str = ""

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return self.estimate is not None and self.estimate.fits

    @property
    def seconds_per_token(self) -> float:
        """Geometric middle of the bracket; infinite where it cannot run."""
        if self.estimate is None or not self.fits:
            return math.inf
        slow, fast = self.estimate.tokens_per_s
        return 1 / math.sqrt(slow * fast)

    def as_json(self) -> dict[str, Any]:
        """Its settings and its numbers."""
        p, e = self.config.parallel, self.estimate
        found = {
            "parallel": {k: v for k, v in dataclasses.asdict(p).items() if v},
            "remat": self.config.memory.remat,
            "rows": self.config.rows,
            "fits": self.fits,
            "problem": self.problem,
        }
        if e is not None:
            found |= {"hbm_gib": e.hbm_gib, "wire_gb": e.wire_gb, "mfu": list(e.mfu)}
            found |= {"tokens_per_s": list(e.tokens_per_s), "step_s": dataclasses.asdict(e.step)}
            found |= {"flops_agreement": e.flops_agreement}
        return found


def meshes(model: Qwen3Config, config: PlanConfig, devices: int) -> Iterator[ParallelConfig]:
    """Meshes that the model's sizes divide over, the plainest first."""
    for tensor in _powers_of_two(min(_MAX_TENSOR, devices)):
        for context in _powers_of_two(min(8, devices // tensor)):
            rest = devices // (tensor * context)
            if model.num_key_value_heads % tensor or model.num_attention_heads % tensor:
                continue
            if config.program == "decode" and (context > 1 or rest > 1):
                continue
            fsdp = max(f for f in _powers_of_two(min(_MAX_FSDP, rest)) if rest % f == 0)
            if tensor * context * rest == devices:
                yield ParallelConfig(
                    data=rest // fsdp, fsdp=fsdp, context=context, tensor=tensor, expert=1
                )


def candidates(config: PlanConfig, topology: Topology) -> list[PlanConfig]:
    """Configurations to try, at most `config.search_limit`.

    Raises:
      UserError: there is none.
    """
    found = []
    remats = [name for name in get_args(Remat) if name != "offload"]
    for parallel in meshes(model_of(config), config, topology.devices):
        holders = (parallel.data or 1) * (parallel.fsdp or 1)
        for per_device in _ROWS_PER_DEVICE:
            for remat in reversed(remats):
                found.append(
                    dataclasses.replace(
                        config,
                        parallel=parallel,
                        memory=dataclasses.replace(config.memory, remat=remat),
                        rows=holders * per_device,
                    )
                )
    if config.program == "decode":
        found = [dataclasses.replace(c, rows=None, memory=config.memory) for c in found]
        found = list(dict.fromkeys(found))
    if not found:
        raise UserError(
            f"search: no mesh of {topology.devices} devices divides the heads of {config.model}; "
            "choose another topology, or give the mesh yourself"
        )
    return found


def rank(configs: list[PlanConfig], topology: Topology, progress: Progress) -> list[Candidate]:
    """Plans the configurations, best first.

    What cannot fit is not compiled: more rows, or a policy that keeps more, than one on the same
    mesh that did not fit.
    """
    results: list[Candidate] = []
    limit = configs[0].search_limit
    too_big: dict[ParallelConfig, int] = {}
    # Round robin over the meshes, so that the limit does not cut off the later ones.
    groups: dict[ParallelConfig, list[PlanConfig]] = {}
    for config in configs:
        groups.setdefault(config.parallel, []).append(config)
    queue = [c for turn in range(len(configs)) for g in groups.values() for c in g[turn : turn + 1]]
    for config in queue:
        if len(results) >= limit:
            break
        if too_big.get(config.parallel, math.inf) <= (config.rows or 0):
            continue
        progress(f"{len(results) + 1}/{limit}: {describe(config)}")
        try:
            facts = facts_of(config, progress)
            result = Candidate(config, estimate(facts, topology, config.assume))
        except UserError as error:
            result = Candidate(config, problem=str(error))
        results.append(result)
        if not result.fits and config.memory.remat == "full":
            too_big[config.parallel] = min(
                too_big.get(config.parallel, config.rows or 0), config.rows or 0
            )
    return sorted(results, key=lambda c: c.seconds_per_token)


def describe(config: PlanConfig) -> str:
    """A candidate in words."""
    p = config.parallel
    axes = (
        *(("data", p.data), ("fsdp", p.fsdp), ("expert", p.expert)),
        *(("context", p.context), ("tensor", p.tensor)),
    )
    mesh = " x ".join(f"{name} {size}" for name, size in axes if size and size > 1) or "1 device"
    if config.program == "decode":
        return mesh
    return f"{mesh}, remat {config.memory.remat}, {config.rows} rows"


def show_ranking(
    console: Console, config: PlanConfig, topology: Topology, ranked: list[Candidate]
) -> None:
    """Prints the candidates, best first."""
    console.print(
        f"[bold]{config.program}[/bold] of {config.model} on {topology.name}: "
        f"{len(ranked)} candidates, best first by the middle of an uncalibrated bracket"
    )
    table = Table(box=box.SIMPLE_HEAD, width=WIDTH)
    table.add_column("mesh, remat, rows", ratio=1)
    for column in ("GiB", "GB sent", "tokens/s", "MFU"):
        table.add_column(column, justify="right")
    for candidate in ranked:
        found = candidate.estimate
        if found is None:
            table.add_row(describe(candidate.config), "impossible", "", "", "")
            continue
        slow, fast = found.tokens_per_s
        size = f"{found.hbm_gib:.1f}"
        rate = f"{slow:,.0f}..{fast:,.0f}" if found.fits else "does not fit"
        share = f"{found.mfu[0]:.0%}..{found.mfu[1]:.0%}" if found.fits else ""
        table.add_row(describe(candidate.config), size, f"{found.wire_gb:.1f}", rate, share)
    console.print(table)
    console.print(f"{topology.chip.hbm_gib} GiB per device.")


def _powers_of_two(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]
