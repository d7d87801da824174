"""Batches out of stores of packed rows: mixed, shuffled, in shards, with a position of one number.

Row n of the stream is a pure function of n (`tw_jax.data.mixture`, then each store's own order,
another for every pass over it). Batch b holds the rows from `b * rows` on, so its number is all
that a run must remember, and a process can read its own rows of a batch and leave out the rest.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from tw_jax.data.mixture import Mixture, Shares
from tw_jax.data.packed_batch import PackedBatch
from tw_jax.data.packing import LossWeights
from tw_jax.data.store import PackedStore, open_store, padding_rows, to_batch
from tw_jax.errors import UserError
from tw_jax.trajectory.schema import Schema

# Grain wants a length; no run reads this many batches.
_ENDLESS = 2**40
_READ_AHEAD = 4  # batches
_READERS = 2


@dataclasses.dataclass(frozen=True)
class StoresConfig:
    """Stores that `tw-jax data pack` wrote, and how they are mixed.

    Attributes:
      paths: the stores: local folders, or URLs such as gs://bucket/folder.
      weights: share of each store in the rows; empty for shares in proportion to their rows.
      final_weights: shares that the stream ends with; empty keeps `weights`. With a store of
        sequential and one of parallel trajectories, this is a curriculum.
      ramp_rows: rows of the stream over which the shares change, linearly.
    """

    paths: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    final_weights: tuple[float, ...] = ()
    ramp_rows: int = 0

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths: name at least one store")
        for name in ("weights", "final_weights"):
            weights = getattr(self, name)
            if weights and len(weights) != len(self.paths):
                raise ValueError(
                    f"{name}={list(weights)}: expected one per path, that is {len(self.paths)}"
                )
            if weights and (min(weights) < 0 or not 0 < sum(weights) < float("inf")):
                raise ValueError(
                    f"{name}={list(weights)}: none may be negative, and one must be positive"
                )
        if self.final_weights and self.ramp_rows < 1:
            raise ValueError(
                f"ramp_rows={self.ramp_rows}: say over how many rows the shares go over to "
                "final_weights, at least 1"
            )
        if self.ramp_rows and not self.final_weights:
            raise ValueError(
                f"ramp_rows={self.ramp_rows}: set final_weights too, where the ramp ends, or leave "
                "it out"
            )


class StoreRows:
    """The stream of rows of several stores."""

    def __init__(
        self, stores: Sequence[PackedStore], shares: Shares, *, seed: int, shuffle: bool
    ) -> None:
        """Begins the stream; `seed` decides the order of every store and of the mixture."""
        self._stores = stores
        seeds = np.random.SeedSequence(seed).generate_state(len(stores) + 1)
        self._mixture = Mixture(shares, int(seeds[-1]))
        orders = [grain.MapDataset.range(len(store)) for store in stores]
        if shuffle:
            orders = [o.shuffle(seed=int(s)) for o, s in zip(orders, seeds[:-1], strict=True)]
        self._orders = [order.repeat() for order in orders]  # each pass in another order

    @property
    def depth(self) -> int:
        """Depth of the hidden intervals; one schema has one."""
        return self._stores[0].manifest.hidden_depth

    def place(self, n: int) -> tuple[int, int]:
        """(store, row in it) of row n of the stream."""
        store, index = self._mixture.row(n)
        row = self._orders[store][index]
        assert row is not None  # only a filter would leave one out
        return store, row

    def read(self, ns: Sequence[int]) -> dict[str, np.ndarray]:
        """Reads rows of the stream, in this order (`PackedStore.read_rows`).

        Raises:
          UserError: a store is damaged, or out of reach.
        """
        places = [self.place(n) for n in ns]
        parts, order = [], []
        for number, store in enumerate(self._stores):
            mine = [i for i, (owner, _) in enumerate(places) if owner == number]
            if mine:
                parts.append(store.read_rows([places[i][1] for i in mine]))
                order += mine
        back = np.argsort(order)
        return {
            name: np.concatenate([part[name] for part in parts], axis=-2).take(back, axis=-2)
            for name in parts[0]
        }


class StoreBatches:
    """Batches by number; a random-access source for grain."""

    def __init__(
        self,
        stream: StoreRows,
        loss: LossWeights,
        *,
        rows: int,
        row_len: int,
        count: int,
        held_rows: Sequence[int] | None,
    ) -> None:
        """See `store_batches`; `count` is the number of batches."""
        self._stream, self._loss, self._count = stream, loss, count
        self._rows, self._row_len = rows, row_len
        self._held = list(range(rows)) if held_rows is None else sorted(held_rows)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> PackedBatch:
        read = self._stream.read([int(number) * self._rows + row for row in self._held])
        if len(self._held) < self._rows:
            whole = padding_rows(self._rows, self._row_len, self._stream.depth)
            for name, array in whole.items():
                array[..., self._held, :] = read[name]
            read = whole
        return to_batch(read, self._loss)


def store_batches(
    config: StoresConfig,
    tokenizer: Any,
    schema: Schema,
    loss: LossWeights,
    *,
    rows: int,
    row_len: int,
    seed: int,
    epochs: int | None,
    shuffle: bool = True,
    held_rows: Sequence[int] | None = None,
) -> grain.IterDataset:
    """Batches of `rows` rows of the stores.

    Args:
      config: which stores, and how they are mixed.
      tokenizer: of the run; the stores must have been packed with it.
      schema: of the run.
      loss: weight of each kind of token.
      rows: rows per batch.
      row_len: tokens per row.
      seed: of the order of rows and of the mixture.
      epochs: the stream ends after so many times the rows of all stores; None never ends it.
      shuffle: each store's rows in a random order, another for every pass.
      held_rows: rows of a batch that this process's devices hold; only those are read, the others
        are padding. None reads all.

    Returns:
      A grain dataset of `PackedBatch`; `get_state` and `set_state` of its iterator hold the number
      of the next batch. A last batch that is not full is dropped.

    Raises:
      UserError: a store is unfinished, or was packed for another tokenizer, schema or row length.
    """
    stores = [open_store(path, tokenizer, schema, row_len) for path in config.paths]
    sizes = tuple(float(len(store)) for store in stores)
    if not all(sizes):
        raise UserError(
            f"{stores[sizes.index(0.0)].path} holds no row; leave it out of data.stores"
        )
    first = config.weights or sizes
    shares = Shares(first, config.final_weights or first, config.ramp_rows)
    count = _ENDLESS if epochs is None else epochs * int(sum(sizes)) // rows
    stream = StoreRows(stores, shares, seed=seed, shuffle=shuffle)
    batches = StoreBatches(
        stream, loss, rows=rows, row_len=row_len, count=count, held_rows=held_rows
    )
    source = grain.MapDataset.source(batches)  # pyright: ignore[reportArgumentType]
    return source.to_iter_dataset(
        grain.ReadOptions(num_threads=_READERS, prefetch_buffer_size=_READ_AHEAD)
    )
