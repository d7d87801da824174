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
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from tw_jax.data.columns import ColumnsConfig
from tw_jax.data.records import Record, RejectedRecord, UniqueIds, records_and_rejects
from tw_jax.data.rejects import Reject
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
            ids = UniqueIds()
            fresh = _after(source, done, encoder.columns, bad, ids)
            for item, result, identity in in_order(fresh):
                if identity is not None:
                    try:
                        ids.require_new(identity, encoder.columns.id)
                        if isinstance(result, Trajectory):
                            ids.note(identity, f"{source}:{item.line}")
                    except RejectedRecord as error:
                        result = _reject(item, error)
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
        return item, _reject(item, error), identity


def _reject(item: Record | Reject, error: RejectedRecord) -> Reject:
    return Reject(item.file, item.line, error.kind, error.message, error.field)


# A process encodes for one store; a tokenizer takes seconds to load and bind.
bound_tokenizer = functools.lru_cache(maxsize=1)(open_tokenizer)


def _after(
    source: str,
    done: int,
    columns: ColumnsConfig,
    bad: set[tuple[str, int]],
    ids: UniqueIds,
) -> Iterator[Record | Reject]:
    """Records behind the first `done`, and what is none among them; `ids` gets those before."""
    for item in records_and_rejects(source):
        if item.line > done:
            yield item
        elif isinstance(item, Record) and (source, item.line) not in bad:
            ids.note(trajectory_record(item, columns).id, f"{source}:{item.line}")


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
