"""The training input pipeline: trajectories -> tries -> packed rows -> batches, on grain.

Every stage is deterministic and the position of the whole pipeline is a small JSON-able state, so
a resumed run sees exactly the batches that an uninterrupted one would have seen.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain

from tw_jax.data.packed_batch import PackedBatch
from tw_jax.data.packing import WeightedTrie, best_fit_rows, pack_rows


class RandomAccess(Protocol):
    """What grain reads from: a length and items by index, the same every time."""

    def __len__(self) -> int:
        """Number of items."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Item at an index."""
        ...


class _PackedRowIterator(grain.DatasetIterator):
    """Packs windows of tries; its state is where the window began and how many rows left it."""

    def __init__(self, parent: grain.DatasetIterator, row_len: int, window: int) -> None:
        super().__init__(parent)
        self._row_len, self._window = row_len, window
        self._rows: collections.deque[list[WeightedTrie]] = collections.deque()
        self._window_state = parent.get_state()
        self._taken = 0

    def _fill(self) -> None:
        self._window_state = self._parent.get_state()
        self._taken = 0
        tries: list[WeightedTrie] = []
        while len(tries) < self._window:
            try:
                tries.append(next(self._parent))
            except StopIteration:
                break
        rows = best_fit_rows([len(item.trie) for item in tries], self._row_len)
        self._rows.extend([tries[i] for i in row] for row in rows)

    def __next__(self) -> list[WeightedTrie]:
        if not self._rows:
            self._fill()
            if not self._rows:
                raise StopIteration
        self._taken += 1
        return self._rows.popleft()

    def get_state(self) -> dict[str, Any]:
        return {"window_start": self._window_state, "rows_taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["window_start"])
        self._rows.clear()
        self._fill()
        for _ in range(int(state["rows_taken"])):
            self._rows.popleft()
        self._taken = int(state["rows_taken"])


class PackedRows(grain.IterDataset):
    """Best-fit packs windows of `window` tries into rows of `row_len` tokens.

    A window is longer than a row by far, so its last, half-empty rows cost little.
    """

    def __init__(self, parent: grain.IterDataset, row_len: int, window: int) -> None:
        """Reads `WeightedTrie`s from `parent`; none may be longer than `row_len`."""
        super().__init__(parent)
        self._row_len, self._window = row_len, window

    def __iter__(self) -> grain.DatasetIterator:
        """A fresh iterator over rows (lists of tries)."""
        return _PackedRowIterator(iter(self._parent), self._row_len, self._window)


def packed_batches(
    source: RandomAccess,
    to_trie: Callable[[Any], WeightedTrie],
    *,
    rows: int,
    row_len: int,
    window: int,
    seed: int,
    shuffle: bool,
    epochs: int | None,
) -> grain.IterDataset:
    """Batches of `rows` packed rows from a random-access source.

    Args:
      source: items by index.
      to_trie: turns an item into a trie with loss weights; called in a background thread.
      rows: rows per batch.
      row_len: tokens per row.
      window: tries that are packed together.
      seed: of the shuffle.
      shuffle: visits each epoch in another global order.
      epochs: passes over the source; None repeats without end.

    Returns:
      A grain dataset of `PackedBatch`; iterate it, `get_state` and `set_state` on the iterator.
      A last batch that is not full is dropped.
    """
    items = grain.MapDataset.source(source)  # pyright: ignore[reportArgumentType]
    if shuffle:
        items = items.shuffle(seed=seed)
    items = items.repeat(epochs)
    tries = items.map(to_trie).to_iter_dataset(grain.ReadOptions(num_threads=1))
    packed = PackedRows(tries, row_len, window)

    def to_batch(batch: Sequence[Sequence[WeightedTrie]]) -> PackedBatch:
        return pack_rows(batch, row_len)

    return packed.batch(rows, drop_remainder=True, batch_fn=to_batch)
