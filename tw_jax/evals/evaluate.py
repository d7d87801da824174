"""Measures a model on a task: accuracy, token latency and, where asked for, wall-clock time.

1. Every problem of a split is asked in each style, forced by the first tokens of the response or
   left free; the engine samples all rollouts of a style in one go.
2. Each rollout is graded and becomes a `RolloutRecord`.
3. The records are summarised; speedups compare the styles problem by problem.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.console
import rich.table

from tw_jax.config_checks import require_seed, require_share
from tw_jax.data.problem_file import ProblemColumns
from tw_jax.data.whole_file import whole_file
from tw_jax.evals.metrics import (
    Interval,
    RolloutRecord,
    Style,
    StyleSummary,
    summarize,
    token_latency_speedup,
)
from tw_jax.evals.problem_files import evaluate_sources
from tw_jax.evals.problems import record_rollout, style_request
from tw_jax.evals.wall_clock import measure_wall_clock, wall_clock_engines
from tw_jax.rewards.graders import GradingConfig
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import SamplingParams, sampling_seed
from tw_jax.rollout.rollout import Rollout
from tw_jax.tasks.registry import TaskConfig, make_task
from tw_jax.tasks.task import Split, Task
from tw_jax.train.run_dir import load_run
from tw_jax.trajectory.schema import Schema


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """One evaluation of a trained model.

    Attributes:
      checkpoint: folder of the run whose model is measured.
      step: checkpoint step; null takes the newest.
      task: source of problems where none are named; it grades its own answers.
      split: which problems of the task; training never shows those of "heldout".
      count: problems of the task.
      problems: sources of problems: .jsonl, .parquet, .array_record, a saved dataset, hf://NAME;
        all of them are asked. Empty takes problems of the task.
      columns: names of the problems' fields.
      as_chat: put prompts that are plain text through the model's chat template.
      max_reject_share: more bad problems than this share stop the run before it samples anything.
      grading: how answers to problems from sources are judged.
      samples_per_problem: rollouts of each problem in each style (the n of avg@n and maj@n).
      styles: "sequential" and "parallel" force a style, "free" lets the model choose. Only problems
        of a task can be forced to be parallel.
      sampling: how rollouts are drawn; temperature 0 is greedy.
      seed: of problems and sampling.
      engine: size of the rollout engine.
      wall_clock_problems: problems timed one at a time in both forced styles; 0 times none.
      wall_clock_repeats: runs of each timed problem; the median counts.
      output: JSON file for summaries and records; null writes none.
    """

    checkpoint: str = "runs/sft"
    step: int | None = None
    task: TaskConfig = TaskConfig()
    split: Split = "heldout"
    count: int = 128
    problems: tuple[str, ...] = ()
    columns: ProblemColumns = ProblemColumns()
    as_chat: bool = False
    max_reject_share: float = 0.1
    grading: GradingConfig = GradingConfig()
    samples_per_problem: int = 1
    styles: tuple[Style, ...] = ("sequential", "parallel", "free")
    sampling: SamplingParams = SamplingParams()
    seed: int = 0
    engine: EngineConfig = EngineConfig(context_len=1024)
    wall_clock_problems: int = 0
    wall_clock_repeats: int = 3
    output: str | None = None

    def __post_init__(self) -> None:
        require_seed(self)
        require_share(self, "max_reject_share")
        if self.problems and ("parallel" in self.styles or self.wall_clock_problems):
            raise ValueError(
                "problems: styles=parallel and wall_clock_problems force a style by a task's first "
                "characters; take styles=[sequential,free] and wall_clock_problems=0"
            )
        if not self.styles or len(set(self.styles)) != len(self.styles):
            raise ValueError(f"styles={list(self.styles)}: name at least one, none of them twice")
        for name, least in (
            ("count", 1),
            ("samples_per_problem", 1),
            ("wall_clock_problems", 0),
            ("wall_clock_repeats", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")


def evaluate(
    engine: RolloutEngine,
    params: Any,
    schema: Schema,
    tokenizer: Any,
    task: Task,
    *,
    split: Split,
    count: int,
    style: Style,
    sampling: SamplingParams,
    seed: int,
    samples_per_problem: int = 1,
) -> tuple[list[RolloutRecord], list[Rollout]]:
    """Asks the first `count` problems of a split in one style.

    Args:
      engine: bound to the model's graph and the schema.
      params: the model's parameters.
      schema: the language of the rollouts.
      tokenizer: the model's.
      task: source of problems and judge of answers.
      split: which problems.
      count: problems.
      style: "sequential" decodes plainly behind the task's sequential prefix, "parallel" forks
        behind its parallel prefix, "free" lets the model choose.
      sampling: how rollouts are drawn.
      seed: of problems and sampling; the same seed asks the same problems in every style.
      samples_per_problem: rollouts of each problem.

    Returns:
      Records and rollouts, problem by problem, samples of a problem next to each other.
    """
    problems = [task.problem(split, index, seed) for index in range(count)]
    requests = [
        style_request(
            tokenizer, schema, task, problem, style, sampling, sampling_seed(seed, index, sample)
        )
        for index, problem in enumerate(problems)
        for sample in range(samples_per_problem)
    ]
    rollouts = engine.generate(params, requests)
    records = [
        record_rollout(
            rollout,
            problems[i // samples_per_problem],
            task,
            tokenizer,
            schema,
            index=i // samples_per_problem,
            style=style,
        )
        for i, rollout in enumerate(rollouts)
    ]
    return records, rollouts


def run_eval(config: EvalConfig) -> dict[str, Any]:
    """Evaluates a run's model, prints a table and writes the results.

    Returns:
      What is written to `config.output`: {"checkpoint", "step", "summaries" by style,
      "token_latency_speedup" (of parallel, or else of free style; null unless sequential style was
      run too), "wall_clock" (null unless asked for), "records" by style, "ungraded" (answers to
      problems from sources that could not be graded, by kind)}.

    Raises:
      UserError: no such run, problems or a grader that cannot be used, or the output cannot be
        written.
    """
    model = load_run(config.checkpoint, config.step)
    task = make_task(config.task)
    engine = RolloutEngine(model.graphdef, model.schema, config.engine)
    ungraded: Mapping[str, int] = {}
    records: Mapping[Style, list[RolloutRecord]]
    if config.problems:
        records, ungraded = evaluate_sources(
            engine,
            model,
            config.problems,
            columns=config.columns,
            as_chat=config.as_chat,
            max_reject_share=config.max_reject_share,
            grading=config.grading,
            styles=config.styles,
            sampling=config.sampling,
            seed=config.seed,
            samples_per_problem=config.samples_per_problem,
        )
    else:
        records = {
            style: evaluate(
                engine,
                model.params,
                model.schema,
                model.tokenizer,
                task,
                split=config.split,
                count=config.count,
                style=style,
                sampling=config.sampling,
                seed=config.seed,
                samples_per_problem=config.samples_per_problem,
            )[0]
            for style in config.styles
        }
    summaries = {style: summarize(found) for style, found in records.items()}
    speedup, faster = None, "parallel" if "parallel" in records else "free"
    if "sequential" in records and faster in records:
        speedup = token_latency_speedup(records["sequential"], records[faster])
    wall_clock = None
    if config.wall_clock_problems:
        wall_clock = measure_wall_clock(
            wall_clock_engines(model, config.engine, config.sampling),
            model.params,
            model.schema,
            model.tokenizer,
            task,
            split=config.split,
            count=config.wall_clock_problems,
            sampling=config.sampling,
            seed=config.seed,
            repeats=config.wall_clock_repeats,
        )
    rich.console.Console().print(_summary_table(summaries, config.samples_per_problem))
    if speedup:
        print(f"token-latency speedup {speedup.mean:.2f}x, sequential / {faster} critical path")
    if wall_clock:
        print(f"wall-clock speedup {wall_clock.speedup.mean:.2f}x, one problem at a time")
    results = {
        "checkpoint": config.checkpoint,
        "step": model.step,
        "summaries": {style: summary.to_json() for style, summary in summaries.items()},
        "token_latency_speedup": speedup.to_json() if speedup else None,
        "wall_clock": wall_clock.to_json() if wall_clock else None,
        "records": {style: [r.to_json() for r in found] for style, found in records.items()},
        "ungraded": dict(ungraded),
    }
    if config.output is not None:
        write_json_lines(config.output, [results])
        print(config.output)
    return results


def write_json_lines(path: str | os.PathLike[str], values: Sequence[Any]) -> None:
    """Writes one line of JSON per value; a reader never sees half of the file.

    Raises:
      UserError: the file cannot be written.
    """
    with whole_file(path) as out:
        out.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _summary_table(summaries: Mapping[str, StyleSummary], samples: int) -> rich.table.Table:
    """A row per measure, a column per style: narrow enough for any terminal."""
    table = rich.table.Table(box=None, pad_edge=False)
    table.add_column("")
    for style in summaries:
        table.add_column(style, justify="right")
    for name, cell in _measures(samples):
        table.add_row(name, *(cell(summary) for summary in summaries.values()))
    return table


def _measures(samples: int) -> list[tuple[str, Callable[[StyleSummary], str]]]:
    """Name and text of each measure, for `samples` rollouts per problem."""
    accuracy: list[tuple[str, Callable[[StyleSummary], str]]] = [
        ("accuracy" if samples == 1 else f"accuracy, avg@{samples}", lambda s: f"{s.accuracy:.1%}"),
        ("95% interval", lambda s: _percent_range(s.accuracy_interval)),
    ]
    if samples > 1:
        k = 2 ** (samples.bit_length() - 1)  # the largest that summaries hold
        accuracy += [
            (f"majority vote, maj@{samples}", lambda s: f"{s.majority_accuracy:.1%}"),
            ("95% interval", lambda s: _percent_range(s.majority_accuracy_interval)),
            (f"any correct, pass@{k}", lambda s: f"{s.pass_at_k[k]:.1%}"),
        ]
    return [
        *accuracy,
        ("critical path, tokens", lambda s: f"{s.critical_path:.1f}"),
        ("total tokens", lambda s: f"{s.total_tokens:.1f}"),
        ("acceleration", lambda s: f"{s.acceleration_ratio:.3f}"),
        ("with a block", lambda s: f"{s.activation_ratio:.1%}"),
        ("format valid", lambda s: f"{s.format_valid_rate:.1%}"),
        ("rollouts", lambda s: str(s.n)),
    ]


def _percent_range(interval: Interval | None) -> str:
    return "{:.1%} - {:.1%}".format(*interval) if interval else ""
