"""Which pages of the cache each line holds: taken, shared and released inside the jitted loop.

A line is a batch row, or a prefix that is kept for later requests. Its j-th page lies in column j
of the cache (`tw_jax.kernels.column_cache`). A column has as many pages for rows as there are rows
and a row holds at most one of them, so a page is always free for a row that wants one: nothing has
to be reserved, and nothing can deadlock. A page is free when nobody refers to it. The pages of kept
prefixes are their own; rows share them but do not write to them.
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


def grow(table: PageTable, row: Scalar, rows: int) -> PageTable:
    """Gives a row its next page: the one at its own index if that is free, else any.

    Args:
      table: the table.
      row: the row.
      rows: rows of the batch.
    """
    column = table.held[row]
    references = table.references[column]
    page = jnp.where(references[row] == 0, row, jnp.argmin(references[:rows])).astype(jnp.int32)
    return PageTable(
        pages=table.pages.at[row, column].set(page),
        held=table.held.at[row].add(1),
        references=table.references.at[column, page].set(1),
    )


def keep(table: PageTable, line: Scalar, count: Scalar) -> tuple[PageTable, Bool[Array, ""]]:
    """Gives a kept prefix the first `count` pages at its own index, in place of what it had.

    Returns:
      The table, and whether it was done: not while a row shares what it had.
    """
    columns = jnp.arange(table.pages.shape[1])
    own = table.references[:, line]
    done = (own == (columns < table.held[line])).all()
    kept = PageTable(
        pages=table.pages,
        held=table.held.at[line].set(count),
        references=table.references.at[:, line].set(columns < count),
    )
    return jax.tree.map(lambda a, b: jnp.where(done, a, b), kept, table), done


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
