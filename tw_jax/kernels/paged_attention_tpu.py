"""Paged attention on TPU: JAX's `ragged_paged_attention` behind our interface.

The kernel wants the queries of all rows back to back and every row to have at least one: a row
without any would have its first pages fetched and never awaited. Rows that rest are therefore
sorted behind the others, and only the others are counted.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jaxtyping import Array, Bool, Float, Int32

from tw_jax.kernels.page_pool import PagedShape, PagePool, paged_shape

_HEAD_DIM = 128
_DTYPES = ("bfloat16", "float32")
# The page lists of all rows travel in scalar memory, 1 MiB on all known chips, padded to tiles of 8
# rows and 128 entries; the rest of it is for the other scalars.
_SCALAR_BYTES = 2**20 - 2**16
_TILE = (8, 128)
# Tokens fetched at once, twice for double buffering; what compiles within every chip's default
# limit of vector memory.
_MAX_BLOCK_TOKENS = 256
_MAX_BUFFER_BYTES = 4 * 2**20
# Queries per block. Not tuned: neither number has met a TPU.
_DECODE_QUERIES, _PREFILL_QUERIES = 8, 32


def tpu_obstacle(shape: PagedShape) -> str | None:
    """Why the kernel cannot run this call, or None if it can."""
    if shape.head_dim != _HEAD_DIM:
        return f"head_dim is {shape.head_dim}, and the kernel supports {_HEAD_DIM} only"
    if shape.dtype.name not in _DTYPES:
        return f"pages of {shape.dtype.name}, and the kernel is used with {' or '.join(_DTYPES)}"
    packing = 4 // shape.dtype.itemsize
    tiles, rest = divmod(2 * shape.kv_heads, packing)
    if rest or not (tiles in (1, 2, 4, 8) or tiles % 8 == 0):
        return f"{shape.kv_heads} key heads (on one device) do not fill whole tiles"
    rows, entries = (
        -(-size // tile) * tile
        for size, tile in zip((shape.rows, shape.pages_per_row), _TILE, strict=True)
    )
    if 4 * rows * entries > _SCALAR_BYTES:
        return (
            f"{shape.rows} page lists of {shape.pages_per_row} entries exceed the scalar memory: "
            "choose larger pages"
        )
    if shape.page_size > _MAX_BLOCK_TOKENS:
        return f"pages of {shape.page_size} tokens, and at most {_MAX_BLOCK_TOKENS} fit"
    if _buffer_bytes(shape, shape.page_size) > _MAX_BUFFER_BYTES:
        return f"pages of {shape.page_size} tokens and {shape.kv_heads} key heads are too large"
    return None


def _buffer_bytes(shape: PagedShape, tokens: int) -> int:
    """Bytes of both buffers of one block; the kernel cuts heads into whole tiles if it can."""
    whole = 8 * (4 // shape.dtype.itemsize)
    heads = 2 * shape.kv_heads
    heads = whole if heads % whole == 0 else heads
    return 2 * tokens * heads * shape.head_dim * shape.dtype.itemsize


def _pages_per_block(shape: PagedShape) -> int:
    tokens = _MAX_BLOCK_TOKENS
    while tokens > shape.page_size and _buffer_bytes(shape, tokens) > _MAX_BUFFER_BYTES:
        tokens //= 2
    return max(1, min(tokens // shape.page_size, shape.pages_per_row))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedBatch:
    """The kernel's metadata, and the way from our slots to its tokens and back.

    Attributes:
      kv_lens: tokens each sequence attends to.
      page_indices: page list of each sequence.
      cu_q_lens: where each sequence's queries begin.
      num_seqs: sequences that have a query; at least 1.
      slot: query slot that each of the kernel's tokens is taken from.
      token: the kernel's token of each query slot.
      valid: query slots that hold a query.
    """

    kv_lens: Int32[Array, "rows"]
    page_indices: Int32[Array, "rows pages_per_row"]
    cu_q_lens: Int32[Array, "rows_and_one"]
    num_seqs: Int32[Array, "1"]
    slot: Int32[Array, "tokens"]
    token: Int32[Array, "tokens"]
    valid: Bool[Array, "tokens"]


def ragged_batch(
    kv_lens: Int32[Array, "rows"],
    q_lens: Int32[Array, "rows"],
    page_indices: Int32[Array, "rows pages_per_row"],
    run: int,
) -> RaggedBatch:
    """Sorts the rows that have queries to the front and lays their queries back to back."""
    rows = len(kv_lens)
    order = jnp.argsort(q_lens == 0, stable=True).astype(jnp.int32)
    rank = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32))
    # If all rows rest, the first one asks for something all the same, and no slot receives it.
    counts = q_lens[order].at[0].max(1)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    starts = ends - counts
    token = jnp.arange(rows * run, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.searchsorted(ends, token, side="right"), rows - 1)
    slot = order[sequence] * run + jnp.minimum(token - starts[sequence], run - 1)
    offset = jnp.arange(run, dtype=jnp.int32)
    valid = offset < q_lens[:, None]
    return RaggedBatch(
        kv_lens=jnp.maximum(kv_lens[order], 1),
        page_indices=page_indices[order],
        cu_q_lens=jnp.concatenate([jnp.zeros(1, jnp.int32), ends]),
        num_seqs=jnp.maximum((q_lens > 0).sum(dtype=jnp.int32), 1)[None],
        slot=slot,
        token=jnp.where(valid, starts[rank][:, None] + offset, 0).reshape(-1),
        valid=valid.reshape(-1),
    )


def paged_attention_tpu(
    q: Float[Array, "rows run heads dim"],
    pool: PagePool,
    layer: int | Int32[Array, ""],
    kv_lens: Int32[Array, "rows"],
    page_indices: Int32[Array, "rows pages_per_row"],
    q_lens: Int32[Array, "rows"],
    kernel: Callable[..., Array] = ragged_paged_attention,
) -> Float[Array, "rows run heads dim"]:
    """See `tw_jax.kernels.paged_attention`; `kernel` lets tests put its reference in its place."""
    rows, run, heads, dim = q.shape
    pages = layer * pool.pages_per_layer + page_indices
    batch = ragged_batch(kv_lens, q_lens, pages.astype(jnp.int32), run)
    tokens = q.reshape(rows * run, heads, dim).astype(pool.pages.dtype)
    shape = paged_shape(tokens, pool, page_indices)
    with jax.named_scope("paged_attention_tpu"):
        out = kernel(
            tokens[batch.slot],
            pool.pages,
            batch.kv_lens,
            batch.page_indices,
            batch.cu_q_lens,
            batch.num_seqs,
            sm_scale=dim**-0.5,
            num_kv_pages_per_block=_pages_per_block(shape),
            num_queries_per_block=_DECODE_QUERIES if run == 1 else _PREFILL_QUERIES,
        )
        out = jnp.where(batch.valid[:, None, None], out[batch.token], 0)
    return out.reshape(q.shape).astype(q.dtype)
