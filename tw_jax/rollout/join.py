"""Joining inside the jitted loop.

Threads join in order, each as soon as it is finished, by copying their tokens behind the joined
text. Where the schema re-encodes (ThreadWeaver), the parent's row then feeds them like any other
known tokens; where it keeps keys and values (native, see `tw_jax.rollout.gather_kv`), they are
copied along. Where threads return messages (APR, see `tw_jax.rollout.messages`), only those are
appended, and the row feeds them.

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

from tw_jax.rollout.finish import finish_requests
from tw_jax.rollout.gather_kv import adopt_tokens, all_fed, cut_thread, needs_cut
from tw_jax.rollout.messages import join_message
from tw_jax.rollout.program import Program
from tw_jax.rollout.sampling import unit_number
from tw_jax.rollout.spawn import next_spawn_fits, number_len
from tw_jax.rollout.state import (
    COUNT,
    EOS,
    OUTCOME_FIELDS,
    REASON,
    RUNNING,
    SEGMENT,
    THREAD_STOP,
    THREADS,
    EngineState,
)

Scalar = Int32[Array, ""]


def join_threads(program: Program, state: EngineState) -> EngineState:
    """Joins every thread whose turn it is, and closes blocks whose threads have all joined.

    Rollouts without room for what would be joined next end here.
    """
    join = join_message if program.messages else _join_thread
    events = [(_ready_to_join, join), (_ready_to_close, _close_block)]
    cache = state.cache
    if program.gathers:
        events.insert(0, (_ready_to_cut, _cut_thread))
    else:  # the cache takes no part: kept out of the loops, it cannot be copied by them
        state = replace(state, cache=None)
    # Joining can make a block ready to close, closing makes nothing ready: one pass is enough.
    for ready, event in events:
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
    return state if program.gathers else replace(state, cache=cache)


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


def _next_join_end(program: Program, state: EngineState) -> Int32[Array, "requests"]:
    """Least length of the joined text behind what comes next: a thread, or the join's tokens."""
    threads = state.threads
    thread = program.fixed_header_len + number_len(state, threads.next_join)
    thread += 1 + program.closing_len
    closing = threads.next_join > threads.count
    end = state.rows.n_known[state.requests.row]
    if program.messages:  # the answer's length shows when it joins
        return jnp.where(closing, end + len(program.tokens.join) + 1, 0)
    end += jnp.where(closing, len(program.tokens.join) + 1, thread)
    # Thread 1 stands in the joined text already, and was started only because it fits.
    return jnp.where(threads.next_join == 1, 0, end)


def _over(program: Program, state: EngineState) -> Bool[Array, "requests"]:
    """Whether there is no room for what would be joined next, however far that is."""
    return _next_join_end(program, state) > state.requests.limit


def _all_ended(program: Program, state: EngineState) -> Bool[Array, "requests"]:
    """Whether every thread that can run at all has ended."""
    threads = state.threads
    last = jnp.where(next_spawn_fits(program, state), threads.count, threads.next_spawn - 1)
    if program.messages:
        last = threads.count
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
    ready &= (state.requests.phase == THREADS) & ~_over(program, state)
    if program.gathers:
        ready &= all_fed(state) & ~needs_cut(state, _room(program, state))
    return ready


def _ready_to_cut(program: Program, state: EngineState) -> Bool[Array, "requests"]:
    """Requests whose next thread in order has ended, and is too long."""
    threads = state.threads
    turn = jnp.arange(1, program.max_threads + 1)[None] == threads.next_join[:, None]
    ended = (turn & (threads.outcome[:, :, REASON] != RUNNING)).any(axis=1)
    ended &= (state.requests.phase == THREADS) & (threads.next_join <= threads.count)
    if program.deterministic:
        ended &= _all_ended(program, state)
    return ended & ~_over(program, state) & needs_cut(state, _room(program, state))


def _cut_thread(program: Program, state: EngineState, slot: Scalar) -> EngineState:
    return cut_thread(program, state, slot, _room(program, state)[slot])


def _room(program: Program, state: EngineState) -> Int32[Array, "requests"]:
    """Sampled tokens of each request's next thread that fit behind the joined text."""
    threads, requests = state.threads, state.requests
    end = state.rows.n_known[requests.row]
    own = threads.fork_at + len(program.tokens.fork)
    start = jnp.where(threads.next_join == 1, own, end)
    header = program.fixed_header_len + number_len(state, threads.next_join)
    return requests.limit - program.closing_len - start - header


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
    room = requests.limit[slot] - program.closing_len - body

    count = jnp.minimum(outcome[COUNT], room)
    cut = count < outcome[COUNT]
    reason = jnp.where(cut, requests.limit_reason[slot], outcome[REASON])
    replaced = reason == EOS
    sampled_end = body + count - replaced
    forced = jnp.where(reason == THREAD_STOP, 0, program.close_len)
    end = sampled_end + forced

    # Kept keys and values come with the closing text that was fed behind them.
    copied_end = end + program.tail_len if program.gathers else body + count
    # The slot of a replaced end-of-text token keeps its log-probability under the closer.
    tokens, logprobs = _copy_text(
        state,
        slot,
        program.areas,
        ordinal,
        first,
        start,
        jnp.where(own, 0, copied_end - start),
    )
    closer = jnp.array(program.tokens.thread_close, jnp.int32)
    area = slot * program.areas
    under = lax.dynamic_slice(tokens, (area, sampled_end), (1, len(closer)))
    written = jnp.where(forced > 0, closer[None], under)
    tokens = lax.dynamic_update_slice(tokens, written, (area, sampled_end))

    block = requests.block[slot]
    outcome = outcome.at[REASON].set(reason).at[COUNT].set(count)
    joined_end = end + program.tail_len
    positions = jnp.stack([start, body, sampled_end, end, joined_end])
    entry = jnp.concatenate([outcome[:OUTCOME_FIELDS], positions])
    summary = jnp.stack([threads.fork_at[slot], joined_end, ordinal])
    state = replace(
        state,
        tokens=tokens,
        logprobs=logprobs,
        rows=rows.put(row, n_known=joined_end),
        threads=threads.put(slot, next_join=ordinal + 1),
        records=replace(
            state.records,
            threads=state.records.threads.at[slot, block, ordinal - 1].set(entry),
            blocks=state.records.blocks.at[slot, block].set(summary),
        ),
    )
    if program.gathers:
        return adopt_tokens(program, state, slot, ordinal, start, first, end - 1 - start)
    return state


def _copy_text(
    state: EngineState,
    slot: Scalar,
    areas: int,
    ordinal: Scalar,
    source: Scalar,
    target: Scalar,
    length: Scalar,
):
    """Copies `length` positions of a thread's area into the joined text, tokens and logprobs."""
    area = slot * areas
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
    area = slot * program.areas
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
            **_behind(program, state, slot, start),
        ),
        requests=requests.put(slot, phase=SEGMENT, block=block + 1),
        reader=replace(state.reader, count=state.reader.count.at[slot].set(0)),
        records=replace(state.records, blocks=state.records.blocks.at[slot, block].set(summary)),
    )


def _behind(program: Program, state: EngineState, slot: Scalar, start: Scalar) -> dict[str, Scalar]:
    """Positions behind a join that keeps keys and values: they go on behind the longest thread."""
    if not program.gathers:
        return {}
    return {"shift": state.threads.last_position[slot] + 1 - start, "bend": jnp.int32(0)}
