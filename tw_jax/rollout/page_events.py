"""Rows get pages, share them and give them back, step by step inside the jitted loop."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from tw_jax.kernels.column_cache import copy_page
from tw_jax.rollout.pages import grow, release, share
from tw_jax.rollout.program import Program
from tw_jax.rollout.state import EngineState


def assign_pages(program: Program, state: EngineState) -> EngineState:
    """Gives every row the pages of its known tokens: this step may write them."""
    page_size = program.layout.page_size

    def short(state: EngineState) -> Bool[Array, "rows"]:
        rows = state.rows
        held = state.pages.held[: program.rows]
        return rows.live & (rows.source < 0) & (held * page_size < rows.n_known)

    # The cache takes no part: kept out of the loop, it cannot be copied by it.
    cache = state.cache
    state = lax.while_loop(
        lambda state: short(state).any(),
        lambda state: replace(
            state, pages=grow(state.pages, jnp.argmax(short(state)), program.rows)
        ),
        replace(state, cache=None),
    )
    return replace(state, cache=cache)


def release_pages(program: Program, state: EngineState) -> EngineState:
    """Takes the pages of rows that have ended; who waited to share them goes on by itself."""
    ended = ~state.rows.live & (state.pages.held[: program.rows] > 0)
    lines = jnp.pad(ended, (0, program.layout.kept))
    pages = lax.cond(ended.any(), lambda p: release(p, lines), lambda p: p, state.pages)
    rows = state.rows
    gone = (rows.source < program.rows) & ~rows.live[jnp.minimum(rows.source, program.rows - 1)]
    gone |= ~rows.live  # a thread may get this row next, and threads wait for nobody
    return replace(state, pages=pages, rows=replace(rows, source=jnp.where(gone, -1, rows.source)))


def share_line(
    program: Program,
    state: EngineState,
    source: Int32[Array, ""],
    target: Int32[Array, ""],
    length: Int32[Array, ""],
) -> EngineState:
    """Lets a line that holds nothing begin with `length` positions of another.

    Full pages are shared. A partial last page is copied, since the target will write into it.
    """
    full = length // program.layout.page_size
    partial = length % program.layout.page_size > 0
    pages = share(state.pages, source, target, full)
    own = grow(pages, target, program.rows)
    pages = jax.tree.map(lambda a, b: jnp.where(partial, a, b), own, pages)
    column = jnp.where(partial, full, program.layout.columns)
    at = jnp.minimum(full, program.layout.columns - 1)
    cache = copy_page(state.cache, column, pages.pages[source, at], pages.pages[target, at])
    return replace(state, pages=pages, cache=cache)


def adopt_prefixes(program: Program, state: EngineState) -> EngineState:
    """Rows that wait to share the beginning of another line do so when it is there.

    At the beginning of a step, before anything of it is read: a page that is copied later might be
    written before the last layer is done reading, and XLA would copy the cache to allow that.
    """

    def ready(state: EngineState) -> Bool[Array, "rows"]:
        rows = state.rows
        there = rows.n_kv[jnp.minimum(rows.source, program.rows - 1)]
        kept = rows.source >= program.rows  # a kept prefix is there already
        return rows.live & (rows.source >= 0) & (kept | (there >= rows.source_len))

    def adopt(state: EngineState) -> EngineState:
        row = jnp.argmax(ready(state))
        source, length = state.rows.source[row], state.rows.source_len[row]
        state = share_line(program, state, source, row, length)
        return replace(state, rows=state.rows.put(row, n_kv=length, source=-1))

    return lax.while_loop(lambda state: ready(state).any(), adopt, state)
