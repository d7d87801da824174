"""What tree attention computes in one tile on a TPU; see `attention_tpu` for the arrays.

Scores of the forward pass and of the queries' gradient are `[group * q_tile, k_tile]`; those of the
keys' gradient are transposed, so that every product contracts the last axis of its left side.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Float32, Int32

# Scores of invisible pairs. A running maximum starts far above them, so that their exponential is
# 0 even for a query that has met no visible key yet.
_MASKED = -1e30
_START = -1e29
_SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class TileOrder:
    """A list of tiles packed into one 32-bit integer each: row, outer block, inner block.

    The list is sorted by these integers: all tiles of one outer block follow each other.

    Attributes:
      q_blocks: query blocks per row.
      k_blocks: key blocks per row.
      by_key: the outer block is the key block; otherwise the query block.
    """

    q_blocks: int
    k_blocks: int
    by_key: bool

    @property
    def _bits(self) -> tuple[int, int]:
        """Of the outer and of the inner block."""
        q, k = (self.q_blocks - 1).bit_length(), (self.k_blocks - 1).bit_length()
        return (k, q) if self.by_key else (q, k)

    def pack(
        self, q_block: Int32[Array, "tiles"], k_block: Int32[Array, "tiles"]
    ) -> Int32[Array, "tiles"]:
        """Packs blocks numbered through the batch.

        No list that fits into scalar memory overflows: 2^18 tiles, of rows that are at most halved
        by the diagonal and twice doubled by rounding up to powers of two.
        """
        row, q, k = q_block // self.q_blocks, q_block % self.q_blocks, k_block % self.k_blocks
        outer, inner = (k, q) if self.by_key else (q, k)
        outer_bits, inner_bits = self._bits
        return (((row << outer_bits) | outer) << inner_bits) | inner

    def split(self, packed: Int32[Array, ""]) -> tuple[Array, Array, Array]:
        """`(row, query block, key block)`, the blocks counted within the row."""
        outer_bits, inner_bits = self._bits
        inner = packed & ((1 << inner_bits) - 1)
        outer = (packed >> inner_bits) & ((1 << outer_bits) - 1)
        row = packed >> (inner_bits + outer_bits)
        return (row, inner, outer) if self.by_key else (row, outer, inner)

    def outer(self, packed: Int32[Array, ""]) -> Int32[Array, ""]:
        """Equal for two tiles if and only if row and outer block are."""
        return packed >> self._bits[1]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the current tile lies.

    Attributes:
      first: it is the first of its outer block.
      last: it is the last of its outer block.
      query: index in the row of its first query.
      key: index in the row of its first key.
    """

    first: Bool[Array, ""]
    last: Bool[Array, ""]
    query: Int32[Array, ""]
    key: Int32[Array, ""]


def _place(order: TileOrder, q_tile: int, k_tile: int, tiles, scalars) -> _Place:
    index, count, q_start = pl.program_id(1), scalars[0], scalars[1]
    packed = tiles[index]
    _, q, k = order.split(packed)
    own = order.outer(packed)
    return _Place(
        first=(index == 0) | (order.outer(tiles[jnp.maximum(index - 1, 0)]) != own),
        last=(index == count - 1) | (order.outer(tiles[jnp.minimum(index + 1, count - 1)]) != own),
        query=q_start + q * q_tile,
        key=k * k_tile,
    )


def _visible(
    bounds: list[Int32[Array, "#q #k"]], query: Int32[Array, "#q #k"], key: Int32[Array, "#q #k"]
) -> Bool[Array, "q k"]:
    """Which queries see which keys; `bounds` as in a span. The axes may change places."""
    end, depth = bounds[0], len(bounds) // 2
    visible = (key <= query) & (query < end)
    for start, stop in zip(bounds[1 : 1 + depth], bounds[1 + depth :], strict=True):
        visible &= (query < start) | (stop <= query)
    return visible


def _queries(place: _Place, q_tile: int, shape: tuple[int, int], axis: int) -> Array:
    """Index in the row of each query; the heads of a group repeat them."""
    return place.query + (jax.lax.broadcasted_iota(jnp.int32, shape, axis) & (q_tile - 1))


def _column(row: Array) -> Array:
    """`[1, n]` as `[n, 1]`."""
    return jnp.broadcast_to(row, (_SUBLANES, row.shape[1])).T[:, :1]


