"""The engine's state on the device: fixed shapes, one donated pytree.

Three kinds of place. A *row* is one lane of the decoding batch and one line of the page table; it
runs one unit at a time. A *request slot* holds one active rollout. An *area* is a line of the
token store: request slot `g` owns areas `g * areas + t`; area 0 holds its joined text, and area t
the text of thread t + 1 in that thread's own context (thread 1 writes into the joined text
directly). Under the join rule `message` area 0 holds what the parent sees, area t the text of
thread t, and the request's *archive* that of the threads that have joined. A row writes its tokens
to its area at their positions, so a finished thread needs no row while it waits for its join.

Two counters per row are the only queue there is: `n_known` tokens are decided, `n_kv` of them are
in the cache. Prompts, forced headers, closers, joined threads and join tokens are just known
tokens that are not cached yet.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from tw_jax.kernels.column_cache import ColumnCache, empty_cache
from tw_jax.rollout.outlines import OutlineReader, new_reader
from tw_jax.rollout.pages import PageTable, new_table
from tw_jax.rollout.program import Program
from tw_jax.rollout.sampling_table import SamplingTable, sampling_table

# Phases of a request slot.
FREE, SEGMENT, THREADS, FINISHED = range(4)
# Why a unit or rollout ended; 0 while it runs. Index into `FINISH_REASONS` of assemble.py.
RUNNING, SPAWN, THREAD_STOP, EOS, LENGTH, CONTEXT, CANCELLED, DEADLINE, STOPPED = range(9)
# Columns of `Threads.outcome`: sampled tokens, why it ended (RUNNING until then), where and when.
COUNT, REASON, ROW, START_STEP, END_STEP, OUTCOME_FIELDS = range(6)
# Columns of `Records.segments`: row, first and last step.
SEGMENT_FIELDS = 3
# Columns of `Records.blocks`: end of the outlines, end of the join, threads joined.
OUTLINES_END, JOIN_END, JOINED, BLOCK_FIELDS = range(4)
# Columns of `Records.threads`, behind those of an outcome: positions in the joined text
# (under `message`: in the archive), and the length of the parent's context behind its join.
TAG_AT, BODY_AT, SAMPLED_END, THREAD_END, PARENT_LEN, THREAD_FIELDS = range(OUTCOME_FIELDS, 11)


class _Table:
    """A record of arrays that share their first axis."""

    def put(self, index, **values) -> Self:
        """Sets fields at one index of the first axis."""
        changed = {name: getattr(self, name).at[index].set(v) for name, v in values.items()}
        return dataclasses.replace(self, **changed)  # pyright: ignore[reportArgumentType]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows(_Table):
    """The rows of the batch.

    Attributes:
      live: the row runs a unit or waits for its threads.
      request: its request slot.
      area: where its tokens lie in the store.
      thread: ordinal of the thread it runs, 0 for sequential text.
      waiting: a parent's row between the end of thread 1 and the join; feeds, but does not sample.
      n_known: tokens decided.
      n_kv: tokens in the cache.
      shift: rotary position less place in the cache, of tokens from `bend` on.
      shift_before: the same of tokens before it.
      bend: a place in the cache.
      source: the line whose first tokens this one waits to share, -1 for none.
      source_len: how many.
      body: position of the unit's first sampled token.
      stop_at: the unit ends when `n_known` reaches this.
      unit: number of the unit in its request; selects its noise.
      start_step: step of the unit's first sampled token.
    """

    live: Bool[Array, "rows"]
    request: Int32[Array, "rows"]
    area: Int32[Array, "rows"]
    thread: Int32[Array, "rows"]
    waiting: Bool[Array, "rows"]
    n_known: Int32[Array, "rows"]
    n_kv: Int32[Array, "rows"]
    shift: Int32[Array, "rows"]
    shift_before: Int32[Array, "rows"]
    bend: Int32[Array, "rows"]
    source: Int32[Array, "rows"]
    source_len: Int32[Array, "rows"]
    body: Int32[Array, "rows"]
    stop_at: Int32[Array, "rows"]
    unit: Int32[Array, "rows"]
    start_step: Int32[Array, "rows"]


def rotary_positions(
    rows: Rows, row: Int32[Array, "*b"], index: Int32[Array, "*b"]
) -> Int32[Array, "*b"]:
    """Rotary positions of places in the caches of the given rows."""
    return index + jnp.where(index < rows.bend[row], rows.shift_before[row], rows.shift[row])


def ahead(program: Program, rows: Rows) -> Int32[Array, "rows"]:
    """Known tokens of each row that are fed before it samples again.

    A row that samples on is left its last token, behind which it will. One that waits for a join
    which keeps its keys and values is fed all.
    """
    return rows.n_known - rows.n_kv - ~(rows.waiting & program.gathers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests(_Table):
    """The request slots; what was asked for, and how far it is.

    Attributes:
      phase: FREE, SEGMENT, THREADS or FINISHED.
      ticket: order of admission; of requests equally near their join, the oldest gets a free row.
      row: the row of the sequential text and of each block's thread 1.
      key: noise key of the request.
      prompt_len: tokens of the prompt.
      parallel: may spawn.
      limit: the joined text ends here.
      limit_reason: LENGTH or CONTEXT, whichever sets the limit.
      max_threads: outlines beyond this many are dropped.
      max_thread_tokens: budget of sampled tokens per thread.
      max_blocks: triggers beyond this many blocks are plain text.
      sampling: how tokens are drawn.
      reason: why the rollout ended, once FINISHED.
      block: blocks spawned and joined so far; the open block's index in phase THREADS.
      length: tokens of the joined text, once FINISHED.
      archived: tokens in its archive.
    """

    phase: Int32[Array, "requests"]
    ticket: Int32[Array, "requests"]
    row: Int32[Array, "requests"]
    key: UInt32[Array, "requests 2"]
    prompt_len: Int32[Array, "requests"]
    parallel: Bool[Array, "requests"]
    limit: Int32[Array, "requests"]
    limit_reason: Int32[Array, "requests"]
    max_threads: Int32[Array, "requests"]
    max_thread_tokens: Int32[Array, "requests"]
    max_blocks: Int32[Array, "requests"]
    sampling: SamplingTable
    reason: Int32[Array, "requests"]
    block: Int32[Array, "requests"]
    length: Int32[Array, "requests"]
    archived: Int32[Array, "requests"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threads(_Table):
    """The open block of each request.

    Attributes:
      fork_at: position behind the spawn trigger.
      count: threads of the block.
      next_spawn: ordinal of the next thread to get a row (thread 1 needs one under `message` only).
      next_join: ordinal of the next thread to join.
      last_position: the largest rotary position of a joined thread's closing tag.
      outcome: per thread, once it ended: COUNT, REASON, ROW, START_STEP, END_STEP.
    """

    fork_at: Int32[Array, "requests"]
    count: Int32[Array, "requests"]
    next_spawn: Int32[Array, "requests"]
    next_join: Int32[Array, "requests"]
    last_position: Int32[Array, "requests"]
    outcome: Int32[Array, "requests threads fields"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Records:
    """What the host needs to rebuild a rollout from its joined text.

    Attributes:
      segments: row, first and last step of the segment before each block and of the last one.
      blocks: OUTLINES_END, JOIN_END, JOINED of each block.
      threads: the outcome of each joined thread, and where it went.
    """

    segments: Int32[Array, "requests blocks_and_one fields"]
    blocks: Int32[Array, "requests blocks fields"]
    threads: Int32[Array, "requests blocks threads fields"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """All of it; `advance` takes and returns one of these.

    Attributes:
      cache: keys and values.
      pages: which pages of the cache each line holds.
      tokens: the token store, one line per area.
      logprobs: log-probability of each sampled token, beside it.
      script: tokens to take in place of sampled ones, beside them; -1 for none. No areas without
        `EngineConfig.scripts`.
      archive: tokens of joined threads, one line per request; no lines but under `message`.
      archive_logprobs: log-probability of each sampled token of them.
      rows: the rows of the batch.
      requests: the request slots.
      reader: outline numbers read so far, per request.
      threads: the open block of each request.
      records: what happened, for the host.
      step: steps since the engine was made.
      idle_steps: steps since any row was fed.
    """

    cache: ColumnCache
    pages: PageTable
    tokens: Int32[Array, "areas store"]
    logprobs: Float32[Array, "areas store"]
    script: Int32[Array, "areas store"]
    archive: Int32[Array, "archives archive"]
    archive_logprobs: Float32[Array, "archives archive"]
    rows: Rows
    requests: Requests
    reader: OutlineReader
    threads: Threads
    records: Records
    step: Int32[Array, ""]
    idle_steps: Int32[Array, ""]


def new_state(program: Program) -> EngineState:
    """An engine with nothing in it."""
    rows, requests, threads = program.rows, program.requests, program.max_threads

    def ints(*shape: int) -> Int32[Array, "..."]:
        return jnp.zeros(shape, jnp.int32)

    def flags(*shape: int) -> Bool[Array, "..."]:
        return jnp.zeros(shape, bool)

    store = (requests * program.areas, program.store_len)
    archive = (requests * program.messages, program.archive_len)
    return EngineState(
        cache=empty_cache(program.layout, program.kv_heads, program.head_dim, program.dtype),
        pages=new_table(program.layout),
        tokens=ints(*store),
        logprobs=jnp.zeros(store, jnp.float32),
        script=ints(*(store if program.scripts else (0, store[1]))) - 1,
        archive=ints(*archive),
        archive_logprobs=jnp.zeros(archive, jnp.float32),
        rows=Rows(
            live=flags(rows),
            request=ints(rows),
            area=ints(rows),
            thread=ints(rows),
            waiting=flags(rows),
            n_known=ints(rows),
            n_kv=ints(rows),
            shift=ints(rows),
            shift_before=ints(rows),
            bend=ints(rows),
            source=ints(rows) - 1,
            source_len=ints(rows),
            body=ints(rows),
            stop_at=ints(rows),
            unit=ints(rows),
            start_step=ints(rows),
        ),
        requests=Requests(
            phase=ints(requests),
            ticket=ints(requests),
            row=ints(requests),
            key=jnp.zeros((requests, 2), jnp.uint32),
            prompt_len=ints(requests),
            parallel=flags(requests),
            limit=ints(requests),
            limit_reason=ints(requests),
            max_threads=ints(requests),
            max_thread_tokens=ints(requests),
            max_blocks=ints(requests),
            sampling=jax.tree.map(
                jnp.asarray, sampling_table({}, requests, program.vocab, program.max_logit_bias)
            ),
            reason=ints(requests),
            block=ints(requests),
            length=ints(requests),
            archived=ints(requests),
        ),
        reader=new_reader(requests, threads, program.max_digits),
        threads=Threads(
            fork_at=ints(requests),
            count=ints(requests),
            next_spawn=ints(requests),
            next_join=ints(requests),
            last_position=ints(requests),
            outcome=ints(requests, threads, OUTCOME_FIELDS),
        ),
        records=Records(
            segments=ints(requests, program.max_blocks + 1, SEGMENT_FIELDS),
            blocks=ints(requests, program.max_blocks, BLOCK_FIELDS),
            threads=ints(requests, program.max_blocks, threads, THREAD_FIELDS),
        ),
        step=jnp.int32(0),
        idle_steps=jnp.int32(0),
    )
