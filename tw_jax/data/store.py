"""Reads a store of packed rows (`tw_jax.data.store_files`), row by row, in any order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from tw_jax.data.packed_batch import PackedBatch
from tw_jax.data.packing import PADDING_KIND, LossWeights
from tw_jax.data.store_files import (
    HIDDEN_ARRAYS,
    MANIFEST,
    StoreError,
    array_types,
    open_array,
    open_files,
    read_file,
)
from tw_jax.data.store_manifest import Manifest, check_manifest, manifest_from_json
from tw_jax.errors import UserError
from tw_jax.trajectory.schema import Schema

# Holds the places of rows within their files, so that a row is one read and not two.
_CACHE_BYTES = 32 << 20


class PackedStore:
    """A finished store.

    Attributes:
      path: as it was named.
      manifest: what it holds.
    """

    def __init__(self, path: str) -> None:
        """Reads the manifest; rows are read as they are asked for.

        Raises:
          UserError: there is no finished store.
        """
        self.path = path.rstrip("/")
        self.manifest: Manifest = read_manifest(path)
        context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        names = array_types(self.manifest.hidden_depth)
        try:
            self._arrays = {name: open_array(path, name, context=context) for name in names}
        except StoreError as error:
            raise self._damaged(error) from error
        for name, array in self._arrays.items():
            expected = (self.manifest.rows, self.manifest.row_len)
            if array.shape[-2:] != expected:
                raise self._damaged(f"{name} has shape {array.shape}, expected {expected}")

    def __len__(self) -> int:
        return self.manifest.rows

    def read_rows(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The arrays of some rows, in the order that is asked for.

        Returns:
          Name -> `[rows, row_len]`, hidden intervals `[depth, rows, row_len]`.

        Raises:
          UserError: the store is damaged, or out of reach.
        """
        chosen = list(rows)
        try:
            reading = {
                name: [array[..., row, :].read() for row in chosen]
                for name, array in self._arrays.items()
            }
            return {
                name: np.stack([future.result() for future in futures], axis=-2)
                for name, futures in reading.items()
            }
        except StoreError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Any) -> UserError:
        return UserError(
            f"the store {self.path} cannot be read: {error}; if it is damaged, delete it and pack "
            "it again with `tw-jax data pack`"
        )


def read_manifest(path: str) -> Manifest:
    """The manifest of a finished store.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = path.rstrip("/")
    try:
        data = read_file(open_files(path), MANIFEST)
    except StoreError as error:
        raise UserError(f"cannot read {path}/{MANIFEST}: {error}") from error
    if data is None:
        raise UserError(
            f"{path} is no finished store: it has no {MANIFEST}. Check the path; if "
            "`tw-jax data pack` was stopped, run the same command again, and it goes on"
        )
    return manifest_from_json(data, path)


def open_store(path: str, tokenizer: Any, schema: Schema, row_len: int) -> PackedStore:
    """Opens a store for a run.

    Raises:
      UserError: it is not finished, or was packed for another tokenizer, schema or row length.
    """
    store = PackedStore(path)
    check_manifest(store.manifest, store.path, tokenizer, schema, row_len)
    return store


def to_batch(rows: dict[str, np.ndarray], loss: LossWeights) -> PackedBatch:
    """Weighs the tokens of stored rows."""
    no_intervals = np.zeros((0, *rows["tokens"].shape), np.int32)
    hidden_start, hidden_end = (rows.get(name, no_intervals) for name in HIDDEN_ARRAYS)
    return PackedBatch(
        tokens=rows["tokens"],
        positions=rows["positions"],
        parent=rows["parent"],
        visible_end=rows["visible_end"],
        hidden_start=hidden_start,
        hidden_end=hidden_end,
        loss_weight=loss.of_kinds(rows["kind"]),
    )


def padding_rows(count: int, row_len: int, hidden_depth: int) -> dict[str, np.ndarray]:
    """Rows without a trie, as a store would hold them."""
    shape = (count, row_len)
    own_index = np.tile(np.arange(row_len, dtype=np.int32), (count, 1))
    rows = {
        "tokens": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "parent": own_index,
        "visible_end": own_index + np.int32(1),
        "kind": np.full(shape, PADDING_KIND, np.int8),
    }
    if hidden_depth:
        rows |= {name: np.zeros((hidden_depth, *shape), np.int32) for name in HIDDEN_ARRAYS}
    return rows
