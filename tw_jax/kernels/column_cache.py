"""Keys and values in pages that lie in columns: the memory of decoding where there is no kernel.

A page holds `page_size` positions of one line (a batch row, or a prefix that is kept). Column j is
one array with the j-th pages of all rows, as many as there are rows, so there is always a page
for a row that wants one. A page table says which page of each column a line reads; lines may
share pages. Kept prefixes have arrays of their own, so that any number of them costs rows nothing:
their pages are numbered behind those of the rows, and are written only when a prefix is kept.

Every layer first writes the new keys and values, then attends over the cache, itself included.
That order is what keeps a decoding loop free of copies of the whole cache: were the writes left
to the end, XLA could schedule them before the last read and would have to keep the old cache.

Keys are stored `[dim, position]` and values `[position, dim]`, the order in which the two products
of attention run through memory. A column is an array of its own since XLA on CPU would copy a
slice of a larger one before each product.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Static shape of a cache.

    Attributes:
      layers: transformer layers.
      rows: rows of the batch, the first lines of the page table.
      kept: kept prefixes, the other lines.
      columns: most pages of a line.
      page_size: positions per page.
    """

    layers: int
    rows: int
    kept: int
    columns: int
    page_size: int

    @property
    def lines(self) -> int:
        """Lines of the page table, and pages of each column."""
        return self.rows + self.kept


def cache_layout(
    layers: int, rows: int, context_len: int, page_size: int, kept: int = 0
) -> CacheLayout:
    """Layout whose lines hold at least `context_len` positions."""
    return CacheLayout(layers, rows, kept, -(-context_len // page_size), page_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ColumnCache:
    """Keys and values of all layers, as one array per layer and column.

    Attributes:
      keys: of rows, per layer, per column `[rows, kv_heads, dim, page_size]`.
      values: of rows, per layer, per column `[rows, kv_heads, page_size, dim]`.
      kept_keys: of kept prefixes, likewise.
      kept_values: of kept prefixes, likewise.
    """

    keys: tuple[tuple[Float[Array, "rows kv_heads dim page"], ...], ...]
    values: tuple[tuple[Float[Array, "rows kv_heads page dim"], ...], ...]
    kept_keys: tuple[tuple[Float[Array, "kept kv_heads dim page"], ...], ...]
    kept_values: tuple[tuple[Float[Array, "kept kv_heads page dim"], ...], ...]


def empty_cache(layout: CacheLayout, kv_heads: int, head_dim: int, dtype) -> ColumnCache:
    """A cache of zeros."""

    def columns(pages: int, *shape: int):
        column = (jnp.zeros((pages, kv_heads, *shape), dtype) for _ in range(layout.columns))
        return tuple(column)

    def layers(pages: int, *shape: int):
        return tuple(columns(pages, *shape) for _ in range(layout.layers))

    key, value = (head_dim, layout.page_size), (layout.page_size, head_dim)
    return ColumnCache(
        keys=layers(layout.rows, *key),
        values=layers(layout.rows, *value),
        kept_keys=layers(layout.kept, *key),
        kept_values=layers(layout.kept, *value),
    )


def take_pages(
    own: Float[Array, "rows a b c"], kept: Float[Array, "kept a b c"], page: Int32[Array, "*lines"]
) -> Float[Array, "*lines a b c"]:
    """Pages of one column by number: of rows, or behind them of kept prefixes."""
    rows = len(own)

    def of_rows():
        return own[jnp.minimum(page, rows - 1)]

    if not len(kept):
        return of_rows()
    is_kept = (page >= rows)[..., None, None, None]

    def of_both():
        return jnp.where(is_kept, kept[jnp.maximum(page - rows, 0)], of_rows())

    # A branch that reads the column before it is written would make XLA copy it, so none for one
    # page. Taken inside of the branches: one that hands on what was taken outside would copy it.
    return lax.cond(is_kept.any(), of_both, of_rows) if page.ndim else of_both()


def read_pages(
    cache: ColumnCache, layer: int, column: int, page: Int32[Array, "*lines"]
) -> tuple[Float[Array, "*lines kv_heads dim page"], Float[Array, "*lines kv_heads page dim"]]:
    """Keys and values in pages of one column."""
    keys = take_pages(cache.keys[layer][column], cache.kept_keys[layer][column], page)
    values = take_pages(cache.values[layer][column], cache.kept_values[layer][column], page)
    return keys, values


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
      table: the pages of each token's row; those of kept prefixes are not written.
      positions: place of each token in its line. No two valid tokens may share page and place.
      valid: tokens to write.
      k: keys.
      v: values.
      few_columns: skip columns in which nothing is written: a scatter takes as long for tokens that
        it drops. Only where attention over this layer follows; XLA would copy the cache else.
    """
    keys, values = list(cache.keys[layer]), list(cache.values[layer])
    rows, _, _, page_size = keys[0].shape
    column, offset = positions // page_size, positions % page_size
    k, v = k.astype(keys[0].dtype), v.astype(keys[0].dtype)
    # Whoever sees a token that is not finite gets NaN through its key. A value would reach those
    # who do not see it, such as the next owner of the page: 0 * NaN is NaN.
    finite = jnp.isfinite(v).all(axis=-1, keepdims=True)
    k, v = jnp.where(finite, k, jnp.nan), jnp.where(finite, v, 0)
    for index in range(len(keys)):
        here = valid & (column == index)
        page = jnp.where(here, table[..., index], rows)

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
    return dataclasses.replace(
        cache,
        keys=(*cache.keys[:layer], tuple(keys), *cache.keys[layer + 1 :]),
        values=(*cache.values[:layer], tuple(values), *cache.values[layer + 1 :]),
    )


def copy_page(
    cache: ColumnCache,
    column: Int32[Array, ""],
    source: Int32[Array, ""],
    target: Int32[Array, ""],
) -> ColumnCache:
    """Copies a page of one column to a row's in all layers; a column that does not exist: none.

    Args:
      cache: the cache.
      column: its number.
      source: a page of a row or a kept prefix.
      target: a page of a row.
    """

    def copied(arrays, kept):
        return tuple(
            # A write that is dropped, not a branch: a branch that writes would copy the column.
            own.at[jnp.where(column == index, target, len(own))].set(
                take_pages(own, other, source), mode="drop"
            )
            for index, (own, other) in enumerate(zip(arrays, kept, strict=True))
        )

    return dataclasses.replace(
        cache,
        keys=tuple(map(copied, cache.keys, cache.kept_keys)),
        values=tuple(map(copied, cache.values, cache.kept_values)),
    )


def keep_pages(
    cache: ColumnCache,
    pages: Int32[Array, "columns"],
    kept: Int32[Array, ""],
    count: Int32[Array, ""],
) -> ColumnCache:
    """Copies the first pages of a line to those of a kept prefix, in all layers.

    Args:
      cache: the cache.
      pages: of the line.
      kept: number of the prefix.
      count: pages to copy.
    """

    def copied(arrays, kept_arrays):
        return tuple(
            other.at[kept].set(jnp.where(index < count, take_pages(own, other, page), other[kept]))
            for index, (own, other, page) in enumerate(zip(arrays, kept_arrays, pages, strict=True))
        )

    return dataclasses.replace(
        cache,
        kept_keys=tuple(map(copied, cache.keys, cache.kept_keys)),
        kept_values=tuple(map(copied, cache.values, cache.kept_values)),
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
      source: pages of the line to read; those of a row where it is read.
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
