"""The jitted loop: every step feeds one token of every live row.

One step:
  1. rows that wait to share another's beginning do, and rows get the pages that they may write;
  2. the prefill lane feeds chunks of the rows that have most known tokens ahead of their cache;
  3. the decode lane feeds one token of every row that does not wait for a join;
  4. rows whose cache has caught up sample their next token;
  5. units end, outline numbers are read, threads are joined and spawned, rollouts end.

The host takes no part in any of it. It admits requests and collects finished ones between
dispatches.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from tw_jax.models import Qwen3
from tw_jax.rollout.finish import finish_requests
from tw_jax.rollout.gather_kv import close_threads
from tw_jax.rollout.join import join_threads
from tw_jax.rollout.lanes import decode_lane, prefill_lane
from tw_jax.rollout.network import Network
from tw_jax.rollout.outlines import read_token
from tw_jax.rollout.page_events import adopt_prefixes, assign_pages, release_pages
from tw_jax.rollout.program import Program
from tw_jax.rollout.spawn import block_fits, open_blocks, spawn_threads
from tw_jax.rollout.state import (
    CONTEXT,
    EOS,
    FINISHED,
    LENGTH,
    SEGMENT,
    STOPPED,
    THREAD_STOP,
    EngineState,
)
from tw_jax.rollout.weights import Weights

# Steps without any row fed before the loop gives up: a spawn may need one to become feedable.
MAX_IDLE_STEPS = 3


def advance(
    program: Program,
    model: Qwen3,
    weights: Weights,
    state: EngineState,
    max_steps: Int32[Array, ""],
    max_finished: Int32[Array, ""],
) -> tuple[EngineState, Int32[Array, "status"]]:
    """Runs until `max_steps` are done, `max_finished` rollouts wait, or no row is live.

    Returns:
      The state, and all that the host must read back: the phase and the cached tokens of every
      request slot, the number of free rows, the step counter, and the idle steps at the end.
    """
    network = Network(model, weights)
    last = state.step + max_steps

    def running(state: EngineState) -> Bool[Array, ""]:
        finished = (state.requests.phase == FINISHED).sum()
        return (
            (state.step < last)
            & state.rows.live.any()
            & (finished < max_finished)
            & (state.idle_steps < MAX_IDLE_STEPS)
        )

    state = lax.while_loop(running, functools.partial(_step, program, network), state)
    free = (~state.rows.live).sum()
    cached = state.rows.n_kv[state.requests.row]
    scalars = jnp.stack([free, state.step, state.idle_steps])
    return state, jnp.concatenate([state.requests.phase, cached, scalars])


def _step(program: Program, network: Network, state: EngineState) -> EngineState:
    cached_before = state.rows.n_kv
    state = adopt_prefixes(program, state)
    state = assign_pages(program, state)
    state = prefill_lane(program, network, state)
    state, token, sampled, stop = decode_lane(program, network, state)
    with jax.named_scope("events"):
        state = _end_threads(program, state, token, sampled, stop)
        state = _read_segments(program, state, token, sampled, stop)
        state = join_threads(program, state)
        state = release_pages(program, state)
        state = spawn_threads(program, state)
    moved = (state.rows.n_kv != cached_before).any()
    idle_steps = jnp.where(moved, 0, state.idle_steps + 1)
    return replace(state, step=state.step + 1, idle_steps=idle_steps)


def _end_threads(
    program: Program,
    state: EngineState,
    token: Int32[Array, "rows"],
    sampled: Bool[Array, "rows"],
    stop: Bool[Array, "rows"],
) -> EngineState:
    """Notes the outcome of threads that ended; their rows are free, thread 1's waits."""
    rows, requests = state.rows, state.requests
    stopped, eos = token == program.tokens.thread_stop, token == program.eos_id
    spent = rows.n_known >= rows.stop_at
    ended = sampled & (rows.thread > 0) & (stopped | eos | spent | stop)
    count = rows.n_known - rows.body
    budget_spent = count >= requests.max_thread_tokens[rows.request]
    reason = jnp.select(
        [stopped, eos, stop, budget_spent],
        [THREAD_STOP, EOS, STOPPED, LENGTH],
        # A thread that hears messages only has a context of its own to fill.
        CONTEXT if program.messages else requests.limit_reason[rows.request],
    )
    step = jnp.broadcast_to(state.step, count.shape)
    outcome = jnp.stack([count, reason, jnp.arange(program.rows), rows.start_step, step], axis=1)
    slot = jnp.where(ended, rows.request, program.requests)
    table = state.threads.outcome.at[slot, rows.thread - 1].set(outcome, mode="drop")
    state = replace(state, threads=replace(state.threads, outcome=table))
    if program.gathers:
        return close_threads(program, state, ended, stopped, eos)
    stays = ended & (rows.thread == 1) & (not program.messages)  # in the parent's row
    return replace(
        state, rows=replace(rows, waiting=rows.waiting | stays, live=rows.live & (~ended | stays))
    )


def _read_segments(
    program: Program,
    state: EngineState,
    token: Int32[Array, "rows"],
    sampled: Bool[Array, "rows"],
    stop: Bool[Array, "rows"],
) -> EngineState:
    """Reads the new token of every request's sequential text: it goes on, spawns or ends."""
    requests = state.requests
    active = (requests.phase == SEGMENT) & sampled[requests.row]
    new = token[requests.row]
    reader, asks = read_token(
        state.reader,
        program.alphabet,
        new,
        active & requests.parallel,
        requests.max_threads,
        state.rows.n_known[requests.row] - 1,
    )
    state = replace(state, reader=reader)
    eos = active & (new == program.eos_id)
    full = active & (state.rows.n_known[requests.row] >= requests.limit)
    halted = active & stop[requests.row]
    spawns, cramped = split_spawns(program, state, asks & ~eos & ~full & ~halted)
    state = open_blocks(program, state, spawns)
    ending = eos | full | cramped | halted
    reason = jnp.select([eos, halted], [EOS, STOPPED], requests.limit_reason)
    return end_segments(state, ending, reason)


def split_spawns(
    program: Program, state: EngineState, asks: Bool[Array, "requests"]
) -> tuple[Bool[Array, "requests"], Bool[Array, "requests"]]:
    """Splits usable spawn triggers into those that open a block and those that lack the room.

    A trigger beyond the request's number of blocks is plain text and in neither.
    """
    asks &= state.requests.block < state.requests.max_blocks
    fits = block_fits(program, state)
    return asks & fits, asks & ~fits


def end_segments(
    state: EngineState, ending: Bool[Array, "requests"], reason: Int32[Array, "requests"]
) -> EngineState:
    """Ends rollouts in their sequential text, and notes that last segment."""
    row = state.requests.row
    slots = jnp.arange(len(row))
    entry = jnp.stack(
        [row, state.rows.start_step[row], jnp.broadcast_to(state.step, row.shape)], axis=1
    )
    at = jnp.where(ending, slots, len(row))
    segments = state.records.segments.at[at, state.requests.block].set(entry, mode="drop")
    state = replace(state, records=replace(state.records, segments=segments))
    return finish_requests(state, ending, reason)
