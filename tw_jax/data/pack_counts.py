"""What a packer counts, and what it says of a store: sums that a killed run goes on with."""

import collections

from tw_jax.data.over_long import Fitted, TooLong
from tw_jax.data.statistics import (
    CorpusStatistics,
    add_counts,
    statistics_of_sums,
    trajectory_statistics,
)
from tw_jax.data.store_manifest import Manifest
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import Trajectory

_SUM = "sum of "  # sums of statistics stand among the counts, which a journal keeps
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
    """Adds what a row will hold to the sums that `piece_statistics` divides."""
    sums: collections.Counter[str] = collections.Counter()
    add_counts(sums, trajectory_statistics(trajectory, schema))
    counts.update({f"{_SUM}{name}": value for name, value in sums.items()})


def piece_statistics(counts: collections.Counter[str]) -> CorpusStatistics:
    """Statistics of what rows hold, cut or split where it was too long."""
    names = (name for name in counts if name.startswith(_SUM))
    return statistics_of_sums({name.removeprefix(_SUM): counts[name] for name in names})


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
