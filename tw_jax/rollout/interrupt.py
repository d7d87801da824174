"""Ends running rollouts on the host's word: cancelled, or out of time."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from tw_jax.rollout.finish import finish_requests
from tw_jax.rollout.page_events import release_pages
from tw_jax.rollout.program import Program
from tw_jax.rollout.state import SEGMENT, THREADS, EngineState


def interrupt_requests(
    program: Program, state: EngineState, ending: Bool[Array, "requests"], reason: Int32[Array, ""]
) -> EngineState:
    """Ends the given requests that run, with the text that has been joined so far."""
    requests, threads, rows = state.requests, state.threads, state.rows
    forked = requests.phase == THREADS
    ending = ending & (forked | (requests.phase == SEGMENT))
    row, slots = requests.row, jnp.arange(len(requests.row))
    # Threads that have joined are part of the result; what thread 1 wrote before it joined is not.
    some_joined = forked & (threads.next_join > 1)
    length = jnp.where(forked & ~some_joined, threads.fork_at, rows.n_known[row])
    step = jnp.broadcast_to(state.step, row.shape)
    entry = jnp.stack([row, rows.start_step[row], step], axis=1)
    at = jnp.where(ending & ~forked, slots, len(row))
    segments = state.records.segments.at[at, requests.block].set(entry, mode="drop")
    state = replace(
        state,
        records=replace(state.records, segments=segments),
        requests=replace(requests, block=requests.block + (ending & some_joined)),
    )
    state = finish_requests(state, ending, jnp.broadcast_to(reason, row.shape))
    length = jnp.where(ending, length, state.requests.length)
    state = replace(state, requests=replace(state.requests, length=length))
    return release_pages(program, state)
