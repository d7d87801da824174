"""`tw-jax plan`: memory, work, traffic and a bracket of the step time, before anything runs."""

import json
import pathlib
import sys

from rich.console import Console

from tw_jax.planning.chips import parse_topology
from tw_jax.planning.compiling import facts_of
from tw_jax.planning.config import PlanConfig
from tw_jax.planning.report import WIDTH, as_json, show
from tw_jax.planning.roofline import estimate
from tw_jax.planning.search import Candidate, candidates, rank, show_ranking

DISAGREEMENT_STATUS = 1


def run_plan(config: PlanConfig) -> int:
    """Plans one configuration, or searches for one.

    Returns:
      0, or 1 where compiled and traced work disagree, so that scripts notice too.

    Raises:
      UserError: the plan is impossible, or its compiler is missing.
    """
    errors = Console(stderr=True, width=WIDTH, highlight=False)
    console = Console(width=WIDTH, highlight=False)

    def progress(line: str) -> None:
        errors.print(f"[dim]plan: {line}[/dim]")

    topology = parse_topology(config.topology)
    if config.search:
        ranked = rank(candidates(config, topology), topology, progress)
        show_ranking(console, config, topology, ranked)
        _write(config.json, {"search": [c.as_json() for c in ranked]})
        return 0 if all(c.estimate is None or c.estimate.agrees for c in ranked) else 1
    facts = facts_of(config, progress)
    found = estimate(facts, topology, config.assume)
    show(console, config, topology, facts, found)
    _write(config.json, as_json(config, topology, facts, found))
    return 0 if found.agrees else DISAGREEMENT_STATUS


def _write(target: str | None, values: dict) -> None:
    if target == "-":
        print(json.dumps(values), file=sys.stdout)
    elif target:
        pathlib.Path(target).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


__all__ = ["Candidate", "PlanConfig", "run_plan"]
