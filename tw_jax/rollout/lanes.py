"""The two ways in which tokens are fed: chunks of known ones, and one token of every live row."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from tw_jax.kernels.column_attention import attend_chunks, attend_rows, plan_reads
from tw_jax.kernels.column_cache import ColumnCache, write_tokens
from tw_jax.rollout.controller import RowController, RowView
from tw_jax.rollout.network import Network, front_rows, row_buckets
from tw_jax.rollout.program import Program
from tw_jax.rollout.sampling import sample_tokens, token_noise
from tw_jax.rollout.state import EngineState, ahead, rotary_positions


def prefill_lane(program: Program, network: Network, state: EngineState) -> EngineState:
    """Feeds known tokens in chunks, all but each row's last: that one is the decode lane's."""
    rows = state.rows
    pending = jnp.where(rows.live & (rows.source < 0), ahead(program, rows), 0)
    if program.deterministic and not program.gathers:
        pending = jnp.where(rows.waiting, 0, pending)
    size, row = lax.top_k(pending, program.prefill_rows)
    size = jnp.minimum(size, program.prefill_chunk)
    table = state.pages.pages[row]

    def feed(cache: ColumnCache, n_kv: Int32[Array, "rows"]):
        offset = jnp.arange(program.prefill_chunk)[None]
        positions = n_kv[row][:, None] + offset
        valid = offset < size[:, None]
        tokens = state.tokens[state.rows.area[row][:, None], positions]
        longest = jnp.where(valid, positions + 1, 0).max()
        places = jnp.broadcast_to(table[:, None], (*positions.shape, table.shape[1]))

        def attend(q, k, v, layer, cache):
            cache = write_tokens(cache, layer, places, positions, valid, k, v)
            return attend_chunks(q, cache, layer, table, positions, longest), cache

        rotary = rotary_positions(rows, row[:, None], positions)
        _, cache = network.hidden_states(tokens, rotary, attend, cache)
        return cache, n_kv.at[row].add(size)

    def rest(cache: ColumnCache, n_kv: Int32[Array, "rows"]):
        return cache, n_kv

    with jax.named_scope("prefill_lane"):
        busy = size.sum() >= program.prefill_min
        cache, n_kv = lax.cond(busy, feed, rest, state.cache, rows.n_kv)
    return replace(state, cache=cache, rows=replace(rows, n_kv=n_kv))


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
        logits = front.run(network.logits, hidden)

    sampled = feeds & ~rows.waiting & (pending == 0)

    def noise():
        return token_noise(requests.key[rows.request], rows.unit, rows.n_known, program.vocab)

    with jax.named_scope("sample"):
        token, logprob = sample_tokens(
            logits,
            noise,
            requests.sampling.take(rows.request),
            sampled,
            lambda: _own_context(program, state),
            state.script[rows.area, rows.n_known] if program.scripts else None,
        )
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
