"""Paged attention in plain XLA: a loop over blocks of tokens with an online softmax.

Runs everywhere; the only choice on CPU. One trip gathers the next `BLOCK_LEN` tokens of every row;
the loop ends with the longest row. A block behind a row's end adds exact zeros to that row's sums,
and a block holds the same number of tokens whatever the page size is. So on CPU, in calls of one
shape, a row's result has the same bits whatever its batch mates are, however long they are, and in
whatever pages and slots its tokens lie. A prefill of another run length may round differently.

One loop of as many trips as needed, not a branch for each of a few lengths: on CPU gathering a
whole bucket of tokens at once took 1.7 times as long, most of it in memory traffic. The loop only
reads the pool, and a decoding loop around it copies nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from tw_jax.kernels.page_pool import PagePool

# Tokens per trip. Never derived from a shape: another length would round sums differently.
BLOCK_LEN = 64

# Finite, so that a query which has met no visible key yet gives exp(0) and not exp(nan); the mask
# on the weights removes those.
_MASKED = -1e30


def paged_attention_xla(
    q: Float[Array, "rows run heads dim"],
    pool: PagePool,
    layer: int | Int32[Array, ""],
    kv_lens: Int32[Array, "rows"],
    page_indices: Int32[Array, "rows pages_per_row"],
    q_lens: Int32[Array, "rows"],
) -> Float[Array, "rows run heads dim"]:
    """See `tw_jax.kernels.paged_attention`."""
    rows, run, heads, dim = q.shape
    kv_heads, page_size = pool.kv_heads, pool.page_size
    group = heads // kv_heads
    piece = min(page_size, BLOCK_LEN)  # a block is some whole pages, or a piece of one
    pieces = BLOCK_LEN // piece
    per_page = page_size // piece
    memory = pool.pages.reshape(-1, piece, 2 * kv_heads, dim)
    blocks = -(-page_indices.shape[1] * page_size // BLOCK_LEN)
    table = (layer * pool.pages_per_layer + page_indices)[..., None] * per_page
    table = (table + jnp.arange(per_page)).reshape(rows, -1)
    table = jnp.pad(table, ((0, 0), (0, blocks * pieces - table.shape[1])))

    # The query heads that share a key head, and the queries of a row, are one product's rows.
    grouped = q.reshape(rows, run, kv_heads, group, dim).swapaxes(1, 2)
    grouped = grouped.reshape(rows, kv_heads, run * group, dim).astype(memory.dtype)
    slot = jnp.arange(run)
    position = jnp.where(slot < q_lens[:, None], (kv_lens - q_lens)[:, None] + slot, -1)
    position = jnp.repeat(position, group, axis=1)[:, None, :, None]

    def visit(block, state):
        peak, total, mixed = state
        index = jax.lax.dynamic_slice_in_dim(table, block * pieces, pieces, axis=1)
        tokens = memory.at[index].get(mode="promise_in_bounds")
        tokens = tokens.reshape(rows, BLOCK_LEN, kv_heads, 2, dim)
        key = block * BLOCK_LEN + jnp.arange(BLOCK_LEN)
        # What lies behind a row's end is not ours, maybe no number: 0 * nan must not happen.
        written = (key < kv_lens[:, None])[..., None, None]
        values = jnp.where(written, tokens[..., 1, :], 0)
        visible = key <= position
        product = jnp.einsum(
            "rkqd,rskd->rkqs", grouped, tokens[..., 0, :], preferred_element_type=jnp.float32
        )
        # Scaled after the product, as in training: rounding then agrees between the two.
        score = jnp.where(visible, product * dim**-0.5, _MASKED)
        new_peak = jnp.maximum(peak, score.max(-1))
        weight = jnp.where(visible, jnp.exp(score - new_peak[..., None]), 0.0)
        shrink = jnp.exp(peak - new_peak)
        update = jnp.einsum(
            "rkqs,rskd->rkqd",
            weight.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return (
            new_peak,
            total * shrink + weight.sum(-1),
            mixed * shrink[..., None] + update,
        )

    with jax.named_scope("paged_attention_xla"):
        zeros = jnp.zeros(grouped.shape, jnp.float32)
        state = (zeros[..., 0] + _MASKED, zeros[..., 0], zeros)
        needed = jnp.minimum((kv_lens.max() + BLOCK_LEN - 1) // BLOCK_LEN, blocks)
        _, total, mixed = jax.lax.fori_loop(0, needed, visit, state)
        out = mixed / jnp.where(total > 0, total, 1)[..., None]
    out = out.reshape(rows, kv_heads, run, group, dim).swapaxes(1, 2)
    return out.reshape(q.shape).astype(q.dtype)
