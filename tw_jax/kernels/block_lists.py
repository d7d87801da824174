"""The tiles of a plan as one list per block, for kernels whose programs own a block each."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from tw_jax.kernels.tile_plan import TilePlan

Bounds = tuple[tuple[Int32[Array, "rows len"], Int32[Array, "rows len"]], ...]


class BlockLists(NamedTuple):
    """For each outer block (of queries or keys) the inner blocks that it shares a live tile with.

    Attributes:
      inner: numbers within the row, tiles without any hidden pair first; what follows the live
        ones is meaningless.
      counts: how many of them are full (every pair visible), and how many are live.
    """

    inner: Int32[Array, "rows outer inner"]
    counts: Int32[Array, "rows outer 2"]

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.inner.shape[0]

    @property
    def outer(self) -> int:
        """Outer blocks per row."""
        return self.inner.shape[1]


def lists_by_query(
    live: Bool[Array, "rows q_blocks k_blocks"], full: Bool[Array, "rows q_blocks k_blocks"]
) -> BlockLists:
    """Lists the key blocks of each query block; for the lists by key, swap the last two axes."""
    full = full & live
    inner = live.shape[-1]
    index = jnp.arange(inner, dtype=jnp.int32)
    # One integer tells both kind and number, so that sorting needs no second array.
    ordered = jnp.sort(jnp.where(full, 0, jnp.where(live, inner, 2 * inner)) + index, axis=-1)
    counts = jnp.stack([full.sum(-1, dtype=jnp.int32), live.sum(-1, dtype=jnp.int32)], -1)
    return BlockLists(jnp.remainder(ordered, inner), counts)


def live_tiles(
    plan: TilePlan, q_tile: int, k_tile: int, blocks: tuple[int, int]
) -> Bool[Array, "rows q_blocks k_blocks"]:
    """Which tiles of another size, `blocks` of them per row, hold a live tile of the plan.

    Exact where the new edges are multiples of the plan's; a smaller tile counts as live with the
    plan's tile that it is a part of.
    """
    q_blocks, k_blocks = plan.q_len // plan.q_tile, plan.padded_len // plan.k_tile
    listed = jnp.arange(plan.q_block.size) < plan.count
    nowhere = plan.rows * q_blocks
    live = jnp.zeros((nowhere, k_blocks), bool)
    live = live.at[jnp.where(listed, plan.q_block, nowhere), plan.k_block % k_blocks].set(
        True, mode="drop"
    )
    live = live.reshape(plan.rows, q_blocks, k_blocks)
    live = _regrid(live, plan.q_tile, q_tile, blocks[0])
    return _regrid(live.swapaxes(1, 2), plan.k_tile, k_tile, blocks[1]).swapaxes(1, 2)


def _regrid(
    live: Bool[Array, "rows old other"], old_tile: int, new_tile: int, blocks: int
) -> Bool[Array, "rows blocks other"]:
    rows, _, other = live.shape
    unit = math.gcd(old_tile, new_tile)
    live = jnp.repeat(live, old_tile // unit, axis=1)[:, : blocks * new_tile // unit]
    live = jnp.pad(live, ((0, 0), (0, blocks * new_tile // unit - live.shape[1]), (0, 0)))
    return live.reshape(rows, blocks, new_tile // unit, other).any(2)


def full_tiles(
    end: Int32[Array, "rows len"],
    bounds: Bounds,
    q_start: Int32[Array, ""],
    q_len: int,
    q_tile: int,
    k_tile: int,
    q_blocks: int,
) -> Bool[Array, "rows q_blocks k_blocks"]:
    """Which tiles need no mask, every key being visible to every query.

    Args:
      end: exclusive end of each key's visibility, 0 for padding; whole key tiles.
      bounds: intervals of hidden queries, `(start, stop)` each.
      q_start: index in the row of the first query.
      q_len: queries that are not padding.
      q_tile: queries per tile.
      k_tile: keys per tile.
      q_blocks: query blocks per row.
    """
    rows, row_len = end.shape
    local = jnp.arange(q_blocks, dtype=jnp.int32)[None, :, None] * q_tile
    first, stop = q_start + local, q_start + local + q_tile
    k_blocks = row_len // k_tile
    last_key = (jnp.arange(k_blocks, dtype=jnp.int32) + 1) * k_tile - 1
    first_end = end.reshape(rows, 1, k_blocks, k_tile).min(-1)
    full = (last_key <= first) & (first_end >= stop) & (local + q_tile <= q_len)
    for hidden_start, hidden_stop in bounds:
        begins, ends = (
            bound.reshape(rows, 1, k_blocks, k_tile) for bound in (hidden_start, hidden_stop)
        )
        overlaps = jnp.maximum(begins, first[..., None]) < jnp.minimum(ends, stop[..., None])
        full &= ~overlaps.any(-1)
    return full
