"""Keys and values in pages that lie in columns: the memory of decoding where there is no kernel.

A page holds `page_size` positions of one line (a batch row, or a prefix that is kept). Column j is
one array with the j-th pages of all lines, as many as there are lines, so there is always a page
for a line that wants one. A page table says which page of each column a line reads; lines may
share pages.

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
