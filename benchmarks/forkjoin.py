"""What forking and joining gains and costs in the rollout engine.

Time, one rollout at a time, of scripted trajectories with two to four threads, against the same
text in a sequential engine of one row, both in turns:

- `token_latency_speedup_*`: tokens over critical-path tokens; mean over trajectories.
- `wall_speedup_*`: seconds sequential over seconds in parallel, of medians; mean likewise.
- `realised_gain_*`: (wall speedup - 1) / (token-latency speedup - 1).

`*_100m` is bfloat16, the faster dtype there, and `*_100m_float32` and `*_tiny` are float32.

The rest counts, and is in `benchmarks.forkjoin_counts`.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.forkjoin_counts import counts
from benchmarks.scripted import Plot, scripted_request, scripted_trajectory
from benchmarks.shapes import SMALL, TINY
from tw_jax.models import Params, Qwen3Config, graphdef, init_params
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import Request
from tw_jax.rollout.rollout import Rollout
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.trajectory.schemas import make_schema

PLOTS = (
    Plot(blocks=((90, 100),), segment=30),
    Plot(blocks=((60, 80, 70),), segment=40),
    Plot(blocks=((100, 80, 90, 70),), segment=40),
    Plot(blocks=((50, 60, 40), (70, 60)), segment=30),
)
TURNS = 3


def engines(model: Qwen3Config, plots: tuple[Plot, ...], context_len: int) -> list[RolloutEngine]:
    """A sequential engine of one row, and one with a row for each thread."""
    schema = make_schema("threadweaver", load_tokenizer())
    rows = max(plot.threads for plot in plots)
    blocks = max(len(plot.blocks) for plot in plots)
    return [
        RolloutEngine(
            graphdef(model),
            schema,
            EngineConfig(
                context_len=context_len,
                rows=row_count,
                requests=1,
                max_threads=row_count,
                max_blocks=blocks,
                prefill_rows=1,
                prefill_chunk=64,
                steps_per_dispatch=context_len,
                scripts=True,
            ),
        )
        for row_count in (1, rows)
    ]


def time_in_turn(
    sides: Sequence[RolloutEngine], params: Params, requests: Sequence[Request], turns: int
) -> tuple[list[list[float]], list[Rollout]]:
    """Seconds of each side's request, turn by turn, and the last rollout of each."""
    seconds: list[list[float]] = [[] for _ in sides]
    rollouts: list[Rollout] = []
    for engine, request in zip(sides, requests, strict=True):  # compiles
        rollouts += engine.generate(params, [request])
    for turn in range(turns):
        # Who is first changes, so that neither always runs behind the other.
        order = range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides)))
        for side in order:
            start = time.perf_counter()
            (rollouts[side],) = sides[side].generate(params, [requests[side]])
            seconds[side].append(time.perf_counter() - start)
    return seconds, rollouts


def measure_gain(name: str, model: Qwen3Config) -> dict[str, Any]:
    """Speedups of one model shape; keys end in its name."""
    tokenizer = load_tokenizer()
    schema = make_schema("threadweaver", tokenizer)
    stories = [scripted_trajectory(plot, schema, tokenizer, i) for i, plot in enumerate(PLOTS)]
    sides = engines(model, PLOTS, max(len(story.tokens) for story in stories))
    params = init_params(model, 0)
    found = []
    for story in stories:
        requests = [
            scripted_request(story, parallel=parallel, max_threads=engine.config.max_threads)
            for engine, parallel in zip(sides, (False, True), strict=True)
        ]
        seconds, (_, rollout) = time_in_turn(sides, params, requests, TURNS)
        assert (rollout.trajectory.tokens == story.tokens).all(), "the engine follows the script"
        found.append(gain_of(seconds, rollout))
    return summarise(name, found)


def gain_of(seconds: Sequence[Sequence[float]], rollout: Rollout) -> dict[str, float]:
    """One trajectory's figures, from the seconds of both sides and the parallel rollout."""
    sequential_s, parallel_s = map(statistics.median, seconds)
    return {
        "tokens": rollout.total_tokens,
        "critical_path": rollout.critical_path,
        "steps": max(unit.end_step for unit in rollout.units) + 1,
        "sequential_s": sequential_s,
        "parallel_s": parallel_s,
    }


def summarise(name: str, found: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Speedups over trajectories."""
    latency = statistics.fmean(one["tokens"] / one["critical_path"] for one in found)
    wall = statistics.fmean(one["sequential_s"] / one["parallel_s"] for one in found)
    return {
        f"realised_gain_{name}": (wall - 1) / (latency - 1),
        f"wall_speedup_{name}": wall,
        f"token_latency_speedup_{name}": latency,
        f"trajectories_{name}": found,
    }


def run() -> dict[str, Any]:
    """Everything above, and `steps_per_critical_token`: engine steps over the critical path."""
    half = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    found = measure_gain("100m", half) | measure_gain("100m_float32", SMALL)
    found |= measure_gain("tiny", TINY)
    steps = [one["steps"] / one["critical_path"] for one in found["trajectories_100m"]]
    return found | {"steps_per_critical_token": max(steps)} | counts()
