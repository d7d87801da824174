"""Keys and values in pages that lie in columns: the memory of decoding where there is no kernel.

A page holds `page_size` positions of one line (a batch row, or a prefix that is kept). Column j is
one array with the j-th pages of all lines, as many as there are lines, so there is always a page
for a line that wants one. A page table says which page of each column a line reads; lines may
share pages.

Most lines read the page at their own index. A column in which all lines do is read where it lies,
one that has shared pages is gathered first, and one behind the end of the longest row is not read
at all; which, is decided for each column in each step. The gather alone triples the memory
traffic, and decoding on CPU is bound by it (a pool with all pages in one array, always gathered:
2.5 times the time of the whole attention, measured).

Every layer first writes the new keys and values, then attends over the cache, itself included.
That order is what keeps a decoding loop free of copies of the whole cache: were the writes left
to the end, XLA could schedule them before the last read and would have to keep the old cache.

Keys are stored `[dim, position]` and values `[position, dim]`, the order in which the two products
of attention run through memory. A column is an array of its own since XLA on CPU would copy a
slice of a larger one before each product.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

_MASKED = -1e30  # finite, so that a row with nothing visible gives no NaN
# How a column is read.
_SKIP, _IN_PLACE, _GATHER = range(3)

# Partial softmax over one column: highest score, sum of weights, weighted values. The queries of a
# row and the query heads that share a key head are the rows of one product.
_Partial = tuple[
    Float32[Array, "rows kv_heads queries"],
    Float32[Array, "rows kv_heads queries"],
    Float32[Array, "rows kv_heads queries dim"],
]


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Static shape of a cache.

    Attributes:
      layers: transformer layers.
      lines: lines of the page table, and pages of each column.
      columns: most pages of a line.
      page_size: positions per page.
    """

    layers: int
    lines: int
    columns: int
    page_size: int


