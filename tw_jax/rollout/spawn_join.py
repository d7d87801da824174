"""Spawning and joining inside the jitted loop (ThreadWeaver: re-encode at the join).

Every event is handled on scalars, one request at a time, in `while_loop`s that make no trip when
nothing happens; several events of one step take several trips.

Spawn: the parent's row goes on as thread 1. Threads 2..n wait until the cache of the parent's row
covers what all threads share, then each takes a free row when there is one, and shares the pages of
that row. Join: threads join in order, each as soon as it is finished, by copying their tokens
behind the joined text; the parent's row then feeds them like any other known tokens.

The joined text ends at the request's limit. A thread whose text would cross it is cut so that its
closing tag still fits, and the rollout ends there; what ran later is dropped. So the result is the
same whatever ran first.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from tw_jax.rollout.lanes import share_line
from tw_jax.rollout.sampling import unit_number
from tw_jax.rollout.state import (
    COUNT,
    EOS,
    FINISHED,
    OUTCOME_FIELDS,
    REASON,
    RUNNING,
    SEGMENT,
    THREAD_STOP,
    THREADS,
    EngineState,
    Program,
)

Scalar = Int32[Array, ""]


def finish_requests(
    state: EngineState, ending: Bool[Array, "requests"], reason: Int32[Array, "requests"]
) -> EngineState:
    """Ends rollouts: their rows are free at once, their text waits for the host."""
    requests, rows = state.requests, state.rows
    return replace(
        state,
        requests=replace(
            requests,
            phase=jnp.where(ending, FINISHED, requests.phase),
            reason=jnp.where(ending, reason, requests.reason),
            length=jnp.where(ending, rows.n_known[requests.row], requests.length),
        ),
        rows=replace(rows, live=rows.live & ~ending[rows.request]),
    )


def record_segment(state: EngineState, slot: Scalar) -> EngineState:
    """Notes row, first and last step of the sequential text that ends at this step."""
    row = state.requests.row[slot]
    entry = jnp.stack([row, state.rows.start_step[row], state.step])
    segments = state.records.segments.at[slot, state.requests.block[slot]].set(entry)
    return replace(state, records=replace(state.records, segments=segments))


def open_blocks(
    program: Program, state: EngineState, spawning: Bool[Array, "requests"]
) -> EngineState:
    """Opens a block in every request whose text just ended at a usable spawn trigger."""

    def body(carry):
        state, spawning = carry
        slot = jnp.argmax(spawning)
        return _open_block(program, state, slot), spawning.at[slot].set(False)

    state, _ = lax.while_loop(lambda carry: carry[1].any(), body, (state, spawning))
    return state


def block_fits(program: Program, state: EngineState) -> Bool[Array, "requests"]:
    """Whether thread 1 with one token fits behind the text of each request's row."""
    end = state.rows.n_known[state.requests.row] + len(program.tokens.fork)
    end += program.fixed_header_len + state.reader.number_len[:, 0]
    return end + 1 + program.close_len <= state.requests.limit


def join_threads(program: Program, state: EngineState) -> EngineState:
    """Joins every thread whose turn it is, and closes blocks whose threads have all joined.

    Rollouts without room for what would be joined next end here.
    """
    # The cache takes no part: kept out of the loops, it cannot be copied by them.
    cache = state.cache
    state = replace(state, cache=None)
    # Joining can make a block ready to close, closing makes nothing ready: one pass is enough.
    for ready, event in ((_ready_to_join, _join_thread), (_ready_to_close, _close_block)):
        state = _while_any(
            functools.partial(ready, program), functools.partial(event, program), state
        )
    over = (state.requests.phase == THREADS) & _over(program, state)
    if program.deterministic:
        over &= _all_ended(program, state)
    # The open block counts: its threads joined so far are part of the result.
    requests = state.requests
    state = replace(state, requests=replace(requests, block=requests.block + over))
    state = finish_requests(state, over, requests.limit_reason)
    return replace(state, cache=cache)


