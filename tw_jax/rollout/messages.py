"""Threads that exchange messages (APR), inside the jitted loop.

A thread starts with an empty cache: its context is its message and what it writes itself. It runs
in a row of its own, while the parent's row waits with the parent's cache as it was. At its join the
parent gets the thread's answer as known tokens, and the thread's text moves to the request's
archive, since the next block writes over its area. `tw_jax.rollout.message_text` puts both
together on the host.
"""

from dataclasses import replace

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from tw_jax.rollout.finish import finish_requests
from tw_jax.rollout.program import Program
from tw_jax.rollout.sampling import unit_number
from tw_jax.rollout.state import (
    COUNT,
    EOS,
    OUTCOME_FIELDS,
    REASON,
    THREAD_STOP,
    THREADS,
    EngineState,
)

Scalar = Int32[Array, ""]

# The tags around an answer in the parent's context.
ANSWER_TAGS = 2


def open_messages(program: Program, state: EngineState, slot: Scalar) -> EngineState:
    """Writes the fork behind the messages; the parent's row feeds it and waits."""
    row = state.requests.row[slot]
    fork_at = state.rows.n_known[row]
    fork = jnp.array(program.tokens.fork, jnp.int32)[None]
    return replace(
        state,
        tokens=lax.dynamic_update_slice(state.tokens, fork, (slot * program.areas, fork_at)),
        rows=state.rows.put(row, n_known=fork_at + fork.shape[1], waiting=True),
        requests=state.requests.put(slot, phase=THREADS),
        threads=state.threads.put(
            slot,
            fork_at=fork_at,
            count=state.reader.count[slot],
            next_spawn=1,
            next_join=1,
            last_position=0,
            outcome=jnp.zeros(state.threads.outcome.shape[1:], jnp.int32),
        ),
    )


def start_thread(program: Program, state: EngineState, slot: Scalar) -> EngineState:
    """Starts the next thread in the first free row, behind its message and its header.

    There is room for a token and the closing text: the parent's context holds the message too, and
    more around it.
    """
    tokens, ordinal = program.tokens, state.threads.next_spawn[slot]
    row = jnp.argmin(state.rows.live)
    area = slot * program.areas
    prefix = jnp.array(tokens.context_prefix, jnp.int32)
    header = jnp.array((*tokens.header_prefix, *tokens.header_suffix), jnp.int32)
    shift = state.reader.plan_start[slot, ordinal - 1] - len(prefix)
    place = jnp.clip(jnp.arange(program.store_len) + shift, 0, program.store_len - 1)
    text = state.tokens[area][place].at[: len(prefix)].set(prefix)
    header_at = len(prefix) + state.reader.plan_len[slot, ordinal - 1]
    body = header_at + len(header)
    budget_end = body + state.requests.max_thread_tokens[slot]
    return replace(
        state,
        tokens=state.tokens.at[area + ordinal].set(
            lax.dynamic_update_slice(text, header, (header_at,))
        ),
        rows=state.rows.put(
            row,
            live=True,
            request=slot,
            area=area + ordinal,
            thread=ordinal,
            waiting=False,
            n_known=body,
            n_kv=0,
            shift=0,
            bend=0,
            body=body,
            stop_at=jnp.minimum(budget_end, program.context_len - program.close_len),
            unit=unit_number(state.requests.block[slot], ordinal),
            start_step=state.step,
        ),
        threads=state.threads.put(slot, next_spawn=ordinal + 1),
    )


