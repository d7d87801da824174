"""Attention of decoding over the pages of a `column_cache`.

Most rows read the page at their own index. A column in which all rows do is read where it lies,
one that has shared pages is gathered first, and one behind the end of the longest row is not read
at all; which, is decided for each column in each step. The gather alone triples the memory
traffic, and decoding on CPU is bound by it (a pool with all pages in one array, always gathered:
2.5 times the time of the whole attention, measured). Where only the first few rows are live, what
they read is copied either way, shared or not.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from tw_jax.kernels.column_cache import ColumnCache, read_pages

# Finite, so that a row with nothing visible gives no NaN: its highest score then is the floor, far
# above the masked ones, whose weights are 0.
_MASKED, _FLOOR = -1e30, -1e29
# How a column is read.
_SKIP, _IN_PLACE, _GATHER = range(3)
_FEW_COLUMNS = 4

# Partial softmax over one column: highest score, sum of weights, weighted values. The queries of a
# row and the query heads that share a key head are the rows of one product.
_Partial = tuple[
    Float32[Array, "rows kv_heads queries"],
    Float32[Array, "rows kv_heads queries"],
    Float32[Array, "rows kv_heads queries dim"],
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """How the columns are read, for all layers of a step.

    Attributes:
      modes: of each column.
      enough: index in `front_counts` of the number of leading columns to read.
      in_place: all of them are read in place.
    """

    modes: Int32[Array, "columns"]
    enough: Int32[Array, ""]
    in_place: Bool[Array, ""]


def plan_reads(
    table: Int32[Array, "rows columns"],
    lengths: Int32[Array, "rows"],
    page_size: int,
    *,
    same_bits: bool = False,
) -> ReadPlan:
    """Plans a step of `attend_rows`.

    Args:
      table: the pages of each row, row i of the batch being line i.
      lengths: positions that each row will read; 0 for rows that rest.
      page_size: positions per page.
      same_bits: give a row's result the same bits whatever the other rows are and in whatever pages
        they lie; slower where no pages are shared.
    """
    rows, columns = table.shape
    reads = lengths[:, None] > page_size * jnp.arange(columns)
    own = table == jnp.arange(rows)[:, None]
    in_place = (own | ~reads).all(axis=0)
    read = reads.any(axis=0)
    modes = jnp.where(read, jnp.where(in_place, _IN_PLACE, _GATHER), _SKIP)
    enough = jnp.searchsorted(jnp.array(front_counts(columns)), read.sum()).astype(jnp.int32)
    return ReadPlan(modes, enough, in_place.all() & read.any() & (not same_bits))


def front_counts(columns: int) -> tuple[int, ...]:
    """Numbers of leading columns that are read at once: few, since each is compiled by itself."""
    if columns <= _FEW_COLUMNS:
        return tuple(range(1, columns + 1))
    counts = [1]
    while 2 * counts[-1] < columns:
        counts.append(2 * counts[-1])
    return (*counts, columns)


def attend_rows(
    q: Float[Array, "rows heads dim"],
    cache: ColumnCache,
    layer: int,
    table: Int32[Array, "rows columns"],
    positions: Int32[Array, "rows"],
    plan: ReadPlan,
) -> Float[Array, "rows heads dim"]:
    """One query per row over its line, positions up to and including its own.

    Args:
      q: queries, unscaled.
      cache: holds the queries' own keys and values already.
      layer: which layer's part of the cache.
      table: the pages of each row.
      positions: position of each query.
      plan: `plan_reads` of the table, that of all rows if these are the first ones only.
    """
    keys, values = cache.keys[layer], cache.values[layer]
    rows, kv_heads, _, page_size = keys[0].shape
    grouped = _grouped(q[:, None], kv_heads, keys[0].dtype)
    end = positions[:, None]

    def gathered(index: int):
        return read_pages(cache, layer, index, table[:, index])

    def column(index: int) -> _Partial:
        def in_place():
            return _attend_page(grouped, keys[index], values[index], end - index * page_size)

        def gather():
            return _attend_page(grouped, *gathered(index), end - index * page_size)

        def skip():
            return _nothing(grouped)

        return lax.switch(plan.modes[index], [skip, in_place, gather])

    def column_by_column():
        return _merged([column(index) for index in range(len(keys))])

    def at_once(read, count: int):
        def attend():
            k, v = zip(*map(read, range(count)), strict=True)
            return _attend_pages(grouped, k, v, end)

        return attend

    counts = front_counts(len(keys))
    if len(q) < rows:
        # The first rows of a column are a copy of it, like any others.
        mixed = lax.switch(plan.enough, [at_once(gathered, count) for count in counts])
    else:
        own = [at_once(lambda index: (keys[index], values[index]), count) for count in counts]
        chosen = jnp.where(plan.in_place, plan.enough + 1, 0)
        mixed = lax.switch(chosen, [column_by_column, *own])
    return _ungrouped(mixed, q[:, None])[:, 0]


def attend_chunks(
    q: Float[Array, "rows len heads dim"],
    cache: ColumnCache,
    layer: int,
    table: Int32[Array, "rows columns"],
    positions: Int32[Array, "rows len"],
    longest: Int32[Array, ""],
) -> Float[Array, "rows len heads dim"]:
    """A run of queries in each of a few lines, every one up to its own position.

    The products are in the dtype of the queries: arithmetic binds them, not the memory traffic.

    Args:
      q: queries, unscaled.
      cache: holds the queries' own keys and values already.
      layer: which layer's part of the cache.
      table: the pages of each row.
      positions: position of each query.
      longest: positions that are read at most; columns behind it are skipped.
    """
    keys = cache.keys[layer]
    page_size = keys[0].shape[3]
    grouped = _grouped(q, keys[0].shape[1], q.dtype)
    parts = []
    for index in range(len(keys)):

        def gather(index=index):
            k, v = (x.astype(q.dtype) for x in read_pages(cache, layer, index, table[:, index]))
            return _attend_page(grouped, k, v, positions - index * page_size)

        def skip():
            return _nothing(grouped)

        parts.append(lax.cond(longest > index * page_size, gather, skip))
    return _ungrouped(_merged(parts), q)


def _grouped(
    q: Float[Array, "rows len heads dim"], kv_heads: int, dtype
) -> Float[Array, "rows kv_heads queries dim"]:
    rows, length, heads, dim = q.shape
    q = q.reshape(rows, length, kv_heads, heads // kv_heads, dim).swapaxes(1, 2)
    return q.reshape(rows, kv_heads, -1, dim).astype(dtype)


def _nothing(grouped: Float[Array, "rows kv_heads queries dim"]) -> _Partial:
    """What a column adds that nobody sees; the same bits as attending to it."""
    total = jnp.zeros(grouped.shape[:3], jnp.float32)
    return total + _FLOOR, total, jnp.zeros(grouped.shape, jnp.float32)


def _attend_page(
    grouped: Float[Array, "rows kv_heads queries dim"],
    keys: Float[Array, "rows kv_heads dim page"],
    values: Float[Array, "rows kv_heads page dim"],
    end: Int32[Array, "rows len"],
) -> _Partial:
    """Softmax over one page, up to and including `end`; scores and softmax in float32."""
    score = _masked(_products(grouped, keys), grouped, end)
    highest = jnp.maximum(score.max(axis=-1), _FLOOR)
    weight = jnp.exp(score - highest[..., None])
    return highest, weight.sum(axis=-1), _mix(weight, values)


def _attend_pages(
    grouped: Float[Array, "rows kv_heads queries dim"],
    keys: Sequence[Float[Array, "rows kv_heads dim page"]],
    values: Sequence[Float[Array, "rows kv_heads page dim"]],
    end: Int32[Array, "rows len"],
) -> Float32[Array, "rows kv_heads queries dim"]:
    """Softmax over the first pages of a line, at once; every row must see something.

    The scores are small beside the pages: a copy of them costs less than a softmax in parts.
    """
    score = _masked(jnp.concatenate([_products(grouped, k) for k in keys], axis=-1), grouped, end)
    weight = jnp.exp(score - score.max(axis=-1, keepdims=True))
    parts = jnp.split(weight, len(keys), axis=-1)
    mixed = sum(_mix(part, v) for part, v in zip(parts, values, strict=True))
    return mixed / weight.sum(axis=-1, keepdims=True)


def _products(
    grouped: Float[Array, "rows kv_heads queries dim"],
    keys: Float[Array, "rows kv_heads dim page"],
) -> Float32[Array, "rows kv_heads queries page"]:
    return jnp.einsum("rkqd,rkds->rkqs", grouped, keys, preferred_element_type=jnp.float32)


def _masked(
    products: Float32[Array, "rows kv_heads queries places"],
    grouped: Float[Array, "rows kv_heads queries dim"],
    end: Int32[Array, "rows len"],
) -> Float32[Array, "rows kv_heads queries places"]:
    """Scores of the places up to and including `end`."""
    # Scaled after the product, as in training: rounding then agrees between the two.
    score = products * grouped.shape[-1] ** -0.5
    end = jnp.repeat(end, grouped.shape[2] // end.shape[1], axis=1)
    visible = jnp.arange(products.shape[3]) <= end[:, None, :, None]
    return jnp.where(visible, score, _MASKED)


def _mix(
    weight: Float32[Array, "rows kv_heads queries page"],
    values: Float[Array, "rows kv_heads page dim"],
) -> Float32[Array, "rows kv_heads queries dim"]:
    weight = weight.astype(values.dtype)
    return jnp.einsum("rkqs,rksd->rkqd", weight, values, preferred_element_type=jnp.float32)


def _merged(parts: Sequence[_Partial]) -> Float32[Array, "rows kv_heads queries dim"]:
    """The softmax over all columns, from those over each."""
    highest = functools.reduce(jnp.maximum, [part[0] for part in parts])
    total, mixed = jnp.zeros_like(highest), jnp.zeros_like(parts[0][2])
    for peak, weight, value in parts:
        shrink = jnp.exp(peak - highest)
        total += weight * shrink
        mixed += value * shrink[..., None]
    return mixed / jnp.where(total > 0, total, 1.0)[..., None]


def _ungrouped(
    mixed: Float32[Array, "rows kv_heads queries dim"], q: Float[Array, "rows len heads dim"]
) -> Float[Array, "rows len heads dim"]:
    rows, length, heads, dim = q.shape
    kv_heads = mixed.shape[1]
    mixed = mixed.reshape(rows, kv_heads, length, heads // kv_heads, dim).swapaxes(1, 2)
    return mixed.reshape(q.shape).astype(q.dtype)
