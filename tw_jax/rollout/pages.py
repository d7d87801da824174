"""Which pages of the cache each line holds: taken, shared and released inside the jitted loop.

A line is a batch row, or a prefix that is kept for later requests. Its j-th page lies in column j
of the cache (`tw_jax.kernels.column_cache`). A column has as many pages as there are lines and a
line holds at most one of them, so a page is always free for a line that wants one: nothing has to
be reserved, and nothing can deadlock. A page is free when nobody refers to it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from tw_jax.kernels.column_cache import CacheLayout

Scalar = Int32[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """The pages of all lines.

    Attributes:
      pages: the j-th page of each line; meaningless from `held` on.
      held: pages of each line.
      references: how many lines hold each page, by column.
    """

    pages: Int32[Array, "lines columns"]
    held: Int32[Array, "lines"]
    references: Int32[Array, "columns pages"]


def new_table(layout: CacheLayout) -> PageTable:
    """A table in which nobody holds anything."""
    own = jnp.broadcast_to(jnp.arange(layout.lines, dtype=jnp.int32)[:, None], (layout.lines, 1))
    return PageTable(
        # A line's own index, so that a row that never held a page counts as lying in its place.
        pages=jnp.tile(own, (1, layout.columns)),
        held=jnp.zeros(layout.lines, jnp.int32),
        references=jnp.zeros((layout.columns, layout.lines), jnp.int32),
    )


def grow(table: PageTable, line: Scalar) -> PageTable:
    """Gives a line its next page: the one at its own index if that is free, else the last free one.

    The last ones lie at the indices of kept prefixes, so no row takes another's.
    """
    column = table.held[line]
    references = table.references[column]
    last_free = len(references) - 1 - jnp.argmin(references[::-1])
    page = jnp.where(references[line] == 0, line, last_free).astype(jnp.int32)
    return PageTable(
        pages=table.pages.at[line, column].set(page),
        held=table.held.at[line].add(1),
        references=table.references.at[column, page].set(1),
    )


def share(table: PageTable, source: Scalar, target: Scalar, count: Scalar) -> PageTable:
    """Gives a line that holds nothing the first `count` pages of another; nothing is copied."""
    columns = jnp.arange(table.pages.shape[1])
    shared = columns < count
    pages = table.pages[source]
    return PageTable(
        pages=table.pages.at[target].set(jnp.where(shared, pages, table.pages[target])),
        held=table.held.at[target].set(count),
        references=table.references.at[columns, pages].add(shared),
    )


def release(table: PageTable, lines: Bool[Array, "lines"]) -> PageTable:
    """Takes all pages from the given lines."""
    count, columns = table.pages.shape
    held = lines[:, None] & (jnp.arange(columns) < table.held[:, None])
    column = jnp.broadcast_to(jnp.arange(columns), (count, columns))
    own = jnp.arange(count, dtype=jnp.int32)[:, None]
    return PageTable(
        pages=jnp.where(lines[:, None], own, table.pages),
        held=jnp.where(lines, 0, table.held),
        references=table.references.at[column, table.pages].add(-held.astype(jnp.int32)),
    )


def pages_in_use(table: PageTable) -> Scalar:
    """Pages that somebody holds; shared ones count once."""
    return (table.references > 0).sum()
