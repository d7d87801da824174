"""The two ways in which tokens are fed: chunks of known ones, and one token of every live row."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from tw_jax.kernels.column_attention import attend_chunks, attend_rows, plan_reads
from tw_jax.kernels.column_cache import ColumnCache, write_tokens
from tw_jax.rollout.controller import RowController, RowView
from tw_jax.rollout.network import Network, front_rows, row_buckets
from tw_jax.rollout.program import Program
from tw_jax.rollout.sampling import sample_tokens, token_noise
from tw_jax.rollout.sampling_table import SamplingTable
from tw_jax.rollout.state import EngineState, ahead, rotary_positions

# Fewest pending tokens that are fed as a chunk where no row can sample.
_IDLE_MIN_TOKENS = 2
# Chunks in one step at most, so that the host is never long without an answer.
_MOST_CHUNKS = 8
# A short chunk is this part of a whole one, if it has so many tokens.
_SHORT_CHUNK, _LEAST_CHUNK = 4, 8

_Fed = tuple[ColumnCache, Int32[Array, "rows"], Int32[Array, ""]]  # cache, n_kv, chunks so far


def prefill_lane(program: Program, network: Network, state: EngineState) -> EngineState:
    """Feeds known tokens in chunks, all but each row's last: that one is the decode lane's.

    One chunk, or several where no row could sample in the meantime.
    """
    rows = state.rows
    fed = rows.live & (rows.source < 0)
    lengths = chunk_lengths(program)

    def pending_of(n_kv: Int32[Array, "rows"]) -> Int32[Array, "rows"]:
        pending = jnp.where(fed, ahead(program, replace(rows, n_kv=n_kv)), 0)
        if program.deterministic and not program.gathers:
            pending = jnp.where(rows.waiting, 0, pending)
        return pending

    def busy(above: int, carry: _Fed) -> Bool[Array, ""]:
        _, n_kv, chunks = carry
        pending = pending_of(n_kv)
        size, _ = _chunks(program, pending)
        idle = ~(fed & ~rows.waiting & (pending == 0)).any()
        # One by one, known tokens cost nothing beside rows that sample, and a step each else.
        least = jnp.where(idle, min(program.prefill_min, _IDLE_MIN_TOKENS), program.prefill_min)
        enough = (size.sum() >= least) & (size.max() > above)
        return enough & ((chunks == 0) | idle & (chunks < _MOST_CHUNKS))

    def feed(length: int, carry: _Fed) -> _Fed:
        cache, n_kv, chunks = carry
        size, row = _chunks(program, pending_of(n_kv))
        table = state.pages.pages[row]
        offset = jnp.arange(length)[None]
        positions = n_kv[row][:, None] + offset
        valid = offset < size[:, None]
        tokens = state.tokens[rows.area[row][:, None], positions]
        longest = jnp.where(valid, positions + 1, 0).max()
        places = jnp.broadcast_to(table[:, None], (*positions.shape, table.shape[1]))

        def attend(q, k, v, layer, cache):
            cache = write_tokens(cache, layer, places, positions, valid, k, v)
            return attend_chunks(q, cache, layer, table, positions, longest), cache

        rotary = rotary_positions(rows, row[:, None], positions)
        _, cache = network.hidden_states(tokens, rotary, attend, cache)
        return cache, n_kv.at[row].add(size), chunks + 1

    fed_so_far = state.cache, rows.n_kv, jnp.int32(0)
    with jax.named_scope("prefill_lane"):
        # A loop for each length: a choice between them inside of one would copy the cache.
        for length, shorter in zip(lengths, (*lengths[1:], 0), strict=True):
            fed_so_far = lax.while_loop(
                functools.partial(busy, shorter), functools.partial(feed, length), fed_so_far
            )
    cache, n_kv, _ = fed_so_far
    return replace(state, cache=cache, rows=replace(rows, n_kv=n_kv))


def chunk_lengths(program: Program) -> tuple[int, ...]:
    """Lengths of chunks that the prefill lane is compiled for, the whole one first."""
    short = program.prefill_chunk // _SHORT_CHUNK
    # Another length may round differently.
    one = program.deterministic or short < _LEAST_CHUNK
    return (program.prefill_chunk,) if one else (program.prefill_chunk, short)


def _chunks(
    program: Program, pending: Int32[Array, "rows"]
) -> tuple[Int32[Array, "prefill_rows"], Int32[Array, "prefill_rows"]]:
    """The rows to feed next, as sizes and row numbers."""
    size, row = lax.top_k(pending, program.prefill_rows)
    return jnp.minimum(size, program.prefill_chunk), row


def decode_lane(
    program: Program, network: Network, state: EngineState
) -> tuple[EngineState, Int32[Array, "rows"], Bool[Array, "rows"], Bool[Array, "rows"]]:
    """Feeds one token per row and samples where the cache has caught up.

    Returns:
      The state, each row's sampled token, whether it sampled one, and whether its unit shall stop
      there.
    """
    rows, requests = state.rows, state.requests
    pending = ahead(program, rows)
    feeds = rows.live & (rows.source < 0) & (~rows.waiting | (pending > 0))
    if program.deterministic:  # pending tokens only through the lane, in chunks of its own
        feeds &= ~rows.waiting & (pending == 0)
    # Rows that rest keep a position inside the cache; what they compute is dropped.
    positions = jnp.minimum(rows.n_kv, program.context_len - 1)
    tokens = state.tokens[rows.area, positions]
    table = state.pages.pages[: program.rows]
    lengths = jnp.where(feeds, positions + 1, 0)
    page_size, same_bits = program.layout.page_size, program.deterministic
    plan = plan_reads(table, lengths, page_size, same_bits=same_bits)
    # Another number of rows may round differently.
    buckets = (program.rows,) if program.deterministic else row_buckets(program.rows)
    front = front_rows(buckets, feeds)

    def attend(q, k, v, layer, cache):
        cache = write_tokens(cache, layer, table, positions, feeds, k, v, few_columns=True)

        def read(q, table, positions):
            return attend_rows(q, cache, layer, table, positions, plan)

        return front.run(read, q, table, positions), cache

    with jax.named_scope("decode_lane"):
        rotary = rotary_positions(rows, jnp.arange(program.rows), positions)
        hidden, cache = network.hidden_states(tokens, rotary, attend, state.cache, front.run)

    sampled = feeds & ~rows.waiting & (pending == 0)
    drawn = _Drawn(
        hidden=hidden,
        sampled=sampled,
        asked=requests.sampling.take(rows.request),
        key=requests.key[rows.request],
        unit=rows.unit,
        n_known=rows.n_known,
        script=state.script[rows.area, rows.n_known] if program.scripts else None,
    )
    token, logprob, logits = front.run(functools.partial(_draw, program, network, state), drawn)
    stop = jnp.zeros_like(sampled)
    if program.controller is not None:
        with jax.named_scope("controller"):
            view = RowView(
                sampled=sampled,
                token=token,
                logprob=logprob,
                logits=logits,
                count=rows.n_known + 1 - rows.body,
                request=rows.request,
                block=requests.block[rows.request],
                thread=rows.thread,
            )
            token, logprob, stop = _controlled(program.controller, view)
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
        stop,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Drawn:
    """What rows draw their tokens from."""

    hidden: Float[Array, "rows hidden"]
    sampled: Bool[Array, "rows"]
    asked: SamplingTable
    key: UInt32[Array, "rows 2"]
    unit: Int32[Array, "rows"]
    n_known: Int32[Array, "rows"]
    script: Int32[Array, "rows"] | None


def _draw(
    program: Program, network: Network, state: EngineState, rows: _Drawn
) -> tuple[Int32[Array, "rows"], Float32[Array, "rows"], Float32[Array, "rows vocab"] | None]:
    """The first rows' tokens, their log-probabilities, and for a controller their logits."""
    with jax.named_scope("logits"):
        logits = network.logits(rows.hidden)

    def noise():
        return token_noise(rows.key, rows.unit, rows.n_known, program.vocab)

    def context():
        return jax.tree.map(lambda x: x[: len(rows.hidden)], _own_context(program, state))

    with jax.named_scope("sample"):
        token, logprob = sample_tokens(
            logits, noise, rows.asked, rows.sampled, context, rows.script
        )
    return token, logprob, logits if program.controller is not None else None


