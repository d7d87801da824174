"""The files of a rewriting run: each appears whole or not at all, in the order of the input."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tw_jax.data.rejects import Rejects
from tw_jax.data.rewrite.ledger import StageCost
from tw_jax.data.rewrite.prompts import Prompt
from tw_jax.data.rewrite.report import summary
from tw_jax.data.rewrite.trace_rewrite import Outcome
from tw_jax.data.trajectory_file import write_trajectories
from tw_jax.data.whole_file import whole_file


@dataclasses.dataclass(frozen=True)
class OutputPaths:
    """Where the files of a run lie.

    Attributes:
      config: its settings.
      trajectories: the rewritten traces.
      provenance: how each good record of the input fared, and what was changed in it.
      rejects: what could not be rewritten, and why.
      summary: counts and costs.
      answers: every answer that was paid for.
    """

    config: pathlib.Path
    trajectories: pathlib.Path
    provenance: pathlib.Path
    rejects: pathlib.Path
    summary: pathlib.Path
    answers: pathlib.Path


def output_paths(folder: pathlib.Path, dry_run: bool) -> OutputPaths:
    """The files in a folder; a dry run has its own list of rejects, and writes no other."""
    return OutputPaths(
        config=folder / "config.yaml",
        trajectories=folder / "trajectories.jsonl",
        provenance=folder / "provenance.jsonl",
        rejects=folder / ("dry_run_rejects.jsonl" if dry_run else "rejects.jsonl"),
        summary=folder / "summary.json",
        answers=folder / "answers.sqlite",
    )


def own_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Everything that runs write into a folder."""
    both = (dataclasses.asdict(output_paths(folder, dry_run)) for dry_run in (False, True))
    return list(dict.fromkeys(path for paths in both for path in paths.values()))


def write_results(
    paths: OutputPaths,
    outcomes: Sequence[Outcome],
    rejects: Rejects,
    costs: Mapping[str, StageCost],
    *,
    model: str,
    prompts: Mapping[str, Prompt],
) -> None:
    """Writes everything that is known of the traces so far.

    Args:
      paths: where to.
      outcomes: of all good traces, in input order.
      rejects: the rejected records of the input; rejected traces are added.
      costs: by stage.
      model: what answered.
      prompts: the prompts in use.

    Raises:
      UserError: a file cannot be written.
    """
    records = (outcome.record for outcome in outcomes)
    write_trajectories(paths.trajectories, (record for record in records if record is not None))
    versions = {prompt.name: prompt.sha256 for prompt in prompts.values()}
    with whole_file(paths.provenance) as out:
        for outcome in outcomes:
            out.write(json.dumps(_provenance(outcome, model, versions)) + "\n")
    for outcome in outcomes:
        if outcome.status == "rejected":
            trace = outcome.trace
            rejects.add(trace.file, trace.line, outcome.kind, outcome.message)
    with whole_file(paths.summary) as out:
        out.write(json.dumps(summary(outcomes, rejects.counts, costs), indent=2) + "\n")


def _provenance(outcome: Outcome, model: str, prompts: Mapping[str, str]) -> dict[str, Any]:
    trace, progress = outcome.trace, outcome.progress
    return {
        "id": trace.id,
        "file": trace.file,
        "line": trace.line,
        "status": outcome.status,
        "kind": outcome.kind or None,
        "reasoning_sha256": hashlib.sha256(trace.reasoning.encode()).hexdigest(),
        "lines": len(trace.lines),
        "model": model,
        "prompts": prompts,
        "stages": [
            {"stage": stage, "blocks": progress.blocks.get(stage)} for stage in progress.passed
        ],
        "dropped": [dataclasses.asdict(drop) for drop in progress.drops],
        "blocks": outcome.blocks,
    }
