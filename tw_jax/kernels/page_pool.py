"""Key/value pages of all layers: the memory that paged attention reads.

The pages of all layers are one flat array, `[layers * pages, page_size, 2 * kv_heads, dim]`, and a
layer's pages are found by an offset added to their indices. Were the array stacked by layer, the
slice of one layer would be copied out and back in every layer of every step. Keys lie at the even
and values at the odd indices of the head axis, the order that JAX's ragged paged attention for TPU
expects.

A decoding loop stays free of copies of the pool if every layer first writes its keys and values
and then attends over the pool, its own token included: a write that no later read depends on may
be scheduled before that read, and XLA then keeps the old pool.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagePool:
    """Pages of all layers.

    Attributes:
      pages: layer by layer; keys at even and values at odd indices of the third axis.
      layers: number of layers.
    """

    pages: Float[Array, "layers_times_pages page_size kv_heads_times_two dim"]
    layers: int = dataclasses.field(metadata={"static": True})

    @property
    def pages_per_layer(self) -> int:
        """Pages that a row may be given; every layer has a page of each index."""
        return self.pages.shape[0] // self.layers

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.pages.shape[1]

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.pages.shape[2] // 2


@dataclasses.dataclass(frozen=True)
class PagedShape:
    """Everything about one call of paged attention that the choice of a backend depends on.

    Attributes:
      rows: rows of the page table.
      run: queries per row, 1 when decoding.
      heads: query heads.
      kv_heads: key/value heads.
      head_dim: width of one head.
      page_size: tokens per page.
      pages_per_row: entries of a row's page list.
      dtype: of the pool; queries are rounded to it.
    """

    rows: int
    run: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages_per_row: int
    dtype: jnp.dtype

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads


def paged_shape(
    q: Float[Array, "tokens heads dim"],
    pool: PagePool,
    page_indices: Int32[Array, "rows pages_per_row"],
) -> PagedShape:
    """The static shape of a call of `paged_attention` with these arguments.

    Raises:
      ValueError: arguments that do not fit each other.
    """
    tokens, heads, dim = q.shape
    rows, pages_per_row = page_indices.shape
    if tokens % rows:
        raise ValueError(f"{tokens} queries are no whole number for each of {rows} rows")
    if heads % pool.kv_heads:
        raise ValueError(f"{heads} query heads do not group over {pool.kv_heads} key heads")
    if dim != pool.pages.shape[3]:
        raise ValueError(f"queries are {dim} wide, keys {pool.pages.shape[3]}")
    return PagedShape(
        rows=rows,
        run=tokens // rows,
        heads=heads,
        kv_heads=pool.kv_heads,
        head_dim=dim,
        page_size=pool.page_size,
        pages_per_row=pages_per_row,
        dtype=pool.pages.dtype,
    )


def empty_pool(
    layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype
) -> PagePool:
    """A pool of zeros with `pages` pages per layer.

    Raises:
      ValueError: `page_size` is no power of two.
    """
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"page_size={page_size} is not a power of two")
    return PagePool(jnp.zeros((layers * pages, page_size, 2 * kv_heads, head_dim), dtype), layers)


def write_tokens(
    pool: PagePool,
    layer: int | Int32[Array, ""],
    page: Int32[Array, "*b"],
    offset: Int32[Array, "*b"],
    valid: Bool[Array, "*b"],
    k: Float[Array, "*b kv_heads dim"],
    v: Float[Array, "*b kv_heads dim"],
) -> PagePool:
    """Writes one layer's keys and values of tokens, in place where the pool may be overwritten.

    Args:
      pool: the pool.
      layer: which layer's pages.
      page: page of each token.
      offset: place of each token in its page.
      valid: tokens to write; the others are dropped, and so are those with a page or an offset
        that does not exist. No two valid tokens may share a place.
      k: keys.
      v: values.
    """
    pages = pool.pages_per_layer
    valid = valid & (page >= 0) & (page < pages) & (offset >= 0) & (offset < pool.page_size)
    index = jnp.where(valid, layer * pages + page, pool.pages.shape[0])
    interleaved = jnp.stack([k, v], axis=-2).reshape(*k.shape[:-2], *pool.pages.shape[2:])
    written = pool.pages.at[index, offset].set(interleaved.astype(pool.pages.dtype), mode="drop")
    return dataclasses.replace(pool, pages=written)


def copy_page(
    pool: PagePool,
    source: Int32[Array, "*b"],
    target: Int32[Array, "*b"],
    valid: Bool[Array, "*b"] | bool = True,
) -> PagePool:
    """Copies pages in all layers: what a thread does with the partial page it starts from.

    In a decoding loop, whether or what to copy must follow from what the step's attention
    returned. A copy that depends on none of it may be scheduled before the last layer's reads, and
    costs two copies of the whole pool.

    Args:
      pool: the pool.
      source: pages to read.
      target: pages to overwrite; all different, and none of them a source of the same call.
      valid: copies to make.
    """
    pages = pool.pages_per_layer
    first = pages * jnp.arange(pool.layers).reshape(-1, *(1 for _ in jnp.shape(source)))
    index = jnp.where(valid & (target >= 0) & (target < pages), target, pool.pages.shape[0])
    copied = pool.pages.at[first + index].set(pool.pages[first + source], mode="drop")
    return dataclasses.replace(pool, pages=copied)
