"""The live-tile list that drives every tree-attention backend.

Attention is cut into tiles of `q_tile` queries by `k_tile` keys. In a row of packed trees most
tiles hold no visible pair at all. The plan lists the others, once per batch, from a few integers
per token; a backend visits the list and nothing else, so dead tiles cost no compute, no memory
traffic and no loop trips.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from tw_jax.kernels.tile_sizes import tile_sizes

Hidden = tuple[Int32[Array, "depth rows len"], Int32[Array, "depth rows len"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TilePlan:
    """Tiles with at least one visible pair, of all rows, ordered by (row, query block, key block).

    Blocks are numbered through the batch: block b of row r is `r * blocks_per_row + b`. Query
    blocks are numbered within the queries that the plan covers.

    Attributes:
      count: number of live tiles; later entries of the lists are meaningless.
      q_block: query block of each tile.
      k_block: key block of each tile.
      q_tile: queries per tile.
      k_tile: keys per tile.
      q_start: index in the row of the first query; not 0 where a row's queries are split over
        devices and this plan is for one part of them.
      rows: rows of the batch that was planned.
      padded_len: row length rounded up to whole tiles.
      q_len: queries per row that the plan covers, rounded up to whole tiles.
      backend: the backend that it was made for.
      by_key: `(q_block, k_block)` of the same tiles ordered by (row, key block, query block), for
        backends that sum the gradients of one key block after another (`tpu`); else None.
    """

    count: Int32[Array, ""]
    q_block: Int32[Array, "capacity"]
    k_block: Int32[Array, "capacity"]
    q_start: Int32[Array, ""]
    q_tile: int = dataclasses.field(metadata={"static": True})
    k_tile: int = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(metadata={"static": True})
    padded_len: int = dataclasses.field(metadata={"static": True})
    q_len: int = dataclasses.field(metadata={"static": True})
    backend: str = dataclasses.field(default="xla", metadata={"static": True})
    by_key: tuple[Int32[Array, "capacity"], Int32[Array, "capacity"]] | None = None


def pad_tokens(visible_end: Int32[Array, "rows len"], padded_len: int) -> Int32[Array, "rows new"]:
    """Extends rows with padding tokens, each visible to itself only."""
    rows, row_len = visible_end.shape
    own_end = jnp.arange(row_len + 1, padded_len + 1, dtype=jnp.int32)
    padding = jnp.broadcast_to(own_end, (rows, padded_len - row_len))
    return jnp.concatenate([jnp.asarray(visible_end, jnp.int32), padding], axis=1)


def plan_tiles(
    visible_end: Int32[Array, "rows len"],
    hidden: Hidden | None = None,
    *,
    backend: str = "xla",
    group: int = 1,
    q_tile: int | None = None,
    k_tile: int | None = None,
    q_start: int | Int32[Array, ""] = 0,
    q_len: int | None = None,
) -> TilePlan:
    """Lists the live tiles of a batch; build it once, outside the layers.

    The list is exact: a tile is in it if and only if one of its queries sees one of its keys.
    Works on concrete and traced arrays.

    Args:
      visible_end: key j is visible to queries `j <= i < visible_end[j]`; every token sees itself
        (`visible_end[j] > j`), padding included. So each query block meets its diagonal tile.
      hidden: `(hidden_start, hidden_end)`; key j is not visible to
        `hidden_start[d, j] <= i < hidden_end[d, j]` for any d. Must not hide a token from itself.
      backend: the backend of `tree_attention` that will follow the plan.
      group: query heads per key head; some backends choose their tiles by it.
      q_tile: queries per tile; by default what suits backend, row length and group.
      k_tile: keys per tile; like `q_tile`. One must be a multiple of the other.
      q_start: plan only for the queries from this index of every row on; may be traced (the part
        of a device under `shard_map`).
      q_len: plan for this many queries, whole tiles of them; None for all that there are.

    Returns:
      The plan; its lists have room for every tile on or below the diagonal.

    Raises:
      ValueError: neither tile edge divides the other, or `q_len` is not whole tiles.
    """
    rows, row_len = visible_end.shape
    if q_tile is None or k_tile is None:
        sizes = tile_sizes(backend, row_len=row_len, q_len=q_len, group=group)
        q_tile, k_tile = q_tile or sizes[0], k_tile or sizes[1]
    if max(q_tile, k_tile) % min(q_tile, k_tile):
        raise ValueError(f"q_tile={q_tile}, k_tile={k_tile}: one must be a multiple of the other")
    padded_len = -(-row_len // max(q_tile, k_tile)) * max(q_tile, k_tile)
    if q_len is None:
        q_len = padded_len
    elif q_len % q_tile:
        raise ValueError(f"q_len={q_len}: must be a multiple of the query tile {q_tile}")
    q_starts = q_start + np.arange(0, q_len, q_tile, dtype=np.int32)
    k_starts = np.arange(0, padded_len, k_tile, dtype=np.int32)

    end = pad_tokens(visible_end, padded_len)
    reachable = k_starts[None, :] < q_starts[:, None] + q_tile  # [q blocks, k blocks]
    if hidden is None or hidden[0].shape[0] == 0:
        # Keys before the query block reach into it if their interval ends behind its first query.
        last_end = end.reshape(rows, len(k_starts), k_tile).max(-1)
        live = last_end[:, None, :] > q_starts[None, :, None]
    else:
        seen = _seen_by_block(end, hidden, q_starts, q_tile)
        live = seen.reshape(rows, len(q_starts), len(k_starts), k_tile).any(-1)
    live = live & reachable

    # Where the queries' place is known only at run time, every tile might be reachable.
    most = reachable.size if isinstance(reachable, jax.Array) else int(reachable.sum())
    capacity = rows * most

    def blocks(row, q_index, k_index) -> tuple[Array, Array]:
        """Numbers of blocks through the batch."""
        q_block, k_block = row * len(q_starts) + q_index, row * len(k_starts) + k_index
        return q_block.astype(jnp.int32), k_block.astype(jnp.int32)

    q_block, k_block = blocks(*jnp.nonzero(live, size=capacity, fill_value=0))
    by_key = None
    if backend == "tpu":
        row, k, q = jnp.nonzero(live.swapaxes(1, 2), size=capacity, fill_value=0)
        by_key = blocks(row, q, k)
    return TilePlan(
        count=live.sum(dtype=jnp.int32),
        q_block=q_block,
        k_block=k_block,
        q_start=jnp.asarray(q_start, jnp.int32),
        q_tile=q_tile,
        k_tile=k_tile,
        rows=rows,
        padded_len=padded_len,
        q_len=q_len,
        backend=backend,
        by_key=by_key,
    )


def _seen_by_block(
    end: Int32[Array, "rows len"], hidden: Hidden, q_starts: np.ndarray | Array, q_tile: int
) -> Bool[Array, "rows q_blocks len"]:
    """Whether any query of a block sees a key, hidden intervals taken out.

    Walks the key's hidden intervals from left to right with a cursor at the first query that none
    of them has covered so far: a gap before the next interval is a visible query.
    """
    padded_len = end.shape[1]
    padding = ((0, 0), (0, 0), (0, padded_len - hidden[0].shape[2]))
    start, stop = (jnp.pad(jnp.asarray(bound, jnp.int32), padding) for bound in hidden)
    order = jnp.argsort(start, axis=0)
    start, stop = (jnp.take_along_axis(bound, order, axis=0) for bound in (start, stop))

    block_start = q_starts[None, :, None]
    own = jnp.arange(padded_len, dtype=jnp.int32)
    cursor = jnp.maximum(block_start, own)
    last = jnp.minimum(end[:, None, :], block_start + q_tile)
    cursor = jnp.broadcast_to(cursor, (end.shape[0], len(q_starts), padded_len))
    seen = jnp.zeros(cursor.shape, bool)
    for depth in range(start.shape[0]):
        seen |= cursor < jnp.minimum(start[depth][:, None, :], last)
        cursor = jnp.where(
            start[depth][:, None, :] <= cursor,
            jnp.maximum(cursor, stop[depth][:, None, :]),
            cursor,
        )
    return seen | (cursor < last)
