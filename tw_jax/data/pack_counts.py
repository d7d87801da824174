"""What a packer counts, and what it says of a store: sums that a killed run goes on with."""

import collections

from tw_jax.data.over_long import Fitted, TooLong
from tw_jax.data.statistics import trajectory_statistics
from tw_jax.data.store_manifest import Manifest
from tw_jax.trajectory.metrics import acceleration_ratio, self_parallelism
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import Trajectory

OVER_LONG_COUNTS = ("cut", "split", "skipped", "dropped_blocks", "dropped_tokens")


def count_fitted(
    counts: collections.Counter[str], fitted: Fitted, row_len: int, too_long: TooLong
) -> None:
    """Counts what became of a trajectory that is longer than a row."""
    if fitted.trie_len <= row_len:
        return
    counts[too_long if fitted.pieces else "skipped"] += 1
    if fitted.pieces:
        counts["dropped_blocks"] += fitted.dropped_blocks
        counts["dropped_tokens"] += fitted.dropped_tokens


def count_piece(counts: collections.Counter[str], trajectory: Trajectory, schema: Schema) -> None:
    """Adds what a row will hold to the sums that `statistics_of` divides."""
    item = trajectory_statistics(trajectory, schema)
    counts["pieces_taken"] += 1
    counts["parallel_pieces"] += bool(item.block_tokens)
    counts["prompt_tokens"] += item.prompt_tokens
    counts["total_tokens"] += item.total_tokens
    counts["critical_path"] += item.critical_path
    counts["blocks"] += len(item.block_tokens)
    counts["block_tokens"] += sum(item.block_tokens)
    counts["threads"] += sum(map(len, item.thread_tokens))
    counts["thread_tokens"] += sum(map(sum, item.thread_tokens))


def statistics_of(counts: collections.Counter[str]) -> dict[str, float]:
    """Means (see `CorpusStatistics`) of what rows hold, cut or split where it was too long."""

    def mean(total: str, of: str) -> float:
        return counts[total] / counts[of] if counts[of] else 0.0

    total, critical = counts["total_tokens"], counts["critical_path"]
    return {
        "activation_ratio": mean("parallel_pieces", "pieces_taken"),
        "parallel_ratio": mean("block_tokens", "total_tokens"),
        "prompt_tokens": mean("prompt_tokens", "pieces_taken"),
        "total_tokens": mean("total_tokens", "pieces_taken"),
        "critical_path": mean("critical_path", "pieces_taken"),
        "self_parallelism": self_parallelism(total, critical),
        "acceleration_ratio": acceleration_ratio(total, critical),
        "blocks_per_trajectory": mean("blocks", "pieces_taken"),
        "threads_per_block": mean("threads", "blocks"),
        "tokens_per_block": mean("block_tokens", "blocks"),
        "tokens_per_thread": mean("thread_tokens", "threads"),
    }


def summary(manifest: Manifest) -> str:
    """A store in a few lines."""
    counts, statistics = manifest.counts, manifest.statistics
    over_long = ", ".join(
        f"{counts[name]:,} {name.replace('_', ' ')}" for name in OVER_LONG_COUNTS if counts[name]
    )
    rejects = ", ".join(f"{count:,} {kind}" for kind, count in sorted(manifest.rejects.items()))
    lines = [
        ("trajectories", f"{counts['trajectories']:,} of {counts['records']:,} records"),
        ("rejected", rejects or "none"),
        ("too long", over_long or "none"),
        ("rows", f"{manifest.rows:,} of {manifest.row_len:,} tokens"),
        ("tokens in tries", f"{counts['trie_tokens']:,}"),
        ("packing efficiency", f"{manifest.efficiency:.2%}"),
        ("tokens per piece", f"{statistics['total_tokens']:,.0f}"),
        ("parallel ratio", f"{statistics['parallel_ratio']:.2f}"),
        ("self-parallelism", f"{statistics['self_parallelism']:.2f}"),
    ]
    text = "\n".join(f"  {name:<22}{value}" for name, value in lines)
    if dropped := counts["dropped_blocks"]:
        text += (
            f"\n  {dropped:,} parallel blocks are not in the store, since they do not fit a row of "
            f"{manifest.row_len:,} tokens with their prompt: consider a larger row_len"
        )
    return text
