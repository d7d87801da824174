"""Records of several sources as trajectories, in order, from any place on, on several processes.

Gives exactly what `read_trajectories` gives, good and bad (and what is not strict among the bad, if
asked to), and can leave out what an earlier run has read without encoding it again.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from tw_jax.data.columns import ColumnsConfig
from tw_jax.data.records import Record, RejectedRecord, read_records
from tw_jax.data.rejects import Rejects
from tw_jax.data.tokenizer import open_tokenizer
from tw_jax.data.trajectory_file import (
    encode_trajectory,
    require_strict,
    trajectory_record,
)
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import Trajectory

_CHUNK_RECORDS = 16
# Kinds of rejects that come from packing: the record itself was good and has taken its id.
TOO_LONG = "too_long"


@dataclasses.dataclass(frozen=True)
class Reject:
    """A bad record; the arguments of `Rejects.add`."""

    file: str
    line: int
    kind: str
    message: str
    field: str | None = None


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What turns records into trajectories; small enough to hand to other processes.

    Attributes:
      tokenizer: folder or hub id; null for the shipped character tokenizer.
      schema: the language of the responses.
      columns: names of the fields.
      strict: blocks that parse but are not canonical (`Schema.validate`) are bad too.
    """

    tokenizer: str | None
    schema: str
    columns: ColumnsConfig
    strict: bool


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one record.

    Attributes:
      source: index of its source.
      line: number of the record in it.
      result: the trajectory, or why there is none.
    """

    source: int
    line: int
    result: Trajectory | Reject


def encoded_records(
    sources: Sequence[str],
    encoder: Encoder,
    *,
    after: tuple[int, int],
    rejected_before: Sequence[tuple[str, int]],
    workers: int,
) -> Iterator[Outcome]:
    """Yields what becomes of every record, in order.

    Args:
      sources: see `tw_jax.data.records`.
      encoder: turns records into trajectories.
      after: (source, line) of the last record that is left out; (0, 0) leaves none out.
      rejected_before: (file, line) of the records among those that were bad.
      workers: processes that encode; 1 encodes in this one.

    Raises:
      UserError: a source cannot be read.
    """
    bad = set(rejected_before)
    with _mapping(encoder, workers) as in_order:
        for index, source in enumerate(sources[after[0] :], start=after[0]):
            done = after[1] if index == after[0] else 0
            ids: set[str | int] = set()
            fresh = _after(source, done, encoder.columns, bad, ids)
            for item, result, identity in in_order(fresh):
                if isinstance(identity, str | int) and identity in ids:
                    message = f"the id {identity!r} names an earlier record too"
                    result = Reject(source, item.line, "duplicate_id", message, encoder.columns.id)
                elif identity is not None and isinstance(result, Trajectory):
                    ids.add(identity)
                yield Outcome(index, item.line, result)


_Encoded = tuple[Record | Reject, Trajectory | Reject, str | int | None]


def encode_chunk(encoder: Encoder, chunk: Sequence[Record | Reject]) -> list[_Encoded]:
    """Encodes records; rejects among them pass through. Runs in this or another process."""
    tokenizer, schema = bound_tokenizer(encoder.tokenizer, encoder.schema)
    return [_encode(item, encoder, tokenizer, schema) for item in chunk]


def _encode(item: Record | Reject, encoder: Encoder, tokenizer: Any, schema: Schema) -> _Encoded:
    if isinstance(item, Reject):
        return item, item, None
    identity = None
    try:
        record = trajectory_record(item, encoder.columns)
        identity = record.id
        trajectory = encode_trajectory(record, schema, tokenizer)
        if encoder.strict:
            require_strict(trajectory, schema, tokenizer)
        return item, trajectory, identity
    except RejectedRecord as error:
        reject = Reject(item.file, item.line, error.kind, error.message, error.field)
        return item, reject, identity


# A process encodes for one store; a tokenizer takes seconds to load and bind.
bound_tokenizer = functools.lru_cache(maxsize=1)(open_tokenizer)


class _Collected(Rejects):
    """Keeps what is no record in a list, so that it can be put in order with the records."""

    def __init__(self) -> None:
        self.entries: list[Reject] = []

    def add(
        self,
        file: str | pathlib.Path,
        line: int,
        kind: str,
        message: str,
        field: str | None = None,
    ) -> None:
        self.entries.append(Reject(str(file), line, kind, message, field))


def _after(
    source: str,
    done: int,
    columns: ColumnsConfig,
    bad: set[tuple[str, int]],
    ids: set[str | int],
) -> Iterator[Record | Reject]:
    """Records behind the first `done`, and what is none among them; `ids` gets those before."""
    collected = _Collected()
    for record in read_records(source, collected):
        yield from (entry for entry in collected.entries if entry.line > done)
        collected.entries.clear()
        if record.line > done:
            yield record
        elif (source, record.line) not in bad:
            identity = trajectory_record(record, columns).id
            if identity is not None:
                ids.add(identity)
    yield from (entry for entry in collected.entries if entry.line > done)


@contextlib.contextmanager
def _mapping(encoder: Encoder, workers: int) -> Iterator[Any]:
    """A function that encodes records in order, reading only a few chunks ahead."""
    if workers == 1:
        yield lambda items: (encoded for item in items for encoded in encode_chunk(encoder, [item]))
        return
    # Spawned: JAX's threads would not survive a fork.
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent
    ) as pool:

        def in_order(items: Iterator[Record | Reject]) -> Iterator[_Encoded]:
            waiting: collections.deque[concurrent.futures.Future[list[_Encoded]]]
            waiting = collections.deque()
            for chunk in _chunks(items):
                waiting.append(pool.submit(encode_chunk, encoder, chunk))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()

        try:
            yield in_order
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _chunks(items: Iterator[Record | Reject]) -> Iterator[list[Record | Reject]]:
    chunk: list[Record | Reject] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == _CHUNK_RECORDS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _end_with_parent() -> None:
    """Ends a worker when its parent is killed, which would leave it waiting for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
