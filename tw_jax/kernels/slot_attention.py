"""Attention over a dense key/value cache with one slot per batch row, for decoding and prefill.

Every layer first writes the new keys and values, then attends over the cache, itself included.
That order is what keeps a decoding loop free of copies of the whole cache: were the writes left
to the end, XLA could schedule them before the last read and would have to keep the old cache.

A slot is cut into blocks of `block_len` positions, and blocks of the same number lie together:
entry `(layer * blocks + block) * rows + row`. So "the first b blocks of all rows of a layer" is a
contiguous slice, and a step that has only short rows reads only those, without a gather. Keys are
stored `[dim, position]` and values `[position, dim]`, the order in which the two products of
attention run through memory; on CPU, where decoding is bound by these reads, that halves the time.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

_MASKED = -1e30  # finite, so that a row with nothing visible gives no NaN


@dataclasses.dataclass(frozen=True)
class SlotLayout:
    """Static shape of a slot cache.

    Attributes:
      layers: transformer layers.
      rows: slots per layer.
      blocks: blocks per slot.
      block_len: positions per block.
    """

    layers: int
    rows: int
    blocks: int
    block_len: int

    @property
    def entries(self) -> int:
        """Length of the cache's first axis."""
        return self.layers * self.blocks * self.rows

    def entry(self, layer, block, row):
        """Index on the cache's first axis; arrays broadcast."""
        return (layer * self.blocks + block) * self.rows + row


def slot_layout(layers: int, rows: int, context_len: int, block_len: int = 64) -> SlotLayout:
    """Layout whose slots hold at least `context_len` positions."""
    block_len = min(block_len, context_len)
    return SlotLayout(layers, rows, -(-context_len // block_len), block_len)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotCache:
    """Keys and values of all layers, rows and positions; see the module for the order.

    Attributes:
      keys: `[entries, kv_heads, dim, block_len]`.
      values: `[entries, kv_heads, block_len, dim]`.
    """

    keys: Float[Array, "entries kv_heads dim block"]
    values: Float[Array, "entries kv_heads block dim"]


def empty_cache(layout: SlotLayout, kv_heads: int, head_dim: int, dtype) -> SlotCache:
    """A cache of zeros."""
    return SlotCache(
        keys=jnp.zeros((layout.entries, kv_heads, head_dim, layout.block_len), dtype),
        values=jnp.zeros((layout.entries, kv_heads, layout.block_len, head_dim), dtype),
    )


def write_tokens(
    cache: SlotCache,
    layout: SlotLayout,
    layer: int | Int32[Array, ""],
    rows: Int32[Array, "*b"],
    positions: Int32[Array, "*b"],
    valid: Bool[Array, "*b"],
    k: Float[Array, "*b kv_heads dim"],
    v: Float[Array, "*b kv_heads dim"],
) -> SlotCache:
    """Writes keys and values of tokens; those not `valid` are dropped."""
    block, offset = positions // layout.block_len, positions % layout.block_len
    entry = jnp.where(valid, layout.entry(layer, block, rows), layout.entries)
    return SlotCache(
        keys=cache.keys.at[entry, :, :, offset].set(k.astype(cache.keys.dtype), mode="drop"),
        values=cache.values.at[entry, :, offset].set(v.astype(cache.values.dtype), mode="drop"),
    )


def copy_slot(
    cache: SlotCache, layout: SlotLayout, source: Int32[Array, ""], target: Int32[Array, ""]
) -> SlotCache:
    """Copies one row's whole slot, all layers. Indexed copies: slices would copy the cache."""
    first = jnp.arange(layout.layers * layout.blocks) * layout.rows
    return SlotCache(
        keys=cache.keys.at[first + target].set(cache.keys[first + source]),
        values=cache.values.at[first + target].set(cache.values[first + source]),
    )


def attend_rows(
    q: Float[Array, "rows heads dim"],
    cache: SlotCache,
    layout: SlotLayout,
    layer: int | Int32[Array, ""],
    positions: Int32[Array, "rows"],
    blocks: int,
) -> Float[Array, "rows heads dim"]:
    """One query per row over its own slot, positions up to and including its own.

    Args:
      q: queries of all rows, unscaled.
      cache: holds the queries' own keys and values already.
      layout: the cache's layout.
      layer: which layer's part of the cache.
      positions: position of each query; must be smaller than `blocks * block_len`.
      blocks: static number of leading blocks to read.
    """
    start, size = layout.entry(layer, 0, 0), blocks * layout.rows
    keys = lax.dynamic_slice_in_dim(cache.keys, start, size)
    values = lax.dynamic_slice_in_dim(cache.values, start, size)
    shape = (blocks, layout.rows)
    out = _attend(
        q[:, None],
        keys.reshape(*shape, *keys.shape[1:]),
        values.reshape(*shape, *values.shape[1:]),
        positions[:, None],
    )
    return out[:, 0]


def attend_chunks(
    q: Float[Array, "chunks len heads dim"],
    cache: SlotCache,
    layout: SlotLayout,
    layer: int | Int32[Array, ""],
    rows: Int32[Array, "chunks"],
    positions: Int32[Array, "chunks len"],
    blocks: int,
) -> Float[Array, "chunks len heads dim"]:
    """A run of queries in each of a few rows, every one up to its own position.

    Args:
      q: queries, unscaled.
      cache: holds the queries' own keys and values already.
      layout: the cache's layout.
      layer: which layer's part of the cache.
      rows: the row of each chunk.
      positions: position of each query; those beyond the blocks read see all of these.
      blocks: static number of leading blocks to read.
    """
    entry = layout.entry(layer, jnp.arange(blocks)[:, None], rows[None])
    return _attend(q, cache.keys[entry], cache.values[entry], positions)


def _attend(
    q: Float[Array, "rows len heads dim"],
    keys: Float[Array, "blocks rows kv_heads dim block"],
    values: Float[Array, "blocks rows kv_heads block dim"],
    positions: Int32[Array, "rows len"],
) -> Float[Array, "rows len heads dim"]:
    """Softmax attention; scores and softmax in float32."""
    blocks, rows, kv_heads, dim, block_len = keys.shape
    length, heads = q.shape[1:3]
    grouped = (q * dim**-0.5).reshape(rows, length, kv_heads, heads // kv_heads, dim)
    # The products below have (block, row, kv head) as batch axes: queries repeat over blocks.
    grouped = jnp.broadcast_to(grouped.astype(keys.dtype), (blocks, *grouped.shape))
    scores = jnp.einsum(
        "brlkgd,brkds->brklgs", grouped, keys, preferred_element_type=jnp.float32
    )
    key_position = jnp.arange(blocks * block_len).reshape(blocks, 1, 1, 1, 1, block_len)
    visible = key_position <= positions[None, :, None, :, None, None]
    scores = jnp.where(visible, scores, _MASKED)
    weights = jnp.exp(scores - scores.max(axis=(0, 5), keepdims=True))
    total = weights.sum(axis=(0, 5))
    mixed = jnp.einsum(
        "brklgs,brksd->brklgd",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    mixed = mixed.sum(axis=0) / total[..., None]
    return jnp.moveaxis(mixed, 1, 2).reshape(q.shape).astype(q.dtype)
