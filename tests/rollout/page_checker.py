"""Who holds which pages, checked after the fact."""

import numpy as np

from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.pages import PageTable
from tw_jax.rollout.program import Program
from tw_jax.rollout.state import EngineState


def holders(table: PageTable) -> np.ndarray:
    """How many lines hold each page, counted one by one: `[columns, pages]`."""
    pages, held = np.asarray(table.pages), np.asarray(table.held)
    count = np.zeros(table.references.shape, int)
    for line in range(len(pages)):
        for column in range(held[line]):
            count[column, pages[line, column]] += 1
    return count


def check_pages(program: Program, state: EngineState) -> None:
    """Every page has as many references as holders, and only what lives holds any."""
    table, rows = state.pages, state.rows
    np.testing.assert_array_equal(np.asarray(table.references), holders(table))
    held, live = np.asarray(table.held)[: program.rows], np.asarray(rows.live)
    assert (held[~live] == 0).all(), "a dead row holds pages"
    # Room for what is cached; a row that waits to share has nothing yet.
    cached = np.asarray(rows.n_kv)
    assert (held * program.layout.page_size >= cached)[live].all(), "tokens without a page"
    waits = live & (np.asarray(rows.source) >= 0)
    assert (held[waits] == 0).all() and (cached[waits] == 0).all()
    assert (np.asarray(rows.source)[~live] == -1).all(), "a dead row waits to share"


def check_idle_pages(engine: RolloutEngine) -> None:
    """Between sessions nothing lives, and only kept prefixes hold pages."""
    assert engine.state is not None
    check_pages(engine.program, engine.state)
    assert not np.asarray(engine.state.rows.live).any(), "a row leaked"
    assert (np.asarray(engine.state.pages.held)[: engine.program.rows] == 0).all()
