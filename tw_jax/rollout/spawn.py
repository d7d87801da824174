"""Spawning inside the jitted loop.

Every event is handled on scalars, one request at a time, in `while_loop`s that make no trip when
nothing happens; several events of one step take several trips.

The parent's row goes on as thread 1. Threads 2..n wait until the cache of the parent's row covers
what all threads share, then each takes a free row when there is one, and shares the pages of that
row. Where threads exchange messages instead (APR, see `tw_jax.rollout.messages`), every thread
takes a free row and shares nothing.
"""

from dataclasses import replace

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from tw_jax.rollout.finish import record_segment
from tw_jax.rollout.messages import ANSWER_TAGS, open_messages, start_thread
from tw_jax.rollout.page_events import share_line
from tw_jax.rollout.program import Program
from tw_jax.rollout.sampling import unit_number
from tw_jax.rollout.state import THREADS, EngineState

Scalar = Int32[Array, ""]


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
    """Whether thread 1 with one token fits behind the text of each request's row.

    Where threads exchange messages: whether an empty answer does.
    """
    end = state.rows.n_known[state.requests.row] + len(program.tokens.fork)
    if program.messages:
        return end + ANSWER_TAGS <= state.requests.limit
    end += program.fixed_header_len + state.reader.number_len[:, 0]
    return end + 1 + program.closing_len <= state.requests.limit


def spawn_threads(program: Program, state: EngineState) -> EngineState:
    """Gives free rows to threads that wait for one.

    Requests whose join is nearest come first: those with the fewest threads left to start, and of
    them the oldest. Nobody starves: new requests enter between dispatches, when rows are free, and
    none is free while a thread only lacks one.
    """

    def wanted(state):
        return _spawnable(program, state) & ~state.rows.live.all()

    def body(state):
        most = jnp.iinfo(jnp.int32).max
        left = state.threads.count - state.threads.next_spawn
        left = jnp.where(wanted(state), left, most)
        slot = jnp.argmin(jnp.where(left == left.min(), state.requests.ticket, most))
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
    room = state.requests.limit[slot] - program.closing_len
    return jnp.minimum(body + state.requests.max_thread_tokens[slot], room)


def _open_block(program: Program, state: EngineState, slot: Scalar) -> EngineState:
    state = record_segment(state, slot)
    if program.messages:
        return open_messages(program, state, slot)
    row = state.requests.row[slot]
    fork_at = state.rows.n_known[row]
    header, header_len = _header(program, state, slot, jnp.int32(1))
    body = fork_at + header_len
    area = slot * program.areas
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
            **_bent(program, state, row, fork_at),
        ),
        requests=state.requests.put(slot, phase=THREADS),
        threads=state.threads.put(
            slot,
            fork_at=fork_at,
            count=state.reader.count[slot],
            next_spawn=2,
            next_join=1,
            last_position=0,
            outcome=jnp.zeros(state.threads.outcome.shape[1:], jnp.int32),
        ),
    )


def _bent(program: Program, state: EngineState, row: Scalar, fork_at: Scalar) -> dict[str, Scalar]:
    """Positions of a row whose threads all start at the fork's own (native: `shared_start`)."""
    if not program.gathers:
        return {}
    shift, fork_len = state.rows.shift[row], len(program.tokens.fork)
    return {"shift_before": shift, "shift": shift - fork_len, "bend": fork_at + fork_len}


def _spawnable(program: Program, state: EngineState) -> Bool[Array, "requests"]:
    """Requests with a thread that only lacks a row."""
    requests, threads = state.requests, state.threads
    if program.messages:
        return (requests.phase == THREADS) & (threads.next_spawn <= threads.count)
    cached = state.rows.n_kv[requests.row] >= threads.fork_at + program.shared_len
    waiting = (requests.phase == THREADS) & (threads.next_spawn <= threads.count)
    return waiting & cached & next_spawn_fits(program, state)


def next_spawn_fits(program: Program, state: EngineState) -> Bool[Array, "requests"]:
    """Whether the next thread to spawn has room for a token and its closer in its own context.

    If not, it has none in the joined text either, and its join will end the rollout.
    """
    threads = state.threads
    end = threads.fork_at + len(program.tokens.fork) + program.fixed_header_len
    end += number_len(state, threads.next_spawn) + 1 + program.closing_len
    return end <= state.requests.limit


def number_len(state: EngineState, ordinal: Int32[Array, "requests"]) -> Int32[Array, "requests"]:
    """Length of each request's thread number; of the last thread's beyond that."""
    index = jnp.clip(ordinal, 1, state.reader.number_len.shape[1]) - 1
    return state.reader.number_len[jnp.arange(len(index)), index]


def _spawn_thread(program: Program, state: EngineState, slot: Scalar) -> EngineState:
    """Starts the next thread in the first free row."""
    if program.messages:
        return start_thread(program, state, slot)
    threads, ordinal = state.threads, state.threads.next_spawn[slot]
    row = jnp.argmin(state.rows.live)
    fork_at = threads.fork_at[slot]
    header, header_len = _header(program, state, slot, ordinal)
    body = fork_at + header_len
    area = slot * program.areas + ordinal - 1
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
            shift=state.rows.shift[state.requests.row[slot]],
            bend=0,
        ),
        threads=threads.put(slot, next_spawn=ordinal + 1),
    )
