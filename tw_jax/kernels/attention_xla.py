"""Tree attention in plain XLA: a loop over the live tiles with an online softmax.

Runs everywhere; the only choice on CPU. The loop's trip count is the number of live tiles, known
only at run time, so automatic differentiation cannot reverse it: `jax.custom_vjp` keeps the
log-sum-exp of each query and recomputes probabilities tile by tile. Accumulators are whole arrays
updated in place, one tile per trip.

Layout inside: head-major tiles, `[blocks, kv_heads, group * q_tile, dim]` for queries (the query
heads of one key head folded into the rows of one matrix) and `[blocks, kv_heads, k_tile, dim]` for
keys, so that a tile is one contiguous slice and every product is a batched matrix product.

Softmax, sums and accumulators are float32 for inputs of 32 bits or fewer, and float64 for float64
inputs, so that gradients can be checked against finite differences.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from tw_jax.kernels.residuals import attention_residuals
from tw_jax.kernels.tile_plan import Hidden, TilePlan, pad_tokens

# Finite, so that a query which has met no visible key yet gives exp(0) and not exp(nan); the mask
# on the probabilities removes those, and every query meets itself in its diagonal tile.
_MASKED = -1e30


def tree_attention_xla(
    q: Float[Array, "rows q_len heads dim"],
    k: Float[Array, "rows len kv_heads dim"],
    v: Float[Array, "rows len kv_heads dim"],
    visible_end: Int32[Array, "rows len"],
    hidden: Hidden | None,
    plan: TilePlan,
) -> Float[Array, "rows q_len heads dim"]:
    """See `tw_jax.kernels.tree_attention`."""
    rows, q_len, heads, dim = q.shape
    row_len, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    padding = ((0, 0), (0, plan.padded_len - row_len), (0, 0), (0, 0))

    q = jnp.pad(q, ((0, 0), (0, plan.q_len - q_len), (0, 0), (0, 0)))
    q = q.reshape(rows, -1, plan.q_tile, kv_heads, group, dim)
    q = q.transpose(0, 1, 3, 4, 2, 5).reshape(-1, kv_heads, group * plan.q_tile, dim)
    k, v = (
        jnp.pad(x, padding).reshape(-1, plan.k_tile, kv_heads, dim).transpose(0, 2, 1, 3)
        for x in (k, v)
    )
    end = pad_tokens(visible_end, plan.padded_len).reshape(-1, plan.k_tile)
    # Intervals [blocks, 2, depth, k_tile]; padding tokens hide nothing.
    bounds = jnp.zeros((2, 0, rows, row_len), jnp.int32) if hidden is None else jnp.stack(hidden)
    bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, 0), (0, plan.padded_len - row_len)))
    bounds = bounds.reshape(2, bounds.shape[1], end.shape[0], plan.k_tile).transpose(2, 0, 1, 3)

    out = _attend(q, k, v, end, bounds, plan)
    out = out.reshape(rows, -1, kv_heads, group, plan.q_tile, dim).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(rows, plan.q_len, heads, dim)[:, :q_len]


def _block(array: Array, index: Int32[Array, ""]) -> Array:
    """`array[index]` for an index known to be in range."""
    return jax.lax.dynamic_index_in_dim(array, index, keepdims=False, allow_negative_indices=False)


def _with_block(array: Array, index: Int32[Array, ""], block: Array) -> Array:
    """`array` with `block` in place `index`; in place when the array is a loop's state."""
    return jax.lax.dynamic_update_index_in_dim(array, block, index, 0, allow_negative_indices=False)


def _in_row(block: Int32[Array, ""], blocks_per_row: int) -> Int32[Array, ""]:
    """Number within its row of a block that is numbered through the batch."""
    # A plain int would be int64 wherever float64 is on, and `rem` mixes no types.
    return jax.lax.rem(block, jnp.int32(blocks_per_row))


