"""Pages against a model in plain sets: any sequence of growing, sharing and releasing."""

import jax
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.rollout.page_checker import holders
from tw_jax.kernels.column_cache import CacheLayout
from tw_jax.rollout.pages import grow, new_table, pages_in_use, release, share

LINES, COLUMNS = 4, 3
LAYOUT = CacheLayout(layers=1, lines=LINES, columns=COLUMNS, page_size=8)
lines = st.integers(0, LINES - 1)
grow_, share_, release_ = jax.jit(grow), jax.jit(share), jax.jit(release)


class Pages(RuleBasedStateMachine):
    """`held[line]` is the list of pages that the model says a line has, one per column."""

    def __init__(self):
        super().__init__()
        self.table = new_table(LAYOUT)
        self.held: list[list[int]] = [[] for _ in range(LINES)]

    def in_use(self, column: int) -> set[int]:
        return {pages[column] for pages in self.held if len(pages) > column}

    @precondition(lambda self: any(len(pages) < COLUMNS for pages in self.held))
    @rule(data=st.data())
    def grows(self, data):
        short = [line for line in range(LINES) if len(self.held[line]) < COLUMNS]
        line = data.draw(st.sampled_from(short))
        column = len(self.held[line])
        taken = self.in_use(column)
        assert len(taken) < LINES, "a page is free for a line that wants one"
        self.table = grow_(self.table, np.int32(line))
        page = int(self.table.pages[line, column])
        assert page not in taken, "somebody has it already"
        assert page == line or line in taken, "its own page comes first"
        self.held[line].append(page)

    @precondition(lambda self: any(self.held) and not all(self.held))
    @rule(data=st.data())
    def shares(self, data):
        source = data.draw(st.sampled_from([x for x in range(LINES) if self.held[x]]))
        target = data.draw(st.sampled_from([x for x in range(LINES) if not self.held[x]]))
        count = data.draw(st.integers(0, len(self.held[source])))
        self.table = share_(self.table, *map(np.int32, (source, target, count)))
        self.held[target] = self.held[source][:count]

    @rule(leaving=st.sets(lines))
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


def test_every_line_can_grow_to_the_end():
    """Also when the pages at their own indices are taken by others."""
    table = new_table(LAYOUT)
    for _ in range(COLUMNS):
        table = grow_(table, np.int32(0))
    for line in range(1, LINES):
        table = share_(table, np.int32(line - 1), np.int32(line), np.int32(1))
    table = release_(table, np.arange(LINES) == 0)
    for line in [*range(1, LINES), 0]:
        while int(table.held[line]) < COLUMNS:
            table = grow_(table, np.int32(line))
    assert (np.asarray(table.references)[1:] == 1).all()
    # The page of line 0 is still that of the others.
    assert table.pages[:, 0].tolist() == [3, 0, 0, 0]
    assert table.references[0].tolist() == [3, 0, 0, 1]
