"""The jitted loop: every step feeds one token of every live row.

One step:
  1. the prefill lane feeds chunks of the rows that have most known tokens ahead of their cache;
  2. the decode lane feeds one token of every live row;
  3. rows whose cache has caught up sample their next token;
  4. units end, outline numbers are read, threads are joined and spawned, rollouts end.

The host takes no part in any of it. It admits requests and collects finished ones between
dispatches.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from tw_jax.kernels.slot_attention import SlotCache, attend_chunks, attend_rows, write_tokens
from tw_jax.models import Params, Qwen3, head_matrix, unstack_layers
from tw_jax.rollout.outlines import read_token
from tw_jax.rollout.sampling import sample_tokens, token_noise
from tw_jax.rollout.spawn_join import (
    block_fits,
    finish_requests,
    join_threads,
    open_blocks,
    spawn_threads,
)
from tw_jax.rollout.state import (
    EOS,
    FINISHED,
    LENGTH,
    SEGMENT,
    THREAD_STOP,
    EngineState,
    Program,
)

# Steps without any row fed before the loop gives up: a spawn may need one to become feedable.
MAX_IDLE_STEPS = 3


class _Network:
    """The model with its weights laid out for decoding, outside the loop.

    Layers are unrolled everywhere: a scan over them would slice weights and cache in every step.
    """

    def __init__(self, model: Qwen3, params: Params) -> None:
        self.model = model
        self.layers = unstack_layers(params)
        self.head = head_matrix(params)

    def hidden_states(self, tokens, positions, attend, cache: SlotCache):
        """Runs the layers; `attend` writes the cache, then reads it."""
        return self.model.hidden_states(tokens, positions, attend, cache, layers=self.layers)

    def logits(self, hidden: Float32[Array, "rows hidden"]) -> Float32[Array, "rows vocab"]:
        """Logits of each row."""
        return self.model.logits(hidden, self.head)


def advance(
    program: Program,
    model: Qwen3,
    params: Params,
    state: EngineState,
    max_steps: Int32[Array, ""],
    max_finished: Int32[Array, ""],
) -> tuple[EngineState, Int32[Array, "requests_and_three"]]:
    """Runs until `max_steps` are done, `max_finished` rollouts wait, or no row is live.

    Returns:
      The state, and all that the host must read back: the phase of every request slot, the number
      of free rows, the step counter, and the idle steps at the end.
    """
    network = _Network(model, params)
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
    return state, jnp.concatenate(
        [state.requests.phase, jnp.stack([free, state.step, state.idle_steps])]
    )


def _step(program: Program, network: _Network, state: EngineState) -> EngineState:
    cached_before = state.rows.n_kv
    state = _prefill_lane(program, network, state)
    state, token, sampled = _decode_lane(program, network, state)
    with jax.named_scope("events"):
        state = _end_threads(program, state, token, sampled)
        state = _read_segments(program, state, token, sampled)
        state = join_threads(program, state)
        state = spawn_threads(program, state)
    moved = (state.rows.n_kv != cached_before).any()
    idle_steps = jnp.where(moved, 0, state.idle_steps + 1)
    return replace(state, step=state.step + 1, idle_steps=idle_steps)


def _by_length(program: Program, length: Int32[Array, ""], attend):
    """Runs `attend(blocks)` with the least number of cache blocks that holds `length` positions."""
    layout = program.layout
    if program.deterministic:  # sums of another length may round differently
        return attend(layout.blocks)
    branches = [functools.partial(attend, blocks + 1) for blocks in range(layout.blocks)]
    return lax.switch((length - 1) // layout.block_len, branches)


def _prefill_lane(program: Program, network: _Network, state: EngineState) -> EngineState:
    """Feeds known tokens in chunks, all but each row's last: that one is the decode lane's."""
    rows = state.rows
    pending = jnp.where(rows.live, rows.n_known - 1 - rows.n_kv, 0)
    if program.deterministic:
        pending = jnp.where(rows.waiting, 0, pending)
    size, row = lax.top_k(pending, program.prefill_rows)
    size = jnp.minimum(size, program.prefill_chunk)

    def feed(cache: SlotCache, n_kv: Int32[Array, "rows"]):
        offset = jnp.arange(program.prefill_chunk)[None]
        positions = n_kv[row][:, None] + offset
        valid = offset < size[:, None]
        tokens = state.tokens[state.rows.area[row][:, None], positions]
        end = jnp.where(valid, positions, 0).max() + 1
        lane_rows = jnp.broadcast_to(row[:, None], positions.shape)

        def attend(q, k, v, layer, cache):
            cache = write_tokens(cache, layer, lane_rows, positions, valid, k, v)

            def over(blocks: int):
                return attend_chunks(q, cache, layer, row, positions, blocks)

            return _by_length(program, end, over), cache

        _, cache = network.hidden_states(tokens, positions, attend, cache)
        return cache, n_kv.at[row].add(size)

    def rest(cache: SlotCache, n_kv: Int32[Array, "rows"]):
        return cache, n_kv

    with jax.named_scope("prefill_lane"):
        busy = size.sum() >= program.prefill_min
        cache, n_kv = lax.cond(busy, feed, rest, state.cache, rows.n_kv)
    return replace(state, cache=cache, rows=replace(rows, n_kv=n_kv))


def _decode_lane(
    program: Program, network: _Network, state: EngineState
) -> tuple[EngineState, Int32[Array, "rows"], Bool[Array, "rows"]]:
    """Feeds one token per row and samples where the cache has caught up.

    Returns:
      The state, each row's sampled token, and whether it sampled one.
    """
    rows, requests = state.rows, state.requests
    pending = rows.n_known - 1 - rows.n_kv
    feeds = rows.live & (~rows.waiting | (pending > 0))
    if program.deterministic:  # pending tokens only through the lane, in chunks of its own
        feeds = rows.live & ~rows.waiting & (pending == 0)
    # Rows that rest keep a position inside the cache; what they compute is dropped.
    positions = jnp.minimum(rows.n_kv, program.context_len - 1)
    tokens = state.tokens[rows.area, positions]
    all_rows = jnp.arange(program.rows)
    end = jnp.where(feeds, positions, 0).max() + 1

    def attend(q, k, v, layer, cache):
        cache = write_tokens(cache, layer, all_rows, positions, feeds, k, v)

        def over(blocks: int):
            return attend_rows(q, cache, layer, positions, blocks)

        return _by_length(program, end, over), cache

    with jax.named_scope("decode_lane"):
        hidden, cache = network.hidden_states(tokens, positions, attend, state.cache)
        logits = network.logits(hidden)

    sampled = feeds & ~rows.waiting & (pending == 0)

    def noise():
        return token_noise(requests.key[rows.request], rows.unit, rows.n_known, program.vocab)

    with jax.named_scope("sample"):
        token, logprob = sample_tokens(
            logits,
            noise,
            requests.sampling.take(rows.request),
            sampled,
            functools.partial(_own_context, program, state),
        )
    area = jnp.where(sampled, rows.area, len(state.tokens))
    return (
        replace(
            state,
            cache=cache,
            tokens=state.tokens.at[area, rows.n_known].set(token, mode="drop"),
            logprobs=state.logprobs.at[area, rows.n_known].set(logprob, mode="drop"),
            rows=replace(
                rows,
                n_kv=rows.n_kv + feeds,
                n_known=rows.n_known + sampled,
                start_step=jnp.where(
                    sampled & (rows.n_known == rows.body), state.step, rows.start_step
                ),
            ),
        ),
        token,
        sampled,
    )


def _own_context(
    program: Program, state: EngineState
) -> tuple[Int32[Array, "rows store"], Int32[Array, "rows"], Int32[Array, "rows"]]:
    """What each row's unit sees, and from where to where it has sampled itself.

    Threads from the second on see the joined text up to the fork only.
    """
    rows = state.rows
    joined = state.tokens[rows.request * program.max_threads]
    before_fork = jnp.arange(joined.shape[1])[None] < state.threads.fork_at[rows.request][:, None]
    inherited = (rows.thread[:, None] > 1) & before_fork
    return jnp.where(inherited, joined, state.tokens[rows.area]), rows.body, rows.n_known


def _end_threads(
    program: Program,
    state: EngineState,
    token: Int32[Array, "rows"],
    sampled: Bool[Array, "rows"],
) -> EngineState:
    """Notes the outcome of threads that ended; their rows are free, thread 1's waits."""
    rows, requests = state.rows, state.requests
    stopped, eos = token == program.tokens.thread_stop, token == program.eos_id
    spent = rows.n_known >= rows.stop_at
    ended = sampled & (rows.thread > 0) & (stopped | eos | spent)
    count = rows.n_known - rows.body
    budget_spent = count >= requests.max_thread_tokens[rows.request]
    reason = jnp.select(
        [stopped, eos, budget_spent],
        [THREAD_STOP, EOS, LENGTH],
        requests.limit_reason[rows.request],
    )
    step = jnp.broadcast_to(state.step, count.shape)
    outcome = jnp.stack([count, reason, jnp.arange(program.rows), rows.start_step, step], axis=1)
    slot = jnp.where(ended, rows.request, program.requests)
    table = state.threads.outcome.at[slot, rows.thread - 1].set(outcome, mode="drop")
    return replace(
        state,
        threads=replace(state.threads, outcome=table),
        rows=replace(
            rows,
            waiting=rows.waiting | (ended & (rows.thread == 1)),
            live=rows.live & ~(ended & (rows.thread > 1)),
        ),
    )


def _read_segments(
    program: Program,
    state: EngineState,
    token: Int32[Array, "rows"],
    sampled: Bool[Array, "rows"],
) -> EngineState:
    """Reads the new token of every request's sequential text: it goes on, spawns or ends."""
    requests = state.requests
    active = (requests.phase == SEGMENT) & sampled[requests.row]
    new = token[requests.row]
    reader, asks = read_token(
        state.reader, program.alphabet, new, active & requests.parallel, requests.max_threads
    )
    state = replace(state, reader=reader)
    eos = active & (new == program.eos_id)
    full = active & (state.rows.n_known[requests.row] >= requests.limit)
    spawns, cramped = split_spawns(program, state, asks & ~eos & ~full)
    state = open_blocks(program, state, spawns)
    ending = eos | full | cramped
    reason = jnp.where(eos, EOS, requests.limit_reason)
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
