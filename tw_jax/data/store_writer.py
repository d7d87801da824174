"""Writes a store shard by shard, with a journal that survives being killed at any moment.

    manifest.json            written last (`tw_jax.data.store_manifest`)
    tokens/, positions/ ...  one zarr array per field (`tw_jax.data.store_files`)
    journal/                 while packing: settings, and per commit what it did

A commit writes whole shards first and then its entry of the journal, which holds the place in the
input and whatever was not written yet. A run that finds a journal drops shards behind the last
commit and goes on from there; since packing is deterministic, it ends with the same bytes.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Int32

from tw_jax.data.packing import lay_out_rows
from tw_jax.data.store_files import (
    HIDDEN_ARRAYS,
    MANIFEST,
    StoreError,
    array_types,
    open_array,
    open_files,
    read_file,
)
from tw_jax.data.store_manifest import Manifest, manifest_from_json
from tw_jax.errors import UserError
from tw_jax.trajectory.trie import Trie

_JOURNAL = "journal/"
_SETTINGS = _JOURNAL + "settings.json"


@dataclasses.dataclass(frozen=True)
class Pending:
    """A trajectory that was read but is in no row yet.

    Attributes:
      tokens: prompt and response.
      prompt_len: tokens of the prompt.
    """

    tokens: Int32[np.ndarray, "len"]
    prompt_len: int


@dataclasses.dataclass(frozen=True)
class PackState:
    """How far packing has come.

    Attributes:
      commits: entries in the journal.
      source: index of the source that the next record is read from.
      line: number of the last record that was read from it; 0 for none.
      rows: rows that are written.
      counts: of everything so far.
      rejects: every bad record before this run began, as arguments of `Rejects.add`.
      pending: trajectories that wait for a row.
      sha256: hash of every shard that is written, by its path in the store.
    """

    commits: int = 0
    source: int = 0
    line: int = 0
    rows: int = 0
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    rejects: tuple[dict[str, Any], ...] = ()
    pending: tuple[Pending, ...] = ()
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)


class StoreWriter:
    """One store that is being packed."""

    def __init__(self, store: str, row_len: int, shard_rows: int) -> None:
        """Opens the folder; nothing is written yet.

        Raises:
          UserError: it cannot be opened.
        """
        self._store, self._row_len, self._shard_rows = store.rstrip("/"), row_len, shard_rows
        self._files = open_files(store)
        self._arrays: dict[str, ts.TensorStore] = {}

    @property
    def hidden_depth(self) -> int:
        """Depth of the hidden intervals, once a commit has made the arrays."""
        array = self._arrays.get(HIDDEN_ARRAYS[0])
        return 0 if array is None else int(array.shape[0])

    def finished(self) -> Manifest | None:
        """The manifest, if the store is finished already; what is left of a journal goes."""
        with _writing(self._store):
            data = read_file(self._files, MANIFEST)
            if data is None:
                return None
            self._delete_journal()
        return manifest_from_json(data, self._store)

    def begin(self, settings: dict[str, Any]) -> PackState:
        """Starts a store, or goes on with one.

        Args:
          settings: all that decides what the store will hold; JSON-able.

        Raises:
          UserError: something else lies there, or a store with other settings.
        """
        with _writing(self._store):
            written = read_file(self._files, _SETTINGS)
            if written is None:
                if self._files.list().result():
                    raise UserError(
                        f"output={self._store} is not empty and no store that was begun: name "
                        "another place, or delete what is there"
                    )
                self._files.write(_SETTINGS, _json(settings)).result()
                return PackState()
            before = json.loads(written)
            changed = sorted(
                name
                for name in {*before, *settings}
                if before.get(name) != json.loads(_json(settings)).get(name)
            )
            if changed:
                raise UserError(
                    f"output={self._store} was begun with other settings ({', '.join(changed)}): "
                    "take those again, or delete it, or name another place"
                )
            return self._read_journal()

    def commit(
        self,
        state: PackState,
        rows: Sequence[Sequence[Trie]],
        *,
        place: tuple[int, int],
        counts: collections.Counter[str],
        rejects: Sequence[dict[str, Any]],
        pending: Sequence[Pending],
        hidden_depth: int,
    ) -> PackState:
        """Writes rows and then, in one step, that they are written.

        Args:
          state: before.
          rows: a multiple of `shard_rows`, except in the last commit.
          place: (source, line) of the last record that was read.
          counts: of everything so far.
          rejects: bad records since `state`.
          pending: what waits for later rows.
          hidden_depth: of the schema's tries.

        Returns:
          The state behind the commit.

        Raises:
          UserError: the store cannot be written.
        """
        with _writing(self._store):
            if not self._arrays:
                shape = (0, self._row_len, self._shard_rows)
                self._arrays = {
                    name: open_array(self._store, name, create=shape, hidden_depth=hidden_depth)
                    for name in array_types(hidden_depth)
                }
            self._arrays = self._resized(self._arrays, state.rows + len(rows))
            sha256 = {}
            for first in range(0, len(rows), self._shard_rows):
                shard = rows[first : first + self._shard_rows]
                sha256 |= self._write_shard(state.rows + first, shard)
            # A commit whose entry is missing never happened; so what it points to comes first.
            self._files.write(_pending_key(state.commits), _pending_bytes(pending)).result()
            entry = {
                "source": place[0],
                "line": place[1],
                "rows": state.rows + len(rows),
                "counts": dict(counts),
                "hidden_depth": self.hidden_depth,
                "rejects": list(rejects),
                "sha256": sha256,
            }
            self._files.write(_entry_key(state.commits), _json(entry)).result()
            if state.commits:
                self._files.write(_pending_key(state.commits - 1), None).result()
        return PackState(
            commits=state.commits + 1,
            source=place[0],
            line=place[1],
            rows=state.rows + len(rows),
            counts=counts,
            rejects=state.rejects,
            pending=tuple(pending),
            sha256=state.sha256 | sha256,
        )

    def metadata_sha256(self) -> dict[str, str]:
        """Hash of the metadata of every array, by its path in the store."""
        with _writing(self._store):
            return self._sha256([f"{name}/zarr.json" for name in self._arrays])

    def finish(self, manifest: Manifest) -> None:
        """Writes the manifest, which makes the store one, and drops the journal."""
        with _writing(self._store):
            self._files.write(MANIFEST, manifest.to_json()).result()
            self._delete_journal()

    def verify(self, manifest: Manifest) -> None:
        """Compares every file of a finished store with its hash.

        Raises:
          UserError: a file is missing or has changed; names the first.
        """
        with _writing(self._store):
            for key, expected in sorted(manifest.sha256.items()):
                if self._sha256([key]) != {key: expected}:
                    raise UserError(
                        f"{self._store}/{key} is not what its manifest says: the store is "
                        "damaged; delete it and pack it again"
                    )

    def _write_shard(self, first: int, rows: Sequence[Sequence[Trie]]) -> dict[str, str]:
        """Writes the rows of one file per array; returns the files' hashes."""
        laid = lay_out_rows(rows, self._row_len)
        writing = [
            array[..., first : first + len(rows), :].write(getattr(laid, name))
            for name, array in self._arrays.items()
        ]
        for future in writing:
            future.result()
        shard = first // self._shard_rows
        keys = [
            f"{name}/c/{'0/' if name in HIDDEN_ARRAYS else ''}{shard}/0" for name in self._arrays
        ]
        return self._sha256(keys)

    def _sha256(self, keys: Sequence[str]) -> dict[str, str]:
        """Hashes of files; of a missing one, that of nothing."""
        reading = [(key, self._files.read(key)) for key in keys]
        return {key: hashlib.sha256(future.result().value).hexdigest() for key, future in reading}

    def _resized(self, arrays: dict[str, ts.TensorStore], rows: int) -> dict[str, ts.TensorStore]:
        """Arrays of so many rows; files behind them are deleted."""
        resizing = {
            name: array.resize(exclusive_max=[*array.shape[:-2], rows, self._row_len])
            for name, array in arrays.items()
        }
        return {name: future.result() for name, future in resizing.items()}

    def _read_journal(self) -> PackState:
        entries = sorted(
            key
            for key in self._files.list(ts.KvStore.KeyRange(_JOURNAL, "journal0")).result()
            if key.endswith(b".json") and key != _SETTINGS.encode()
        )
        reading = [self._files.read(key) for key in entries]
        commits = [json.loads(future.result().value) for future in reading]
        if not commits:
            return PackState()
        last = commits[-1]
        pending = read_file(self._files, _pending_key(len(commits) - 1))
        if pending is None:
            raise UserError(
                f"{self._store}/{_JOURNAL} is incomplete; delete the store and pack it again"
            )
        names = array_types(last["hidden_depth"])
        arrays = {name: open_array(self._store, name) for name in names}
        self._arrays = self._resized(arrays, last["rows"])
        return PackState(
            commits=len(commits),
            source=last["source"],
            line=last["line"],
            rows=last["rows"],
            counts=collections.Counter(last["counts"]),
            rejects=tuple(entry for commit in commits for entry in commit["rejects"]),
            pending=_pending_from(pending),
            sha256={key: value for commit in commits for key, value in commit["sha256"].items()},
        )

    def _delete_journal(self) -> None:
        self._files.delete_range(ts.KvStore.KeyRange(_JOURNAL, "journal0")).result()
        if "://" not in self._store:
            with contextlib.suppress(OSError):
                os.rmdir(pathlib.Path(self._store, _JOURNAL))


@contextlib.contextmanager
def _writing(store: str) -> Iterator[None]:
    """Turns TensorStore's failures into a message; the journal makes starting again safe."""
    try:
        yield
    except StoreError as error:
        raise UserError(
            f"the store {store} cannot be written: {error}; mend that and run the same command "
            "again: it goes on from its last commit, if there was one"
        ) from error


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _entry_key(commit: int) -> str:
    return f"{_JOURNAL}{commit:08d}.json"


def _pending_key(commit: int) -> str:
    return f"{_JOURNAL}{commit:08d}.npz"


def _pending_bytes(pending: Sequence[Pending]) -> bytes:
    tokens = [item.tokens for item in pending]
    file = io.BytesIO()
    np.savez(
        file,
        tokens=np.concatenate([np.zeros(0, np.int32), *tokens]),
        lengths=np.array([len(t) for t in tokens], np.int64),
        prompt_lens=np.array([item.prompt_len for item in pending], np.int64),
    )
    return file.getvalue()


def _pending_from(data: bytes) -> tuple[Pending, ...]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        pieces = np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])
        prompt_lens = arrays["prompt_lens"].tolist()
    if not prompt_lens:
        return ()
    return tuple(Pending(*item) for item in zip(pieces, prompt_lens, strict=True))