def _while_any(
    ready: Callable[[EngineState], Bool[Array, "requests"]],
    event: Callable[[EngineState, Scalar], EngineState],
    state: EngineState,
) -> EngineState:
    """Handles the event of one request after another until no request is ready for it."""
    return lax.while_loop(
        lambda state: ready(state).any(),
        lambda state: event(state, jnp.argmax(ready(state))),
        state,
    )


def spawn_threads(program: Program, state: EngineState) -> EngineState:
    """Gives free rows to threads that wait for one, those of older requests first."""

    def wanted(state):
        return _spawnable(program, state) & ~state.rows.live.all()

    def body(state):
        last = jnp.iinfo(jnp.int32).max
        slot = jnp.argmin(jnp.where(wanted(state), state.requests.ticket, last))
        return _spawn_thread(program, state, slot)

    return lax.while_loop(lambda state: wanted(state).any(), body, state)


def _header(
    program: Program, state: EngineState, slot: Scalar, ordinal: Scalar
) -> tuple[Int32[Array, "padded"], Scalar]:
    """Fork and header of a thread, padded, and their length."""
    tokens = program.tokens
    start = jnp.array((*tokens.fork, *tokens.header_prefix), jnp.int32)
    suffix = jnp.array(tokens.header_suffix, jnp.int32)
    number = state.reader.numbers[slot, ordinal - 1]
    number_len = state.reader.number_len[slot, ordinal - 1]
    padding = jnp.zeros(len(suffix), jnp.int32)
    text = jnp.concatenate([start, number, padding])
    text = lax.dynamic_update_slice(text, suffix, (len(start) + number_len,))
    return text, len(start) + number_len + len(suffix)


def _thread_stop_at(program: Program, state: EngineState, slot: Scalar, body: Scalar) -> Scalar:
    """Where a thread that starts at `body` ends: at its budget, or with room for its closer."""
    room = state.requests.limit[slot] - program.close_len
    return jnp.minimum(body + state.requests.max_thread_tokens[slot], room)


def _open_block(program: Program, state: EngineState, slot: Scalar) -> EngineState:
    state = record_segment(state, slot)
    row = state.requests.row[slot]
    fork_at = state.rows.n_known[row]
    header, header_len = _header(program, state, slot, jnp.int32(1))
    body = fork_at + header_len
    area = slot * program.max_threads
    block = state.requests.block[slot]
    return replace(
        state,
        tokens=lax.dynamic_update_slice(state.tokens, header[None], (area, fork_at)),
        rows=state.rows.put(
            row,
            n_known=body,
            body=body,
            thread=1,
            stop_at=_thread_stop_at(program, state, slot, body),
            unit=unit_number(block, 1),
        ),
        requests=state.requests.put(slot, phase=THREADS),
        threads=state.threads.put(
            slot,
            fork_at=fork_at,
            count=state.reader.count[slot],
            next_spawn=2,
            next_join=1,
            outcome=jnp.zeros(state.threads.outcome.shape[1:], jnp.int32),
        ),
    )


def _spawnable(program: Program, state: EngineState) -> Bool[Array, "requests"]:
    """Requests with a thread that only lacks a row."""
    requests, threads = state.requests, state.threads
    cached = state.rows.n_kv[requests.row] >= threads.fork_at + program.shared_len
    waiting = (requests.phase == THREADS) & (threads.next_spawn <= threads.count)
    return waiting & cached & _next_spawn_fits(program, state)


def _next_spawn_fits(program: Program, state: EngineState) -> Bool[Array, "requests"]:
    """Whether the next thread to spawn has room for a token and its closer in its own context.

    If not, it has none in the joined text either, and its join will end the rollout.
    """
    threads = state.threads
    end = threads.fork_at + len(program.tokens.fork) + program.fixed_header_len
    end += _number_len(state, threads.next_spawn) + 1 + program.close_len
    return end <= state.requests.limit


