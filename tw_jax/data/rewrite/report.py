"""What a run has done, stage by stage: how many traces and blocks are left, at what cost."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from tw_jax.data.rewrite.config import ChatServerConfig
from tw_jax.data.rewrite.estimate import ASSUMPTIONS, StageEstimate
from tw_jax.data.rewrite.ledger import StageCost
from tw_jax.data.rewrite.prompts import Stage
from tw_jax.data.rewrite.trace_rewrite import Outcome

# In the order in which a trace passes them.
STAGES = ("steps", "groups", "extraction", "verify", "references", "outlines", "checks")


@dataclasses.dataclass(frozen=True)
class StageYield:
    """What a stage let through.

    Attributes:
      stage: its name.
      traces: how many traces passed it.
      blocks: how many blocks (of `groups`: groups) they had behind it; None before there are any.
      cost: of its calls, over all runs.
    """

    stage: str
    traces: int
    blocks: int | None
    cost: StageCost


def yields(outcomes: Sequence[Outcome], costs: Mapping[str, StageCost]) -> list[StageYield]:
    """The yield of every stage."""
    rows = []
    for stage in STAGES:
        passed = [outcome.progress for outcome in outcomes if stage in outcome.progress.passed]
        blocks = None if stage == "steps" else sum(p.blocks.get(stage, 0) for p in passed)
        rows.append(StageYield(stage, len(passed), blocks, costs.get(stage, StageCost())))
    return rows


def is_anything_done(rows: Iterable[StageYield]) -> bool:
    """Whether a trace passed a stage, or a call was paid for."""
    return any(row.traces or row.cost.calls for row in rows)


def drop_kinds(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many groups and blocks stay sequential, by kind."""
    kinds = collections.Counter(
        drop.kind for outcome in outcomes for drop in outcome.progress.drops
    )
    return dict(sorted(kinds.items()))


def yield_table(read: int, rejected_at_input: int, rows: Sequence[StageYield]) -> Table:
    """The yields for a terminal."""
    table = Table(title="yield per stage")
    for name in ("stage", "traces", "blocks", "calls", "tokens in", "tokens out", "USD"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    table.add_row("input", f"{read + rejected_at_input:,}", *[""] * 5)
    table.add_row("good input", f"{read:,}", *[""] * 5)
    for row in rows:
        cost = row.cost
        spent = ("", "", "", "")
        if cost.calls:
            spent = (
                f"{cost.calls:,}",
                f"{cost.prompt_tokens:,}",
                f"{cost.answer_tokens:,}",
                f"{cost.usd:.4f}",
            )
        blocks = "" if row.blocks is None else f"{row.blocks:,}"
        table.add_row(row.stage, f"{row.traces:,}", blocks, *spent)
    return table


def estimate_table(rest: Mapping[Stage, StageEstimate], server: ChatServerConfig) -> Table:
    """The estimate for a terminal."""
    table = Table(title="estimate of what is missing", caption=ASSUMPTIONS)
    for name in ("stage", "calls", "tokens in", "tokens out", "USD"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, row in rest.items():
        _add_estimate(table, stage, row, server)
    _add_estimate(table, "total", total_estimate(rest), server)
    return table


def total_estimate(rest: Mapping[Stage, StageEstimate]) -> StageEstimate:
    """All stages together."""
    return StageEstimate(
        *(
            sum(getattr(row, field.name) for row in rest.values())
            for field in dataclasses.fields(StageEstimate)
        )
    )


def summary(
    outcomes: Sequence[Outcome], rejects: Mapping[str, int], costs: Mapping[str, StageCost]
) -> dict[str, Any]:
    """The summary file of a run.

    Args:
      outcomes: of all good traces.
      rejects: rejected records and traces by kind.
      costs: by stage, over all runs.
    """
    statuses = collections.Counter(outcome.status for outcome in outcomes)
    unfinished = collections.Counter(o.kind for o in outcomes if o.status == "unfinished")
    return {
        "written": statuses["written"],
        "blocks": sum(len(outcome.blocks) for outcome in outcomes),
        "unfinished": dict(sorted(unfinished.items())),
        "rejected": dict(sorted(rejects.items())),
        "left_sequential": drop_kinds(outcomes),
        "stages": [dataclasses.asdict(row) for row in yields(outcomes, costs)],
    }


def _add_estimate(table: Table, name: str, row: StageEstimate, server: ChatServerConfig) -> None:
    usd = server.usd(round(row.prompt_tokens), round(row.answer_tokens))
    tokens = (f"{row.prompt_tokens:,.0f}", f"{row.answer_tokens:,.0f}")
    table.add_row(name, f"{row.calls:,.0f}", *tokens, f"{usd:.4f}")
