"""Bodies of the Triton kernels of tree attention; `attention_gpu` launches them.

A program owns one block of queries (forward, dq) or of keys (dkv) of one head, keeps it and its
accumulators in registers, and walks its list of live tiles: first those where every pair is
visible, then those that need the mask. Nothing is shared between programs, so nothing is atomic
and results do not depend on the order in which they run.

Scores live in base 2: the scale times log2(e) multiplies them once in float32, and every
exponential is `exp2`, one instruction on a GPU. So is the log-sum-exp that the backward pass needs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int32

_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a kernel is compiled for.

    Attributes:
      q_tile: queries per tile.
      k_tile: keys per tile.
      q_len: queries that are not padding; the rest see nothing.
      dim: head dimension; references are as wide as the next power of two.
      group: query heads per key head.
    """

    q_tile: int
    k_tile: int
    q_len: int
    dim: int
    group: int

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        return self.dim**-0.5


def forward_kernel(
    inner_ref,
    counts_ref,
    q_start_ref,
    end_ref,
    bounds_refs,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    log_total_ref,
    *,
    tile: Tile,
):
    """Online softmax of one query block over its live key blocks."""
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    query = _queries(q_start_ref, block, tile)[:, None]
    q = _load(q_ref, (slice(None),), tile)

    def visit(step, state, masked: bool):
        peak, total, acc = state
        keys = _slice(inner_ref[step], tile.k_tile)
        score = _dot(q, _load(k_ref, (keys,), tile), trans_b=True) * (tile.scale * _LOG2_E)
        if masked:
            key = _indices(inner_ref[step], tile.k_tile)[None, :]
            visible = _visible(query, key, keys, end_ref, bounds_refs, 0)
            score = jnp.where(visible, score, -jnp.inf)
        new_peak = jnp.maximum(peak, score.max(1))
        # A query that has met no visible key yet: exp2(-inf - 0) is 0, exp2(-inf + inf) is not.
        base = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        weight = jnp.exp2(score - base[:, None])
        shrink = jnp.exp2(peak - base)
        mixed = _dot(weight.astype(v_ref.dtype), _load(v_ref, (keys,), tile))
        return new_peak, total * shrink + weight.sum(1), acc * shrink[:, None] + mixed

    zero = jnp.zeros(tile.q_tile, jnp.float32)
    state = (zero - jnp.inf, zero, jnp.zeros(q.shape, jnp.float32))
    peak, total, acc = _walk(counts_ref, 1, visit, state)
    # Padding queries see nothing; they get 0 and not 0 / 0.
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    _store(out_ref, acc / total[:, None], tile)
    log_total_ref[...] = jnp.where(seen, peak, 0.0) + jnp.log2(total)


def dq_kernel(
    inner_ref,
    counts_ref,
    q_start_ref,
    end_ref,
    bounds_refs,
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    log_total_ref,
    mean_grad_ref,
    dq_ref,
    *,
    tile: Tile,
):
    """Gradient of one query block, from its live key blocks."""
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    query = _queries(q_start_ref, block, tile)[:, None]
    q, d_out = (_load(ref, (slice(None),), tile) for ref in (q_ref, d_out_ref))
    log_total, mean_grad = log_total_ref[...][:, None], mean_grad_ref[...][:, None]

    def visit(step, dq, masked: bool):
        keys = _slice(inner_ref[step], tile.k_tile)
        k = _load(k_ref, (keys,), tile)
        score = _dot(q, k, trans_b=True) * (tile.scale * _LOG2_E)
        if masked:
            key = _indices(inner_ref[step], tile.k_tile)[None, :]
            visible = _visible(query, key, keys, end_ref, bounds_refs, 0)
            score = jnp.where(visible, score, -jnp.inf)
        weight = jnp.exp2(score - log_total)
        d_weight = _dot(d_out, _load(v_ref, (keys,), tile), trans_b=True)
        d_score = weight * (d_weight - mean_grad)
        return dq + _dot(d_score.astype(k.dtype), k)

    dq = _walk(counts_ref, 1, visit, jnp.zeros(q.shape, jnp.float32))
    _store(dq_ref, dq * tile.scale, tile)


