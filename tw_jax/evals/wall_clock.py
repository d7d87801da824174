"""Seconds per problem, one problem at a time: what parallel thinking gains on this machine."""

import dataclasses
import statistics
import time
from typing import Any

from tw_jax.evals.metrics import RolloutRecord, Speedup, Style, wall_clock_speedup
from tw_jax.evals.problems import record_rollout, style_request
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import SamplingParams, sampling_seed
from tw_jax.tasks.task import Split, Task
from tw_jax.train.run_dir import LoadedModel
from tw_jax.trajectory.schema import Schema


@dataclasses.dataclass(frozen=True)
class WallClock:
    """Seconds per problem, one problem at a time, on this machine.

    Attributes:
      sequential: one record per problem, its seconds the median over repeats.
      parallel: the same problems with the parallel style forced.
    """

    sequential: tuple[RolloutRecord, ...]
    parallel: tuple[RolloutRecord, ...]

    @property
    def speedup(self) -> Speedup:
        """Per-problem ratio of seconds, sequential / parallel."""
        return wall_clock_speedup(self.sequential, self.parallel)

    def to_json(self) -> dict[str, Any]:
        """The speedup, and per style the mean and median seconds and the tokens per second."""
        fields: dict[str, Any] = {"speedup": self.speedup.to_json()}
        for style, records in (("sequential", self.sequential), ("parallel", self.parallel)):
            seconds = [record.seconds or 0.0 for record in records]
            fields[style] = {
                "mean_seconds": statistics.fmean(seconds),
                "median_seconds": statistics.median(seconds),
                "tokens_per_second": sum(r.total_tokens for r in records) / sum(seconds),
            }
        return fields


def wall_clock_engines(
    model: LoadedModel, config: EngineConfig, sampling: SamplingParams
) -> tuple[RolloutEngine, RolloutEngine]:
    """The smallest engines that run one problem: a single row, and a row for each thread.

    A sequential baseline in a batch with idle rows would be slowed down for nothing.
    """
    one = dataclasses.replace(config, requests=1, rows=1, max_threads=1, prefill_rows=1)
    rows = max(2, sampling.max_threads)
    many = dataclasses.replace(
        config,
        requests=1,
        rows=rows,
        max_threads=sampling.max_threads,
        prefill_rows=min(config.prefill_rows, rows),
    )
    return (
        RolloutEngine(model.graphdef, model.schema, one),
        RolloutEngine(model.graphdef, model.schema, many),
    )


def measure_wall_clock(
    engines: tuple[RolloutEngine, RolloutEngine],
    params: Any,
    schema: Schema,
    tokenizer: Any,
    task: Task,
    *,
    split: Split,
    count: int,
    sampling: SamplingParams,
    seed: int,
    repeats: int = 3,
) -> WallClock:
    """Times sequential against parallel thinking, one problem at a time.

    Args:
      engines: for the sequential and the parallel style, see `wall_clock_engines`.
      params: the model's parameters.
      schema: the language of the rollouts.
      tokenizer: the model's.
      task: source of problems.
      split: which problems.
      count: problems.
      sampling: how rollouts are drawn.
      seed: of problems and sampling.
      repeats: runs of each problem, all of the same tokens; their median counts.
    """
    plain = dataclasses.replace(sampling, max_threads=1)
    plans: tuple[tuple[Style, RolloutEngine, SamplingParams], ...] = (
        ("sequential", engines[0], plain),
        ("parallel", engines[1], sampling),
    )
    timed: dict[str, tuple[RolloutRecord, ...]] = {}
    for style, engine, style_sampling in plans:
        records = []
        for index in range(count):
            problem = task.problem(split, index, seed)
            request = style_request(
                tokenizer, schema, task, problem, style, style_sampling,
                sampling_seed(seed, index, 0),
            )  # fmt: skip
            if index == 0:
                engine.generate(params, [request])  # compiles
            rollouts, seconds = [], []
            for _ in range(repeats):
                clock = time.perf_counter()
                rollouts = engine.generate(params, [request])
                seconds.append(time.perf_counter() - clock)
            records.append(
                record_rollout(
                    rollouts[0], problem, task, tokenizer, schema,
                    index=index, style=style, seconds=statistics.median(seconds),
                )
            )  # fmt: skip
        timed[style] = tuple(records)
    return WallClock(timed["sequential"], timed["parallel"])