def _dot(
    a: Float[Array, "m inner"], b: Float[Array, "n inner"], *, transposed: bool = True
) -> Float32[Array, "m n"]:
    """`a @ b^T`, or `a @ b`, in float32; not rounded to bfloat16 on the way where it is not."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _mix(weights: Float32[Array, "m n"], values: Float[Array, "n dim"]) -> Float32[Array, "m dim"]:
    """`weights @ values`; weights are rounded to the dtype of the values."""
    return _dot(weights.astype(values.dtype), values, transposed=False)


def _folded(block) -> Float[Array, "gq dim"]:
    """Query heads of a group as rows of one matrix."""
    group, q_tile, dim = block.shape
    return block[...].reshape(group * q_tile, dim)


def forward(
    order: TileOrder,
    q_tile: int,
    k_tile: int,
    tiles,
    scalars,
    q,
    k,
    v,
    span,
    out,
    log_total,
    peak,
    total,
    acc,
) -> None:
    """Online softmax of a query block, one key block at a time."""
    place = _place(order, q_tile, k_tile, tiles, scalars)

    @pl.when(place.first)
    def _():
        peak[...] = jnp.full_like(peak, _START)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    queries, keys = _folded(q), k[...]
    n = queries.shape[0]
    query = _queries(place, q_tile, (n, 1), 0)
    key = place.key + jax.lax.broadcasted_iota(jnp.int32, (1, k_tile), 1)
    bounds = [span[i : i + 1, :] for i in range(span.shape[0])]
    score = _dot(queries, keys) * queries.shape[1] ** -0.5
    score = jnp.where(_visible(bounds, query, key), score, _MASKED)

    old_peak = peak[:, :1]
    new_peak = jnp.maximum(old_peak, score.max(axis=1, keepdims=True))
    weight = jnp.exp(score - new_peak)
    shrink = jnp.exp(old_peak - new_peak)
    new_total = total[:, :1] * shrink + weight.sum(axis=1, keepdims=True)
    peak[...] = jnp.broadcast_to(new_peak, peak.shape)
    total[...] = jnp.broadcast_to(new_total, total.shape)
    acc[...] = acc[...] * shrink + _mix(weight, v[...])

    @pl.when(place.last)
    def _():
        out[...] = (acc[...] / total[:, :1]).reshape(out.shape).astype(out.dtype)
        log_total[...] = (peak[...] + jnp.log(total[...])).T[:1]


def query_gradient(
    order: TileOrder,
    q_tile: int,
    k_tile: int,
    tiles,
    scalars,
    q,
    k,
    v,
    span,
    d_out,
    log_total,
    mean_grad,
    dq,
    acc,
) -> None:
    """Gradient of a query block, summed over its key blocks."""
    place = _place(order, q_tile, k_tile, tiles, scalars)

    @pl.when(place.first)
    def _():
        acc[...] = jnp.zeros_like(acc)

    queries, keys = _folded(q), k[...]
    n, dim = queries.shape
    query = _queries(place, q_tile, (n, 1), 0)
    key = place.key + jax.lax.broadcasted_iota(jnp.int32, (1, k_tile), 1)
    bounds = [span[i : i + 1, :] for i in range(span.shape[0])]
    score = _dot(queries, keys) * dim**-0.5 - _column(log_total[...])
    weight = jnp.exp(jnp.where(_visible(bounds, query, key), score, _MASKED))
    d_score = weight * (_dot(_folded(d_out), v[...]) - _column(mean_grad[...]))
    acc[...] += _mix(d_score, keys)

    @pl.when(place.last)
    def _():
        dq[...] = (acc[...] * dim**-0.5).reshape(dq.shape).astype(dq.dtype)


def key_gradient(
    order: TileOrder,
    q_tile: int,
    k_tile: int,
    tiles,
    scalars,
    q,
    k,
    v,
    span,
    d_out,
    log_total,
    mean_grad,
    _zero_dk,
    _zero_dv,
    dk,
    dv,
    dk_acc,
    dv_acc,
) -> None:
    """Gradients of a block of keys and values, summed over its query blocks and the group."""
    place = _place(order, q_tile, k_tile, tiles, scalars)

    @pl.when(place.first)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    queries, d_outs = _folded(q), _folded(d_out)
    n, dim = queries.shape
    query = _queries(place, q_tile, (1, n), 1)
    key = place.key + jax.lax.broadcasted_iota(jnp.int32, (k_tile, 1), 0)
    bounds = [_column(span[i : i + 1, :]) for i in range(span.shape[0])]
    score = _dot(k[...], queries) * dim**-0.5 - log_total[...]
    weight = jnp.exp(jnp.where(_visible(bounds, query, key), score, _MASKED))
    dv_acc[...] += _mix(weight, d_outs)
    d_score = weight * (_dot(v[...], d_outs) - mean_grad[...])
    dk_acc[...] += _mix(d_score, queries)

    @pl.when(place.last)
    def _():
        dk[...] = (dk_acc[...] * dim**-0.5).astype(dk.dtype)
        dv[...] = dv_acc[...].astype(dv.dtype)