def _controlled(
    controller: RowController, view: RowView
) -> tuple[Int32[Array, "rows"], Float32[Array, "rows"], Bool[Array, "rows"]]:
    """What a controller makes of the sampled tokens: tokens, their log-probabilities, stops."""
    actions = controller(view)
    logits = view.logits
    found = jnp.take_along_axis(logits, actions.token[:, None], axis=-1)[:, 0]
    swapped = found - jax.nn.logsumexp(logits, axis=-1)
    logprob = jnp.where(actions.token == view.token, view.logprob, swapped)
    return actions.token, logprob, actions.stop & view.sampled


def _own_context(
    program: Program, state: EngineState
) -> tuple[Int32[Array, "rows store"], Int32[Array, "rows"], Int32[Array, "rows"]]:
    """What each row's unit sees, and from where to where it has sampled itself.

    Threads from the second on see the joined text up to the fork only, and nothing of it where
    threads exchange messages.
    """
    rows = state.rows
    if program.messages:
        return state.tokens[rows.area], rows.body, rows.n_known
    joined = state.tokens[rows.request * program.areas]
    before_fork = jnp.arange(joined.shape[1])[None] < state.threads.fork_at[rows.request][:, None]
    inherited = (rows.thread[:, None] > 1) & before_fork
    return jnp.where(inherited, joined, state.tokens[rows.area]), rows.body, rows.n_known