def _number_len(state: EngineState, ordinal: Int32[Array, "requests"]) -> Int32[Array, "requests"]:
    """Length of each request's thread number; of the last thread's beyond that."""
    index = jnp.clip(ordinal, 1, state.reader.number_len.shape[1]) - 1
    return state.reader.number_len[jnp.arange(len(index)), index]


def _spawn_thread(program: Program, state: EngineState, slot: Scalar) -> EngineState:
    """Starts the next thread in the first free row."""
    threads, ordinal = state.threads, state.threads.next_spawn[slot]
    row = jnp.argmin(state.rows.live)
    fork_at = threads.fork_at[slot]
    header, header_len = _header(program, state, slot, ordinal)
    body = fork_at + header_len
    area = slot * program.max_threads + ordinal - 1
    cached = fork_at + program.shared_len
    state = share_line(program, state, state.requests.row[slot], row, cached)
    return replace(
        state,
        tokens=lax.dynamic_update_slice(state.tokens, header[None], (area, fork_at)),
        rows=state.rows.put(
            row,
            live=True,
            request=slot,
            area=area,
            thread=ordinal,
            waiting=False,
            n_known=body,
            n_kv=cached,
            body=body,
            stop_at=_thread_stop_at(program, state, slot, body),
            unit=unit_number(state.requests.block[slot], ordinal),
            start_step=state.step,
        ),
        threads=threads.put(slot, next_spawn=ordinal + 1),
    )


def _next_join_end(program: Program, state: EngineState) -> Int32[Array, "requests"]:
    """Least length of the joined text behind what comes next: a thread, or the join's tokens."""
    threads = state.threads
    thread = (
        program.fixed_header_len + _number_len(state, threads.next_join) + 1 + program.close_len
    )
    closing = threads.next_join > threads.count
    end = state.rows.n_known[state.requests.row]
    end += jnp.where(closing, len(program.tokens.join) + 1, thread)
    # Thread 1 stands in the joined text already, and was started only because it fits.
    return jnp.where(threads.next_join == 1, 0, end)


def _over(program: Program, state: EngineState) -> Bool[Array, "requests"]:
    """Whether there is no room for what would be joined next, however far that is."""
    return _next_join_end(program, state) > state.requests.limit


def _all_ended(program: Program, state: EngineState) -> Bool[Array, "requests"]:
    """Whether every thread that can run at all has ended."""
    threads = state.threads
    last = jnp.where(_next_spawn_fits(program, state), threads.count, threads.next_spawn - 1)
    ordinal = jnp.arange(1, program.max_threads + 1)[None]
    ended = threads.outcome[:, :, REASON] != RUNNING
    return (ended | (ordinal > last[:, None])).all(axis=1)


def _ready_to_join(program: Program, state: EngineState) -> Bool[Array, "requests"]:
    """Requests whose next thread in order has ended and fits."""
    threads = state.threads
    ordinal = jnp.arange(1, program.max_threads + 1)[None]
    turn = (ordinal == threads.next_join[:, None]) & (ordinal <= threads.count[:, None])
    ready = (turn & (threads.outcome[:, :, REASON] != RUNNING)).any(axis=1)
    if program.deterministic:
        # Joined all at once, so that the cache is filled in the same pieces whatever ran first.
        ready &= _all_ended(program, state)
    return (state.requests.phase == THREADS) & ready & ~_over(program, state)


def _ready_to_close(program: Program, state: EngineState) -> Bool[Array, "requests"]:
    """Requests whose threads have all joined."""
    closing = state.threads.next_join > state.threads.count
    return (state.requests.phase == THREADS) & closing & ~_over(program, state)


