"""Pages against a model in plain sets: any sequence of growing, sharing and releasing."""

import jax
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.rollout.page_checker import holders
from tw_jax.kernels.column_cache import CacheLayout
from tw_jax.rollout.pages import grow, keep, new_table, pages_in_use, release, share

ROWS, KEPT, COLUMNS = 4, 2, 3
LINES = ROWS + KEPT
LAYOUT = CacheLayout(layers=1, rows=ROWS, kept=KEPT, columns=COLUMNS, page_size=8)
rows = st.integers(0, ROWS - 1)
share_, release_, keep_ = jax.jit(share), jax.jit(release), jax.jit(keep)
grow_ = jax.jit(lambda table, row: grow(table, row, ROWS))


class Pages(RuleBasedStateMachine):
    """`held[line]` is the list of pages that the model says a line has, one per column."""

    def __init__(self):
        super().__init__()
        self.table = new_table(LAYOUT)
        self.held: list[list[int]] = [[] for _ in range(LINES)]

    def in_use(self, column: int) -> set[int]:
        return {pages[column] for pages in self.held if len(pages) > column}

    @precondition(lambda self: any(len(pages) < COLUMNS for pages in self.held[:ROWS]))
    @rule(data=st.data())
    def grows(self, data):
        short = [row for row in range(ROWS) if len(self.held[row]) < COLUMNS]
        line = data.draw(st.sampled_from(short))
        column = len(self.held[line])
        taken = self.in_use(column)
        assert len(taken & set(range(ROWS))) < ROWS, "a page is free for a row that wants one"
        self.table = grow_(self.table, np.int32(line))
        page = int(self.table.pages[line, column])
        assert page < ROWS and page not in taken, "somebody has it already"
        assert page == line or line in taken, "its own page comes first"
        self.held[line].append(page)

    @precondition(lambda self: any(self.held) and not all(self.held[:ROWS]))
    @rule(data=st.data())
    def shares(self, data):
        source = data.draw(st.sampled_from([x for x in range(LINES) if self.held[x]]))
        target = data.draw(st.sampled_from([x for x in range(ROWS) if not self.held[x]]))
        count = data.draw(st.integers(0, len(self.held[source])))
        self.table = share_(self.table, *map(np.int32, (source, target, count)))
        self.held[target] = self.held[source][:count]

    @rule(line=st.integers(ROWS, LINES - 1), count=st.integers(0, COLUMNS))
    def keeps(self, line, count):
        shared = any(line in pages for pages in self.held[:ROWS])
        self.table, done = keep_(self.table, np.int32(line), np.int32(count))
        assert bool(done) == (not shared), "not while a row reads what is there"
        if done:
            self.held[line] = [line] * count

    @rule(leaving=st.sets(rows))
    def releases(self, leaving):
        self.table = release_(self.table, np.isin(np.arange(LINES), list(leaving)))
        for line in leaving:
            self.held[line] = []
            # A row that holds nothing must count as lying in its place.
            assert (self.table.pages[line] == line).all()

    @invariant()
    def agrees_with_the_model(self):
        assert self.table.held.tolist() == [len(pages) for pages in self.held]
        for line, pages in enumerate(self.held):
            assert self.table.pages[line, : len(pages)].tolist() == pages
        expected = np.zeros((COLUMNS, LINES), int)
        for pages in self.held:
            for column, page in enumerate(pages):
                expected[column, page] += 1
        assert self.table.references.tolist() == expected.tolist()
        assert holders(self.table).tolist() == expected.tolist()
        assert int(pages_in_use(self.table)) == sum(len(self.in_use(c)) for c in range(COLUMNS))


TestPages = Pages.TestCase
TestPages.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)


def test_every_row_can_grow_to_the_end():
    """Also when the pages at their own indices are taken by others."""
    table = new_table(LAYOUT)
    for _ in range(COLUMNS):
        table = grow_(table, np.int32(0))
    for row in range(1, ROWS):
        table = share_(table, np.int32(row - 1), np.int32(row), np.int32(1))
    table = release_(table, np.arange(LINES) == 0)
    for row in [*range(1, ROWS), 0]:
        while int(table.held[row]) < COLUMNS:
            table = grow_(table, np.int32(row))
    assert (np.asarray(table.references)[1:, :ROWS] == 1).all()
    # The page of row 0 is still that of the others.
    assert table.pages[:ROWS, 0].tolist() == [1, 0, 0, 0]
    assert table.references[0].tolist() == [3, 1, 0, 0, 0, 0]
