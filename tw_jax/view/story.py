"""What a report says in numbers: headline tiles, the table before/after RL, facts of the run.

Everything is computed from `summary.json` (keys at `tw_jax.view.report.ReportData`); a missing
number gives a missing tile or row, never an error.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tw_jax.view.numbers import (
    ARROW,
    EN_DASH,
    MINUS,
    TIMES,
    Formatter,
    duration,
    interval_of,
    number,
    pair_of,
    percent,
    percent_range,
    points,
    signed,
    value_of,
)


@dataclasses.dataclass(frozen=True)
class Tile:
    """One headline number: what it is, its value, and what puts it in context."""

    name: str
    value: str
    context: str
    interval: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A value and its 95% interval ("" where there is none)."""

    value: str
    interval: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the before/after table; `note` is a small addition to the name."""

    name: str
    note: str
    before: Cell
    after: Cell
    change: str


def headline_tiles(summary: Mapping[str, Any]) -> list[Tile]:
    """The numbers that open the report, most important first."""
    tiles = [
        _latency_tile(summary),
        _accuracy_tile(summary),
        _critical_path_tile(summary),
        _rl_share_tile(summary, "accuracy", "Accuracy before and after RL"),
        _rl_share_tile(summary, "activation_ratio", "Parallel share before and after RL"),
        _wall_clock_tile(summary),
    ]
    return [tile for tile in tiles if tile]


def _latency_tile(summary: Mapping[str, Any]) -> Tile | None:
    speedup = value_of(summary, "sft.token_latency_speedup")
    if speedup is None:
        return None
    lengths = pair_of(summary, "sft.sequential.critical_path", "sft.parallel.critical_path")
    context = "critical path, sequential / parallel"
    if lengths:
        context = f"critical path {lengths[0]:,.0f} sequential, {lengths[1]:,.0f} parallel tokens"
    interval = interval_of(summary, "sft.token_latency_speedup_details.interval")
    bounds = f"{interval[0]:.2f}{EN_DASH}{interval[1]:.2f}{TIMES}" if interval else ""
    return Tile("Token-latency speedup", f"{speedup:.2f}{TIMES}", context, bounds)


def _accuracy_tile(summary: Mapping[str, Any]) -> Tile | None:
    parallel = value_of(summary, "sft.parallel.accuracy")
    if parallel is None:
        return None
    sequential = value_of(summary, "sft.sequential.accuracy")
    context = "after SFT, style forced"
    if sequential is not None:
        context += f"; {percent(sequential)} sequentially"
    bounds = percent_range(interval_of(summary, "sft.parallel.accuracy_interval"))
    return Tile("Accuracy, thinking in parallel", percent(parallel), context, bounds)


def _critical_path_tile(summary: Mapping[str, Any]) -> Tile | None:
    lengths = pair_of(summary, "rl.before.critical_path", "rl.after.critical_path")
    if not lengths or not lengths[0]:
        return None
    change = signed(100 * (lengths[1] / lengths[0] - 1), 0)
    context = f"{lengths[0]:,.0f} to {lengths[1]:,.0f} tokens, style free"
    return Tile("Critical path through RL", f"{change}%", context)


def _rl_share_tile(summary: Mapping[str, Any], key: str, name: str) -> Tile | None:
    shares = pair_of(summary, f"rl.before.{key}", f"rl.after.{key}")
    if not shares:
        return None
    bounds = percent_range(interval_of(summary, f"rl.after.{key}_interval"))
    change = f"{percent(shares[0])[:-1]}{ARROW}{percent(shares[1])}"
    return Tile(name, change, "style free; the interval is the one after RL", bounds)


def _wall_clock_tile(summary: Mapping[str, Any]) -> Tile | None:
    speedup = value_of(summary, "wall_clock_speedup")
    if speedup is None:
        return None
    context = "seconds, sequential / parallel; batch 1 on this machine"
    rates = pair_of(
        summary, "wall_clock.sequential.tokens_per_second", "wall_clock.parallel.tokens_per_second"
    )
    if rates:
        context += f", {rates[0]:,.0f} / {rates[1]:,.0f} tokens per second"
    return Tile("Wall-clock speedup", f"{speedup:.2f}{TIMES}", context)


def before_after_rows(rl: Mapping[str, Any]) -> list[Row]:
    """The policy before and after RL; rows whose numbers are missing are left out."""
    minus_ratio = f"1 {MINUS} critical path / total"
    rows = [
        _share_row(rl, "before", "after", "accuracy", "Accuracy", "style free"),
        _share_row(rl, "before", "after", "majority_accuracy", "Accuracy", "majority vote"),
        _share_row(rl, "before", "after", "activation_ratio", "Activation ratio", "has a block"),
        _length_row(rl, "critical_path", "Critical path"),
        _length_row(rl, "total_tokens", "Total tokens"),
        _ratio_row(rl, "acceleration_ratio", "Acceleration ratio", minus_ratio),
        _share_row(rl, "before", "after", "format_valid_rate", "Format valid", "strict parse"),
        _share_row(rl, "before_parallel", "after_parallel", "accuracy", "Accuracy",
                   "forced parallel"),
        _share_row(rl, "before_sequential", "after_sequential", "accuracy", "Accuracy",
                   "forced sequential"),
    ]  # fmt: skip
    return [row for row in rows if row]


def _share_row(
    rl: Mapping[str, Any], before: str, after: str, key: str, name: str, note: str
) -> Row | None:
    shares = pair_of(rl, f"{before}.{key}", f"{after}.{key}")
    if not shares:
        return None
    first, second = (
        Cell(f"{100 * share:.1f}%", percent_range(interval_of(rl, f"{side}.{key}_interval")))
        for side, share in zip((before, after), shares, strict=True)
    )
    return Row(name, note, first, second, points(shares[1] - shares[0]))


def _length_row(rl: Mapping[str, Any], key: str, name: str) -> Row | None:
    lengths = pair_of(rl, f"before.{key}", f"after.{key}")
    if not lengths:
        return None
    cells = []
    for side, length in zip(("before", "after"), lengths, strict=True):
        bounds = interval_of(rl, f"{side}.{key}_interval")
        shown = f"{bounds[0]:,.0f}{EN_DASH}{bounds[1]:,.0f}" if bounds else ""
        cells.append(Cell(f"{length:,.1f}", shown))
    change = f"{signed(100 * (lengths[1] / lengths[0] - 1), 1)}%" if lengths[0] else ""
    return Row(name, "tokens", cells[0], cells[1], change)


def _ratio_row(rl: Mapping[str, Any], key: str, name: str, note: str) -> Row | None:
    ratios = pair_of(rl, f"before.{key}", f"after.{key}")
    if not ratios:
        return None
    first, second = (Cell(f"{ratio:.3f}") for ratio in ratios)
    return Row(name, note, first, second, signed(ratios[1] - ratios[0], 3))


def run_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Small facts of the run: (name, value)."""
    formats: tuple[tuple[str, str, Formatter], ...] = (
        ("rollouts per style", "sft.parallel.n", number),
        ("run time", "minutes", duration),
        ("seed", "seed", lambda value: f"{value:.0f}"),
        (
            "largest log-probability gap, sampler to trainer",
            "logprob_max_abs_diff",
            lambda value: f"{value:.1e}".replace("-", MINUS),
        ),
    )
    found = [(name, value_of(summary, path), write) for name, path, write in formats]
    return [(name, write(value)) for name, value, write in found if value is not None]