def _tile_mask(end, bounds, plan: TilePlan, q_block, k_block, group: int) -> Bool[Array, "1 gq k"]:
    """Visible pairs of one tile, repeated for the query heads that share a key head."""
    q_first = plan.q_start + _in_row(q_block, plan.q_len // plan.q_tile) * plan.q_tile
    k_first = _in_row(k_block, plan.padded_len // plan.k_tile) * plan.k_tile
    query = q_first + jnp.arange(plan.q_tile, dtype=jnp.int32)[:, None]
    key = k_first + jnp.arange(plan.k_tile, dtype=jnp.int32)[None, :]
    visible = (key <= query) & (query < _block(end, k_block)[None, :])
    start, stop = _block(bounds, k_block)
    for depth in range(start.shape[0]):
        visible &= ~((start[depth] <= query) & (query < stop[depth]))
    return jnp.tile(visible, (group, 1))[None]


def _wide(x: Array) -> jnp.dtype:
    """The dtype of softmax and sums for inputs like `x`."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _dot(a: Float[Array, "heads m inner"], b: Float[Array, "heads n inner"]):
    """`a @ b^T` per head, wide."""
    return jnp.einsum("hmi,hni->hmn", a, b, preferred_element_type=_wide(b))


def _mix(weights: Float[Array, "heads m n"], values: Float[Array, "heads n dim"]):
    """`weights @ values` per head, wide; weights are rounded to the dtype of the values."""
    weights = weights.astype(values.dtype)
    return jnp.einsum("hmn,hnd->hmd", weights, values, preferred_element_type=_wide(values))


@jax.custom_vjp
def _attend(q, k, v, end, bounds, plan):
    return _forward(q, k, v, end, bounds, plan)[0]


def _forward(q, k, v, end, bounds, plan: TilePlan):
    scale = q.shape[-1] ** -0.5
    group = q.shape[2] // plan.q_tile

    def visit(index, state):
        i, j = _block(plan.q_block, index), _block(plan.k_block, index)
        peak, total, acc = (_block(array, i) for array in state)
        visible = _tile_mask(end, bounds, plan, i, j, group)
        score = jnp.where(visible, _dot(_block(q, i), _block(k, j)) * scale, _MASKED)
        new_peak = jnp.maximum(peak, score.max(-1))
        weight = jnp.where(visible, jnp.exp(score - new_peak[..., None]), 0.0)
        shrink = jnp.exp(peak - new_peak)
        updated = (
            new_peak,
            total * shrink + weight.sum(-1),
            acc * shrink[..., None] + _mix(weight, _block(v, j)),
        )
        return tuple(_with_block(array, i, new) for array, new in zip(state, updated, strict=True))

    with jax.named_scope("tree_attention_forward"):
        acc = jnp.zeros_like(q, _wide(q))
        total = acc[..., 0]
        state = (total + _MASKED, total, acc)
        peak, total, acc = jax.lax.fori_loop(0, plan.count, visit, state)
        out = (acc / total[..., None]).astype(q.dtype)
        return out, peak + jnp.log(total)


def _attend_fwd(q, k, v, end, bounds, plan):
    out, log_total = attention_residuals(*_forward(q, k, v, end, bounds, plan))
    return out, (q, k, v, end, bounds, plan, out, log_total)


def _attend_bwd(saved, d_out):
    q, k, v, end, bounds, plan, out, log_total = saved
    scale = q.shape[-1] ** -0.5
    group = q.shape[2] // plan.q_tile

    def visit(index, grads):
        dq, dk, dv = grads
        i, j = _block(plan.q_block, index), _block(plan.k_block, index)
        q_i, k_j, v_j, d_out_i = _block(q, i), _block(k, j), _block(v, j), _block(d_out, i)
        visible = _tile_mask(end, bounds, plan, i, j, group)
        score = _dot(q_i, k_j) * scale
        weight = jnp.where(visible, jnp.exp(score - _block(log_total, i)[..., None]), 0.0)
        d_weight = _dot(d_out_i, v_j)
        d_score = weight * (d_weight - _block(mean_grad, i)[..., None]) * scale
        return (
            _with_block(dq, i, _block(dq, i) + _mix(d_score, k_j)),
            _with_block(dk, j, _block(dk, j) + _mix(d_score.swapaxes(1, 2), q_i)),
            _with_block(dv, j, _block(dv, j) + _mix(weight.swapaxes(1, 2), d_out_i)),
        )

    with jax.named_scope("tree_attention_backward"):
        # sum_j weight_ij * d_weight_ij, the part of the softmax gradient shared by a query's keys.
        mean_grad = (out.astype(_wide(out)) * d_out.astype(_wide(d_out))).sum(-1)
        grads = tuple(jnp.zeros_like(x, _wide(x)) for x in (q, k, v))
        dq, dk, dv = jax.lax.fori_loop(0, plan.count, visit, grads)
    # Integers have no gradient.
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
