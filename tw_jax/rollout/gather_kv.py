"""Joins that keep the threads' keys and values as they are (native schema).

A thread that has ended keeps its row until it joins: its closing text is fed in its own context,
and then its keys and values are copied behind those of the parent. Nothing is computed again.
"""

from dataclasses import replace

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from tw_jax.kernels.column_cache import copy_tokens
from tw_jax.rollout.pages import grow
from tw_jax.rollout.program import Program
from tw_jax.rollout.state import COUNT, REASON, ROW, EngineState

Scalar = Int32[Array, ""]


def close_threads(
    program: Program,
    state: EngineState,
    ended: Bool[Array, "rows"],
    stopped: Bool[Array, "rows"],
    eos: Bool[Array, "rows"],
) -> EngineState:
    """Writes the closing text behind threads that have just ended; their rows feed it and wait."""
    rows = state.rows
    end = rows.n_known - (ended & eos)  # the end of text is not fed
    tokens = _write_closing(program, state, rows.area, end, ended, stopped)
    length = jnp.where(stopped, program.tail_len, program.closing_len)
    return replace(
        state,
        tokens=tokens,
        rows=replace(
            rows,
            n_known=jnp.where(ended, end + length, rows.n_known),
            waiting=rows.waiting | ended,
        ),
    )


def _write_closing(
    program: Program,
    state: EngineState,
    area: Int32[Array, "n"],
    at: Int32[Array, "n"],
    write: Bool[Array, "n"],
    stopped: Bool[Array, "n"],
) -> Int32[Array, "areas store"]:
    tail = program.tokens.thread_tail
    whole = (*program.tokens.thread_close, *tail)
    store = state.tokens
    for index, token in enumerate(whole):
        if index < len(tail):
            token = jnp.where(stopped, tail[index], token)
            here = write
        else:
            here = write & ~stopped
        line = jnp.where(here, area, len(store))
        store = store.at[line, at + index].set(token, mode="drop")
    return store


def _thread_row(state: EngineState) -> Int32[Array, "requests"]:
    """The row in which each request's next thread to join lies, once it has ended."""
    threads = state.threads
    index = jnp.clip(threads.next_join, 1, threads.outcome.shape[1]) - 1
    row = threads.outcome[jnp.arange(len(index)), index, ROW]
    return jnp.where(threads.next_join == 1, state.requests.row, row)


def all_fed(state: EngineState) -> Bool[Array, "requests"]:
    """Whether all of each request's next thread, and of its parent, is in the cache."""
    rows = state.rows
    fed = rows.n_kv == rows.n_known
    return fed[_thread_row(state)] & fed[state.requests.row]


def needs_cut(state: EngineState, room: Int32[Array, "requests"]) -> Bool[Array, "requests"]:
    """Whether each request's next thread has sampled more than there is room for."""
    threads = state.threads
    index = jnp.clip(threads.next_join, 1, threads.outcome.shape[1]) - 1
    return threads.outcome[jnp.arange(len(index)), index, COUNT] > room


def cut_thread(program: Program, state: EngineState, slot: Scalar, room: Scalar) -> EngineState:
    """Cuts the next thread to the room that is left; its row feeds the closing text again."""
    rows, threads = state.rows, state.threads
    row, ordinal = _thread_row(state)[slot], threads.next_join[slot]
    end = rows.body[row] + room
    one = jnp.ones(1, bool)
    tokens = _write_closing(program, state, rows.area[row][None], end[None], one, ~one)
    outcome = threads.outcome.at[slot, ordinal - 1, COUNT].set(room)
    outcome = outcome.at[slot, ordinal - 1, REASON].set(state.requests.limit_reason[slot])
    return replace(
        state,
        tokens=tokens,
        threads=replace(threads, outcome=outcome),
        rows=rows.put(
            row, n_known=end + program.closing_len, n_kv=jnp.minimum(rows.n_kv[row], end)
        ),
    )


def adopt_tokens(
    program: Program,
    state: EngineState,
    slot: Scalar,
    ordinal: Scalar,
    start: Scalar,
    first: Scalar,
    closing: Scalar,
) -> EngineState:
    """Copies a thread's keys and values to its place in the joined text, and frees its row.

    Args:
      program: the program.
      state: the thread's tokens stand in the joined text already.
      slot: the request.
      ordinal: the thread.
      start: its place in the joined text.
      first: its place in its own context.
      closing: place of its closing tag, behind `start`.
    """
    row = state.requests.row[slot]
    own = ordinal == 1  # thread 1 lies where it belongs
    thread_row = jnp.where(own, row, state.threads.outcome[slot, ordinal - 1, ROW])
    end = state.rows.n_known[row]
    length = jnp.where(own, 0, end - start)
    page_size, chunk = program.layout.page_size, program.prefill_chunk

    pages = lax.while_loop(
        lambda pages: pages.held[row] * page_size < end,
        lambda pages: grow(pages, row, program.rows),
        state.pages,
    )

    def copy(carry):
        cache, done = carry
        offset = done + jnp.arange(chunk)
        valid = offset < length
        offset = jnp.where(valid, offset, 0)
        cache = copy_tokens(
            cache,
            pages.pages[thread_row],
            first + offset,
            pages.pages[row],
            start + offset,
            valid,
        )
        return cache, done + chunk

    cache, _ = lax.while_loop(
        lambda carry: carry[1] < length, copy, (state.cache, jnp.zeros_like(length))
    )
    position = first + closing + state.rows.shift[thread_row]
    last = jnp.maximum(state.threads.last_position[slot], position)
    return replace(
        state,
        cache=cache,
        pages=pages,
        threads=state.threads.put(slot, last_position=last),
        rows=replace(
            state.rows.put(row, n_kv=end),
            live=state.rows.live.at[thread_row].set(own),
        ),
    )
