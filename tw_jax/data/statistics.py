"""How parallel a corpus is: the statistics of ThreadWeaver's Table 8 (arXiv 2512.07843).

Tokens are those after the prompt, each counted once (DESIGN section 11). A mean of tokens is taken
over trajectories, blocks or threads, as its name says; ratios of the corpus are ratios of sums, so
that long trajectories count for what they are, as in the paper's table.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tw_jax.trajectory.metrics import acceleration_ratio, self_parallelism, total_tokens
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class TrajectoryStatistics:
    """Counts of one trajectory.

    Attributes:
      prompt_tokens: before the response.
      total_tokens: of the response.
      critical_path: tokens on its longest chain of dependent tokens.
      block_tokens: of each parallel block, outlines and tags included.
      thread_tokens: per block, of each thread, strictly between its tags.
      format_valid: every block is strictly canonical; true where there is none.
    """

    prompt_tokens: int
    total_tokens: int
    critical_path: int
    block_tokens: tuple[int, ...]
    thread_tokens: tuple[tuple[int, ...], ...]
    format_valid: bool


def trajectory_statistics(trajectory: Trajectory, schema: Schema) -> TrajectoryStatistics:
    """Counts one trajectory."""
    return TrajectoryStatistics(
        prompt_tokens=trajectory.prompt_len,
        total_tokens=total_tokens(trajectory),
        critical_path=schema.critical_path(trajectory),
        block_tokens=tuple(block.end - block.start for block in trajectory.blocks),
        thread_tokens=tuple(
            tuple(max(0, thread.end - thread.start - 2) for thread in block.threads)
            for block in trajectory.blocks
        ),
        format_valid=not schema.validate(trajectory),
    )


@dataclasses.dataclass(frozen=True)
class CorpusStatistics:
    """Statistics of many trajectories; 0 where there is nothing to take a mean of.

    Attributes:
      trajectories: how many.
      activation_ratio: share of them with a parallel block.
      format_valid_rate: share of them whose every block is strictly canonical.
      parallel_ratio: share of the tokens that lie in parallel blocks.
      prompt_tokens: mean per trajectory.
      total_tokens: mean per trajectory.
      critical_path: mean per trajectory, tokens ("longest" in the paper's table).
      self_parallelism: total tokens over critical path.
      acceleration_ratio: `1 - critical path / total tokens`.
      blocks_per_trajectory: mean.
      threads_per_block: mean.
      tokens_per_block: mean.
      tokens_per_thread: mean.
    """

    trajectories: int
    activation_ratio: float
    format_valid_rate: float
    parallel_ratio: float
    prompt_tokens: float
    total_tokens: float
    critical_path: float
    self_parallelism: float
    acceleration_ratio: float
    blocks_per_trajectory: float
    threads_per_block: float
    tokens_per_block: float
    tokens_per_thread: float

    def to_json(self) -> dict[str, Any]:
        """The statistics as a JSON object."""
        return dataclasses.asdict(self)


def add_counts(sums: collections.Counter[str], item: TrajectoryStatistics) -> None:
    """Adds one trajectory to sums that `statistics_of_sums` divides."""
    sums["trajectories"] += 1
    sums["with_block"] += bool(item.block_tokens)
    sums["format_valid"] += item.format_valid
    sums["prompt_tokens"] += item.prompt_tokens
    sums["total_tokens"] += item.total_tokens
    sums["critical_path"] += item.critical_path
    sums["blocks"] += len(item.block_tokens)
    sums["block_tokens"] += sum(item.block_tokens)
    sums["threads"] += sum(map(len, item.thread_tokens))
    sums["thread_tokens"] += sum(map(sum, item.thread_tokens))


def statistics_of_sums(sums: Mapping[str, int]) -> CorpusStatistics:
    """Divides what `add_counts` has summed up."""

    def mean(total: str, of: str) -> float:
        return sums[total] / sums[of] if sums.get(of) else 0.0

    total, critical = sums.get("total_tokens", 0), sums.get("critical_path", 0)
    return CorpusStatistics(
        trajectories=sums.get("trajectories", 0),
        activation_ratio=mean("with_block", "trajectories"),
        format_valid_rate=mean("format_valid", "trajectories"),
        parallel_ratio=mean("block_tokens", "total_tokens"),
        prompt_tokens=mean("prompt_tokens", "trajectories"),
        total_tokens=mean("total_tokens", "trajectories"),
        critical_path=mean("critical_path", "trajectories"),
        self_parallelism=self_parallelism(total, critical),
        acceleration_ratio=acceleration_ratio(total, critical),
        blocks_per_trajectory=mean("blocks", "trajectories"),
        threads_per_block=mean("threads", "blocks"),
        tokens_per_block=mean("block_tokens", "blocks"),
        tokens_per_thread=mean("thread_tokens", "threads"),
    )


def corpus_statistics(items: Iterable[TrajectoryStatistics]) -> CorpusStatistics:
    """Statistics of trajectories."""
    sums: collections.Counter[str] = collections.Counter()
    for item in items:
        add_counts(sums, item)
    return statistics_of_sums(sums)


def distributions(items: Sequence[TrajectoryStatistics]) -> dict[str, list[float]]:
    """What histograms are drawn of: name with unit -> the values themselves."""
    parallel = [item for item in items if item.block_tokens]
    return {
        "total tokens": [item.total_tokens for item in items],
        "critical path, tokens": [item.critical_path for item in items],
        "acceleration ratio": [
            acceleration_ratio(item.total_tokens, item.critical_path) for item in parallel
        ],
        "blocks per trajectory": [len(item.block_tokens) for item in items],
        "threads per block": [len(block) for item in items for block in item.thread_tokens],
        "tokens per thread": [n for item in items for block in item.thread_tokens for n in block],
    }