def dkv_kernel(
    inner_ref,
    counts_ref,
    q_start_ref,
    end_ref,
    bounds_refs,
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    log_total_ref,
    mean_grad_ref,
    dk_ref,
    dv_ref,
    *,
    tile: Tile,
):
    """Gradients of one block of keys and values, from its live query blocks in all heads.

    Tiles are transposed, keys by queries, so that the products need no transposed accumulator.
    """
    block = pl.program_id(0)
    keys = _slice(block, tile.k_tile)
    key = _indices(block, tile.k_tile)[:, None]
    k, v = (_load(ref, (slice(None),), tile) for ref in (k_ref, v_ref))

    def visit(step, grads, masked: bool):
        dk, dv = grads
        # One loop over blocks and heads of the group, since Triton pipelines innermost loops.
        index, head = jax.lax.div(step, tile.group), jax.lax.rem(step, tile.group)
        queries = _slice(inner_ref[index], tile.q_tile)
        q, d_out = (_load(ref, (queries, head), tile) for ref in (q_ref, d_out_ref))
        score = _dot(k, q, trans_b=True) * (tile.scale * _LOG2_E)
        if masked:
            query = _queries(q_start_ref, inner_ref[index], tile)[None, :]
            visible = _visible(query, key, keys, end_ref, bounds_refs, 1)
            score = jnp.where(visible, score, -jnp.inf)
        weight = jnp.exp2(score - log_total_ref[head, queries][None, :])
        dv += _dot(weight.astype(d_out.dtype), d_out)
        d_weight = _dot(v, d_out, trans_b=True)
        d_score = weight * (d_weight - mean_grad_ref[head, queries][None, :])
        return dk + _dot(d_score.astype(q.dtype), q), dv

    zero = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _walk(counts_ref, tile.group, visit, (zero, zero))
    _store(dk_ref, dk * tile.scale, tile)
    _store(dv_ref, dv, tile)


def _walk(counts_ref, group: int, visit: Callable[..., Any], state: Any) -> Any:
    """Visits the full tiles without a mask and the others with it, each `group` times."""
    full, live = counts_ref[0] * group, counts_ref[1] * group
    state = jax.lax.fori_loop(0, full, lambda step, state: visit(step, state, False), state)
    return jax.lax.fori_loop(full, live, lambda step, state: visit(step, state, True), state)


def _slice(block: Int32[Array, ""], tile: int):
    return pl.ds(block * tile, tile)


def _indices(block: Int32[Array, ""], tile: int) -> Int32[Array, "tile"]:
    return block * tile + jnp.arange(tile, dtype=jnp.int32)


def _queries(q_start_ref, block: Int32[Array, ""], tile: Tile) -> Int32[Array, "q_tile"]:
    """Index in the row of each query of a block; -1, which is before every key, for padding."""
    local = _indices(block, tile.q_tile)
    return jnp.where(local < tile.q_len, q_start_ref[0] + local, -1)


def _visible(query, key, keys, end_ref, bounds_refs, axis: int) -> Bool[Array, "m n"]:
    """Visible pairs of one tile, whose keys vary along the axis that is not `axis`."""
    visible = (key <= query) & (query < jnp.expand_dims(end_ref[keys], axis))
    for start_ref, stop_ref in bounds_refs:
        start, stop = (jnp.expand_dims(ref[keys], axis) for ref in (start_ref, stop_ref))
        visible &= (query < start) | (query >= stop)
    return visible


def _dot(
    a: Float[Array, "m inner"], b: Float[Array, "..."], trans_b: bool = False
) -> Float32[Array, "m n"]:
    """A product with float32 accumulation; of float32 inputs in true float32, never in TF32."""
    exact = a.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return plgpu.dot(a, b, trans_b=trans_b, precision=precision)


def _within(width: int, tile: Tile) -> Bool[Array, "1 width"] | None:
    """Mask of the head dimension where it is no power of two."""
    return None if width == tile.dim else (jnp.arange(width) < tile.dim)[None, :]


def _load(ref, index: tuple[Any, ...], tile: Tile) -> Float[Array, "n width"]:
    mask = _within(ref.shape[-1], tile)
    ref = ref.at[(*index, slice(None))]
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=0.0)


def _store(ref, value: Float32[Array, "n width"], tile: Tile) -> None:
    plgpu.store(ref, value.astype(ref.dtype), mask=_within(ref.shape[-1], tile))