def _join_thread(program: Program, state: EngineState, slot: Scalar) -> EngineState:
    """Copies the next thread behind the joined text, closes it, and cuts it at the limit."""
    requests, threads, rows = state.requests, state.threads, state.rows
    ordinal, row = threads.next_join[slot], requests.row[slot]
    outcome = threads.outcome[slot, ordinal - 1]
    own = ordinal == 1  # thread 1 stands in the joined text already
    header_len = program.fixed_header_len + state.reader.number_len[slot, ordinal - 1]
    first = threads.fork_at[slot] + len(program.tokens.fork)
    start = jnp.where(own, first, rows.n_known[row])
    body = start + header_len
    room = requests.limit[slot] - program.close_len - body

    count = jnp.minimum(outcome[COUNT], room)
    cut = count < outcome[COUNT]
    reason = jnp.where(cut, requests.limit_reason[slot], outcome[REASON])
    replaced = reason == EOS
    sampled_end = body + count - replaced
    forced = jnp.where(reason == THREAD_STOP, 0, program.close_len)
    end = sampled_end + forced

    # The slot of a replaced end-of-text token keeps its log-probability under the closer.
    tokens, logprobs = _copy_text(
        state,
        slot,
        program.max_threads,
        ordinal,
        first,
        start,
        jnp.where(own, 0, body + count - start),
    )
    closer = jnp.array(program.tokens.thread_close, jnp.int32)
    area = slot * program.max_threads
    under = lax.dynamic_slice(tokens, (area, sampled_end), (1, len(closer)))
    written = jnp.where(forced > 0, closer[None], under)
    tokens = lax.dynamic_update_slice(tokens, written, (area, sampled_end))

    block = requests.block[slot]
    positions = jnp.stack([start, body, sampled_end, end])
    outcome = outcome.at[REASON].set(reason).at[COUNT].set(count)
    entry = jnp.concatenate([outcome[:OUTCOME_FIELDS], positions])
    summary = jnp.stack([threads.fork_at[slot], end, ordinal])
    return replace(
        state,
        tokens=tokens,
        logprobs=logprobs,
        rows=rows.put(row, n_known=end),
        threads=threads.put(slot, next_join=ordinal + 1),
        records=replace(
            state.records,
            threads=state.records.threads.at[slot, block, ordinal - 1].set(entry),
            blocks=state.records.blocks.at[slot, block].set(summary),
        ),
    )


def _copy_text(
    state: EngineState,
    slot: Scalar,
    max_threads: int,
    ordinal: Scalar,
    source: Scalar,
    target: Scalar,
    length: Scalar,
):
    """Copies `length` positions of a thread's area into the joined text, tokens and logprobs."""
    area = slot * max_threads
    position = jnp.arange(state.tokens.shape[1])
    inside = (position >= target) & (position < target + length)
    origin = jnp.where(inside, position - target + source, 0)

    def copied(store):
        return store.at[area].set(jnp.where(inside, store[area + ordinal - 1][origin], store[area]))

    return copied(state.tokens), copied(state.logprobs)


def _close_block(program: Program, state: EngineState, slot: Scalar) -> EngineState:
    """Appends the join's tokens and lets the parent go on."""
    requests, rows = state.requests, state.rows
    row, block = requests.row[slot], requests.block[slot]
    start = rows.n_known[row]
    end = start + len(program.tokens.join)
    join = jnp.array(program.tokens.join, jnp.int32)[None]
    area = slot * program.max_threads
    summary = jnp.stack([state.threads.fork_at[slot], end, state.threads.count[slot]])
    return replace(
        state,
        tokens=lax.dynamic_update_slice(state.tokens, join, (area, start)),
        rows=rows.put(
            row,
            n_known=end,
            body=end,
            thread=0,
            waiting=False,
            stop_at=requests.limit[slot],
            unit=unit_number(block + 1, 0),
            start_step=state.step,
        ),
        requests=requests.put(slot, phase=SEGMENT, block=block + 1),
        reader=replace(state.reader, count=state.reader.count.at[slot].set(0)),
        records=replace(state.records, blocks=state.records.blocks.at[slot, block].set(summary)),
    )
