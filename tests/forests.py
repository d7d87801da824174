"""Random forests in preorder, as packed rows hold them, for property-based tests."""

import dataclasses
import itertools

import numpy as np
from hypothesis import strategies as st


@dataclasses.dataclass(frozen=True)
class Forest:
    """Rows of random forests; every array is int32 `[rows, row_len]`.

    Padding stands at the end of a row: own parent, depth 0, visible to itself only.
    """

    parent: np.ndarray
    visible_end: np.ndarray
    depth: np.ndarray  # of a token in its tree; roots have 0

    def path(self, row: int, index: int) -> list[int]:
        """Indices from the root to `index`."""
        path = [index]
        while self.parent[row, path[-1]] != path[-1]:
            path.append(int(self.parent[row, path[-1]]))
        return path[::-1]


def forest_row(segments: list[tuple[int, int]], row_len: int) -> tuple[np.ndarray, ...]:
    """`(parent, visible_end, depth)` of one row.

    Args:
      segments: `(climb, length)`: go up `climb` tokens from the end of the last segment (past the
        root: start a new tree) and append a chain of `length` tokens there.
      row_len: tokens beyond it are dropped; what remains is padding.
    """
    parent = np.arange(row_len, dtype=np.int32)
    visible_end = np.arange(1, row_len + 1, dtype=np.int32)
    depth = np.zeros(row_len, np.int32)
    path: list[int] = []
    index = 0
    for climb, length in segments:
        path = path[: max(len(path) - climb, 0)]
        for _ in range(min(length, row_len - index)):
            if path:
                parent[index] = path[-1]
                depth[index] = len(path)
            path.append(index)
            visible_end[path] = index + 1
            index += 1
    return parent, visible_end, depth


def side_by_side(*visible_ends: np.ndarray) -> np.ndarray:
    """`visible_end` of one row that holds these pieces one after another."""
    starts = np.cumsum([0, *(len(end) for end in visible_ends)])
    return np.concatenate(
        [end + start for end, start in zip(visible_ends, starts[:-1], strict=True)]
    ).astype(np.int32)


NativePart = int | tuple[list["NativePart"], ...]


def native_row(parts: list[NativePart], depth: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """One sequence with native blocks: sibling threads hidden from each other until the join.

    Args:
      parts: an int is that many tokens in sequence, a tuple a block of threads, each a list of
        parts again.
      depth: intervals per token; at least the nesting depth of the blocks.

    Returns:
      `hidden_start` and `hidden_end`, int32 `[depth, len]`, and for every token its thread in each
      block that it lies in, by the block's number. Everything else is causal.
    """
    where: list[dict[int, int]] = []
    intervals: list[list[tuple[int, int]]] = []
    numbers = itertools.count()

    def lay(parts: list[NativePart], inside: dict[int, int]) -> None:
        for part in parts:
            if isinstance(part, int):
                where.extend([inside] * part)
                intervals.extend([] for _ in range(part))
                continue
            block, first, ends = next(numbers), len(where), []
            for thread, body in enumerate(part):
                lay(body, {**inside, block: thread})
                ends.append(len(where))
            for token in range(first, len(where)):
                own_end = ends[where[token][block]]
                if own_end < len(where):
                    intervals[token].append((own_end, len(where)))

    lay(parts, {})
    hidden = np.zeros((2, depth, len(where)), np.int32)
    for token, found in enumerate(intervals):
        for level, interval in enumerate(found):
            hidden[:, level, token] = interval
    return hidden[0], hidden[1], where


@st.composite
def random_forests(draw, rows: int, row_len: int) -> Forest:
    """Forests of at most `row_len` tokens; chains, bushes, several trees and padding all occur."""
    segment = st.tuples(st.integers(0, row_len // 2), st.integers(1, max(row_len // 3, 1)))
    made = [
        forest_row(draw(st.lists(segment, min_size=0, max_size=12)), row_len) for _ in range(rows)
    ]
    return Forest(*(np.stack(arrays) for arrays in zip(*made, strict=True)))


@st.composite
def random_hidden(draw, forest: Forest, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """`(hidden_start, hidden_end)`, each `[depth, rows, row_len]`; no token is hidden from itself.

    Intervals of one token may overlap, reach beyond its visibility, or be empty (both 0).
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (depth, *forest.parent.shape)
    row_len = shape[-1]
    after = np.arange(1, row_len + 1)
    start = np.minimum(after + rng.integers(0, row_len // 2, shape), row_len)
    end = np.minimum(start + rng.integers(0, row_len // 2, shape), row_len)
    used = rng.random(shape) < 0.6
    return np.where(used, start, 0).astype(np.int32), np.where(used, end, 0).astype(np.int32)
