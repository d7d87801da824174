"""How parallel a corpus is: the statistics of ThreadWeaver's Table 8 (arXiv 2512.07843).

Tokens are those after the prompt, each counted once (DESIGN section 11). A mean of tokens is taken
over trajectories, blocks or threads, as its name says; ratios of the corpus are ratios of sums, so
that long trajectories count for what they are, as in the paper's table.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

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


def corpus_statistics(items: Sequence[TrajectoryStatistics]) -> CorpusStatistics:
    """Sums up trajectories."""
    total = sum(item.total_tokens for item in items)
    critical = sum(item.critical_path for item in items)
    blocks = [tokens for item in items for tokens in item.block_tokens]
    threads = [len(block) for item in items for block in item.thread_tokens]
    thread_tokens = [n for item in items for block in item.thread_tokens for n in block]
    return CorpusStatistics(
        trajectories=len(items),
        activation_ratio=_mean([bool(item.block_tokens) for item in items]),
        format_valid_rate=_mean([item.format_valid for item in items]),
        parallel_ratio=sum(blocks) / total if total else 0.0,
        prompt_tokens=_mean([item.prompt_tokens for item in items]),
        total_tokens=_mean([item.total_tokens for item in items]),
        critical_path=_mean([item.critical_path for item in items]),
        self_parallelism=self_parallelism(total, critical),
        acceleration_ratio=acceleration_ratio(total, critical),
        blocks_per_trajectory=_mean([len(item.block_tokens) for item in items]),
        threads_per_block=_mean(threads),
        tokens_per_block=_mean(blocks),
        tokens_per_thread=_mean(thread_tokens),
    )


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


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else 0.0
