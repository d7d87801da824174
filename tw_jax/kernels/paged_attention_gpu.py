"""Paged attention on NVIDIA GPUs: a Pallas kernel compiled by Triton.

One program serves one row, one key head and one tile of that row's queries. It walks over blocks
of the row's tokens, looks their pages up one by one and stops at the last token that its queries
see; so pages may have any size, and unequal rows cost what they hold.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from tw_jax.kernels.page_pool import PagedShape, PagePool

_DTYPES = ("bfloat16", "float16", "float32")
_MIN_HEAD_DIM, _MAX_HEAD_DIM = 16, 256
_MASKED = -1e30
# Triton's matrix product wants 16 rows at least; more queries than the widest tile take another
# program. Not tuned: the kernel has not met a GPU.
_MIN_TILE, _MAX_TILE = 16, 64
_BLOCK_LEN = 64
_NUM_WARPS, _NUM_STAGES = 4, 2


def gpu_obstacle(shape: PagedShape) -> str | None:
    """Why the kernel cannot run this call, or None if it can."""
    dim = shape.head_dim
    if not _MIN_HEAD_DIM <= dim <= _MAX_HEAD_DIM or dim & (dim - 1):
        return (
            f"head_dim is {dim}, and the kernel supports powers of two "
            f"from {_MIN_HEAD_DIM} to {_MAX_HEAD_DIM}"
        )
    if shape.dtype.name not in _DTYPES:
        return f"pages of {shape.dtype.name}, and the kernel supports {', '.join(_DTYPES)}"
    return None


def paged_attention_gpu(
    q: Float[Array, "rows run heads dim"],
    pool: PagePool,
    layer: int | Int32[Array, ""],
    kv_lens: Int32[Array, "rows"],
    page_indices: Int32[Array, "rows pages_per_row"],
    q_lens: Int32[Array, "rows"],
    interpret: bool = False,
) -> Float[Array, "rows run heads dim"]:
    """See `tw_jax.kernels.paged_attention`; `interpret` runs the kernel on CPU, for tests."""
    rows, run, heads, dim = q.shape
    kv_heads, group = pool.kv_heads, heads // pool.kv_heads
    # The query heads that share a key head, and the queries of a row, are one product's rows.
    tile = min(_MAX_TILE, max(_MIN_TILE, pl.next_power_of_2(run * group)))
    tiles = pl.cdiv(run * group, tile)
    grouped = q.reshape(rows, run, kv_heads, group, dim).swapaxes(1, 2)
    grouped = grouped.reshape(rows, kv_heads, run * group, dim).astype(pool.pages.dtype)
    padding = tiles * tile - run * group
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, padding), (0, 0)))
    pages = (layer * pool.pages_per_layer + page_indices).astype(jnp.int32)

    queries = pl.BlockSpec((None, None, tile, dim), lambda row, head, part: (row, head, part, 0))
    scalar = pl.BlockSpec((1,), lambda row, head, part: (row,))
    page_list = pl.BlockSpec((None, pages.shape[1]), lambda row, head, part: (row, 0))
    memory = pl.BlockSpec(pool.pages.shape, lambda row, head, part: (0, 0, 0, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, group=group, page_size=pool.page_size),
        grid=(rows, kv_heads, tiles),
        in_specs=[scalar, scalar, page_list, queries, memory],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(grouped.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=_NUM_STAGES),
        interpret=interpret,
        name="paged_attention",
    )(kv_lens, q_lens, pages, grouped, pool.pages)
    out = out[:, :, : run * group].reshape(rows, kv_heads, run, group, dim)
    return out.swapaxes(1, 2).reshape(q.shape)


def _kernel(kv_len_ref, q_len_ref, page_list_ref, q_ref, pages_ref, out_ref, *, group, page_size):
    head = pl.program_id(1)
    tile, dim = q_ref.shape
    kv_len, q_len = kv_len_ref[0], q_len_ref[0]
    slot = (pl.program_id(2) * tile + jnp.arange(tile)) // group
    position = jnp.where(slot < q_len, kv_len - q_len + slot, -1)
    q = q_ref[...]

    def dot(a, b):
        # Of float32 inputs Triton would round the products to TF32 otherwise.
        return jnp.dot(
            a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )

    def visit(block, state):
        peak, total, mixed = state
        key = block * _BLOCK_LEN + jnp.arange(_BLOCK_LEN)
        written = key < kv_len
        page = plgpu.load(page_list_ref.at[key // page_size], mask=written, other=0)
        offset = jax.lax.rem(key, page_size)

        def load(index):
            # What lies behind a row's end is not ours, maybe no number: 0 * nan must not happen.
            return jnp.where(written[:, None], pages_ref[page, offset, index, :], 0)

        visible = key[None, :] <= position[:, None]
        # Scaled after the product, as in training: rounding then agrees between the two.
        score = jnp.where(visible, dot(q, load(2 * head).T) * dim**-0.5, _MASKED)
        new_peak = jnp.maximum(peak, score.max(axis=1))
        weight = jnp.where(visible, jnp.exp(score - new_peak[:, None]), 0.0)
        shrink = jnp.exp(peak - new_peak)
        values = load(2 * head + 1)
        update = dot(weight.astype(values.dtype), values)
        return (
            new_peak,
            total * shrink + weight.sum(axis=1),
            mixed * shrink[:, None] + update,
        )

    state = (
        jnp.full((tile,), _MASKED, jnp.float32),
        jnp.zeros((tile,), jnp.float32),
        jnp.zeros((tile, dim), jnp.float32),
    )
    last = jnp.max(position) + 1  # no query of this tile sees further
    _, total, mixed = jax.lax.fori_loop(0, pl.cdiv(last, _BLOCK_LEN), visit, state)
    out = mixed / jnp.where(total > 0, total, 1.0)[:, None]
    out_ref[...] = out.astype(out_ref.dtype)