def cache_layout(layers: int, lines: int, context_len: int, page_size: int) -> CacheLayout:
    """Layout whose lines hold at least `context_len` positions."""
    return CacheLayout(layers, lines, -(-context_len // page_size), page_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ColumnCache:
    """Keys and values of all layers, as one array per layer and column.

    Attributes:
      keys: per layer, per column `[lines, kv_heads, dim, page_size]`.
      values: per layer, per column `[lines, kv_heads, page_size, dim]`.
    """

    keys: tuple[tuple[Float[Array, "lines kv_heads dim page"], ...], ...]
    values: tuple[tuple[Float[Array, "lines kv_heads page dim"], ...], ...]


def empty_cache(layout: CacheLayout, kv_heads: int, head_dim: int, dtype) -> ColumnCache:
    """A cache of zeros."""

    def columns(*shape: int):
        return tuple(
            jnp.zeros((layout.lines, kv_heads, *shape), dtype) for _ in range(layout.columns)
        )

    return ColumnCache(
        keys=tuple(columns(head_dim, layout.page_size) for _ in range(layout.layers)),
        values=tuple(columns(layout.page_size, head_dim) for _ in range(layout.layers)),
    )


def write_tokens(
    cache: ColumnCache,
    layer: int,
    table: Int32[Array, "*b columns"],
    positions: Int32[Array, "*b"],
    valid: Bool[Array, "*b"],
    k: Float[Array, "*b kv_heads dim"],
    v: Float[Array, "*b kv_heads dim"],
    *,
    few_columns: bool = False,
) -> ColumnCache:
    """Writes one layer's keys and values of tokens; those not `valid` are dropped.

    Args:
      cache: the cache.
      layer: which layer's part of it.
      table: the pages of each token's line.
      positions: place of each token in its line. No two valid tokens may share page and place.
      valid: tokens to write.
      k: keys.
      v: values.
      few_columns: skip columns in which nothing is written: a scatter takes as long for tokens that
        it drops. Only where attention over this layer follows; XLA would copy the cache else.
    """
    keys, values = list(cache.keys[layer]), list(cache.values[layer])
    lines, _, _, page_size = keys[0].shape
    column, offset = positions // page_size, positions % page_size
    k, v = k.astype(keys[0].dtype), v.astype(keys[0].dtype)
    # Whoever sees a token that is not finite gets NaN through its key. A value would reach those
    # who do not see it, such as the next owner of the page: 0 * NaN is NaN.
    finite = jnp.isfinite(v).all(axis=-1, keepdims=True)
    k, v = jnp.where(finite, k, jnp.nan), jnp.where(finite, v, 0)
    for index in range(len(keys)):
        here = valid & (column == index)
        page = jnp.where(here, table[..., index], lines)

        def write(key, value, page=page):
            return (
                key.at[page, :, :, offset].set(k, mode="drop"),
                value.at[page, :, offset].set(v, mode="drop"),
            )

        if few_columns:
            keys[index], values[index] = lax.cond(
                here.any(), write, lambda key, value: (key, value), keys[index], values[index]
            )
        else:
            keys[index], values[index] = write(keys[index], values[index])
    return ColumnCache(
        keys=(*cache.keys[:layer], tuple(keys), *cache.keys[layer + 1 :]),
        values=(*cache.values[:layer], tuple(values), *cache.values[layer + 1 :]),
    )


def copy_page(
    cache: ColumnCache,
    column: Int32[Array, ""],
    source: Int32[Array, ""],
    target: Int32[Array, ""],
) -> ColumnCache:
    """Copies a page of one column in all layers; a column that does not exist copies nothing."""

    def copied(arrays):
        return tuple(
            # A write that is dropped, not a branch: a branch that writes would copy the column.
            array.at[jnp.where(column == index, target, len(array))].set(array[source], mode="drop")
            for index, array in enumerate(arrays)
        )

    return ColumnCache(
        keys=tuple(copied(layer) for layer in cache.keys),
        values=tuple(copied(layer) for layer in cache.values),
    )


def copy_tokens(
    cache: ColumnCache,
    source: Int32[Array, "columns"],
    source_at: Int32[Array, "len"],
    target: Int32[Array, "columns"],
    target_at: Int32[Array, "len"],
    valid: Bool[Array, "len"],
) -> ColumnCache:
    """Copies tokens from line to line in all layers, as they are.

    Args:
      cache: the cache.
      source: pages of the line to read.
      source_at: places in it.
      target: pages of the line to write; they hold nothing of what is read.
      target_at: places in it.
      valid: tokens to copy.
    """
    page_size = cache.keys[0][0].shape[3]
    column, offset = source_at // page_size, source_at % page_size
    pages = jnp.broadcast_to(target, (len(target_at), len(target)))
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        k, v = 0.0, 0.0
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
            here = (column == index)[:, None, None]
            k = jnp.where(here, key[source[index], :, :, offset], k)
            v = jnp.where(here, value[source[index], :, offset], v)
        cache = write_tokens(cache, layer, pages, target_at, valid, jnp.asarray(k), jnp.asarray(v))
    return cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """How the columns are read, for all layers of a step.

    Attributes:
      modes: of each column.
      in_place: number of leading columns that are read, if all of them are read in place; else 0.
    """

    modes: Int32[Array, "columns"]
    in_place: Int32[Array, ""]


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
    plain = in_place.all() & (not same_bits)
    return ReadPlan(modes, jnp.where(plain, read.sum(), 0))


def in_front(plan: ReadPlan) -> ReadPlan:
    """The plan for some of the rows only: nothing is read in place then."""
    modes = jnp.where(plan.modes == _IN_PLACE, _GATHER, plan.modes)
    return ReadPlan(modes, jnp.zeros_like(plan.in_place))


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
      plan: `plan_reads` of the same table, or `in_front` of it.
    """
    rows = len(q)
    keys, values = cache.keys[layer], cache.values[layer]
    lines, kv_heads, _, page_size = keys[0].shape
    grouped = _grouped(q[:, None], kv_heads, keys[0].dtype)
    ends = [(positions - index * page_size)[:, None] for index in range(len(keys))]
    # A few lines behind the rows are read along, which is cheaper than a copy of the others.
    read = lines if lines <= 2 * rows else rows
    behind = ((0, read - rows), (0, 0), (0, 0), (0, 0))
    all_rows = jnp.pad(grouped, behind)
    all_ends = [jnp.pad(end, behind[:2]) for end in ends]

    def column(index: int) -> _Partial:
        k, v, page = keys[index], values[index], table[:, index]

        def in_place():
            part = _attend_page(all_rows, k[:read], v[:read], all_ends[index])
            return jax.tree.map(lambda x: x[:rows], part)

        def gather():
            return _attend_page(grouped, k[page], v[page], ends[index])

        def skip():
            return _nothing(grouped)

        return lax.switch(plan.modes[index], [skip, in_place, gather])

    def column_by_column():
        return _merged([column(index) for index in range(len(keys))])

    def at_once(count: int):
        def attend():
            k, v = ([x[:read] for x in columns[:count]] for columns in (keys, values))
            return _attend_pages(all_rows, k, v, all_ends[:count])[:rows]

        return attend

    branches = [column_by_column, *(at_once(count + 1) for count in range(len(keys)))]
    mixed = lax.switch(plan.in_place, branches)
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

    Args:
      q: queries, unscaled.
      cache: holds the queries' own keys and values already.
      layer: which layer's part of the cache.
      table: the pages of each row.
      positions: position of each query.
      longest: positions that are read at most; columns behind it are skipped.
    """
    keys, values = cache.keys[layer], cache.values[layer]
    page_size = keys[0].shape[3]
    grouped = _grouped(q, keys[0].shape[1], keys[0].dtype)
    parts = []
    for index, (k, v) in enumerate(zip(keys, values, strict=True)):

        def gather(k=k, v=v, index=index):
            page = table[:, index]
            return _attend_page(grouped, k[page], v[page], positions - index * page_size)

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
    return total + _MASKED, total, jnp.zeros(grouped.shape, jnp.float32)


def _attend_page(
    grouped: Float[Array, "rows kv_heads queries dim"],
    keys: Float[Array, "rows kv_heads dim page"],
    values: Float[Array, "rows kv_heads page dim"],
    end: Int32[Array, "rows len"],
) -> _Partial:
    """Softmax over one page, up to and including `end`; scores and softmax in float32."""
    score, visible = _scores(grouped, keys, end)
    highest = score.max(axis=-1)
    weight = jnp.where(visible, jnp.exp(score - highest[..., None]), 0.0)
    return highest, weight.sum(axis=-1), _mix(weight, values)


def _attend_pages(
    grouped: Float[Array, "rows kv_heads queries dim"],
    keys: Sequence[Float[Array, "rows kv_heads dim page"]],
    values: Sequence[Float[Array, "rows kv_heads page dim"]],
    ends: Sequence[Int32[Array, "rows len"]],
) -> Float32[Array, "rows kv_heads queries dim"]:
    """Softmax over several pages; every row must see something."""
    scores = [_scores(grouped, k, end)[0] for k, end in zip(keys, ends, strict=True)]
    highest = functools.reduce(jnp.maximum, [score.max(axis=-1) for score in scores])
    weights = [jnp.exp(score - highest[..., None]) for score in scores]
    total = sum(weight.sum(axis=-1) for weight in weights)
    mixed = sum(_mix(weight, v) for weight, v in zip(weights, values, strict=True))
    return mixed / jnp.asarray(total)[..., None]


def _scores(
    grouped: Float[Array, "rows kv_heads queries dim"],
    keys: Float[Array, "rows kv_heads dim page"],
    end: Int32[Array, "rows len"],
) -> tuple[Float32[Array, "rows kv_heads queries page"], Bool[Array, "rows 1 queries page"]]:
    """Masked scores, and the mask."""
    score = jnp.einsum("rkqd,rkds->rkqs", grouped, keys, preferred_element_type=jnp.float32)
    # Scaled after the product, as in training: rounding then agrees between the two.
    score = score * grouped.shape[-1] ** -0.5
    end = jnp.repeat(end, grouped.shape[2] // end.shape[1], axis=1)
    visible = jnp.arange(keys.shape[3]) <= end[:, None, :, None]
    return jnp.where(visible, score, _MASKED), visible


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