def join_message(program: Program, state: EngineState, slot: Scalar) -> EngineState:
    """Appends the next thread's answer to the parent's context, and archives the thread's text.

    The rollout ends here if its limit leaves no room for the answer (the thread is part of the
    result all the same), or if the archive has none for the text (the thread is dropped).
    """
    requests, threads = state.requests, state.threads
    ordinal, row = threads.next_join[slot], requests.row[slot]
    outcome = threads.outcome[slot, ordinal - 1]
    header_at = len(program.tokens.context_prefix) + state.reader.plan_len[slot, ordinal - 1]
    body = header_at + program.fixed_header_len

    start = requests.archived[slot]
    archive, archive_logprobs, positions = _archived(
        program, state, slot, ordinal, start, header_at
    )
    archive_end = positions[-1]
    kept = archive_end <= program.archive_len

    parent_len = state.rows.n_known[row]
    tokens, returned_end = _returned(program, state, slot, ordinal, parent_len, body)
    fits = kept & (returned_end <= requests.limit[slot])
    parent_len = jnp.where(fits, returned_end, parent_len)

    block = requests.block[slot]
    entry = jnp.concatenate([outcome[:OUTCOME_FIELDS], positions, parent_len[None]])
    summary = jnp.stack([threads.fork_at[slot], parent_len, jnp.where(kept, ordinal, ordinal - 1)])
    state = replace(
        state,
        tokens=jnp.where(fits, tokens, state.tokens),
        archive=jnp.where(kept, archive, state.archive),
        archive_logprobs=jnp.where(kept, archive_logprobs, state.archive_logprobs),
        rows=state.rows.put(row, n_known=parent_len),
        requests=requests.put(
            slot,
            archived=jnp.where(kept, archive_end, start),
            block=jnp.where(fits, block, block + 1),  # the open block is part of the result
        ),
        threads=threads.put(slot, next_join=ordinal + 1),
        records=replace(
            state.records,
            threads=state.records.threads.at[slot, block, ordinal - 1].set(entry),
            blocks=state.records.blocks.at[slot, block].set(summary),
        ),
    )
    ending = (jnp.arange(program.requests) == slot) & ~fits
    return finish_requests(state, ending, requests.limit_reason)


def _returned(
    program: Program,
    state: EngineState,
    slot: Scalar,
    ordinal: Scalar,
    start: Scalar,
    body: Scalar,
) -> tuple[Int32[Array, "areas store"], Scalar]:
    """The store with a thread's answer between tags from `start` on, and the end of that."""
    area, place = slot * program.areas, jnp.arange(program.store_len)
    text, outcome = state.tokens[area + ordinal], state.threads.outcome[slot, ordinal - 1]
    stop = body + outcome[COUNT] - 1
    opens = (text == program.tokens.return_open) & (place >= body) & (place < stop)
    opener = jnp.where(opens, place, -1).max()
    answers = (outcome[REASON] == THREAD_STOP) & (opener >= 0)
    length = jnp.where(answers, stop - opener - 1, 0)

    offset = place - start
    answer = text[jnp.clip(opener + offset, 0, program.store_len - 1)]
    written = jnp.select(
        [offset == 0, offset == length + 1],
        [jnp.int32(program.tokens.return_open), jnp.int32(program.tokens.thread_stop)],
        answer,
    )
    inside = (offset >= 0) & (offset < length + ANSWER_TAGS)
    parent = jnp.where(inside, written, state.tokens[area])
    return state.tokens.at[area].set(parent), start + length + ANSWER_TAGS


def _archived(
    program: Program,
    state: EngineState,
    slot: Scalar,
    ordinal: Scalar,
    start: Scalar,
    header_at: Scalar,
) -> tuple[Int32[Array, "archives archive"], Float32[Array, "archives archive"], Int32[Array, "4"]]:
    """The archive with a thread's text from `start` on, and TAG_AT to THREAD_END of that."""
    area, outcome = slot * program.areas + ordinal, state.threads.outcome[slot, ordinal - 1]
    count, reason = outcome[COUNT], outcome[REASON]
    closer = jnp.array(program.tokens.thread_close, jnp.int32)
    body = start + program.fixed_header_len
    sampled_end = body + count - (reason == EOS)
    end = sampled_end + jnp.where(reason == THREAD_STOP, 0, len(closer))

    place = jnp.arange(program.archive_len)
    source = jnp.clip(place - start + header_at, 0, program.store_len - 1)
    inside = (place >= start) & (place < end)
    closes = closer[jnp.clip(place - sampled_end, 0, len(closer) - 1)]
    text = jnp.where(place < sampled_end, state.tokens[area, source], closes)
    # A replaced end-of-text token keeps its log-probability under the closer.
    sampled = (place >= body) & (place < body + count)
    logprobs = jnp.where(sampled, state.logprobs[area, source], 0)
    return (
        state.archive.at[slot].set(jnp.where(inside, text, state.archive[slot])),
        state.archive_logprobs.at[slot].set(
            jnp.where(inside, logprobs, state.archive_logprobs[slot])
        ),
        jnp.stack([start, body, sampled_end, end]),
    )
