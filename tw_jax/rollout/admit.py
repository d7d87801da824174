"""Puts requests into free slots, and reads finished ones back."""

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from tw_jax.kernels.column_cache import keep_pages
from tw_jax.rollout.advance import end_segments, split_spawns
from tw_jax.rollout.outlines import read_token
from tw_jax.rollout.page_events import release_pages
from tw_jax.rollout.pages import keep, release
from tw_jax.rollout.program import Program
from tw_jax.rollout.request import Request
from tw_jax.rollout.sampling import unit_number
from tw_jax.rollout.sampling_table import SamplingTable, sampling_table
from tw_jax.rollout.spawn import open_blocks
from tw_jax.rollout.state import CONTEXT, FINISHED, FREE, LENGTH, SEGMENT, EngineState, Records


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Admission:
    """Requests that enter the engine together, one line per request slot.

    Attributes:
      arrives: the slot gets a new request; the other fields of a slot without one are ignored.
      tokens: prompt and forced prefix, padded to the length of an area.
      prompt_len: prompt tokens.
      known_len: prompt and forced prefix.
      source: what has the same beginning as the prompt and lets it be shared: a request slot,
        `requests + i` for the i-th kept prefix, -1 for nothing.
      source_len: tokens to share.
      ticket: order of admission.
      key: noise key of the request.
      parallel: may spawn.
      limit: the joined text ends here.
      limit_reason: LENGTH or CONTEXT.
      max_threads: see `Requests`.
      max_thread_tokens: see `Requests`.
      max_blocks: see `Requests`.
      sampling: see `Requests`.
      script: see `script_areas`; empty without `EngineConfig.scripts`.
    """

    arrives: Bool[Array, "requests"]
    tokens: Int32[Array, "requests store"]
    prompt_len: Int32[Array, "requests"]
    known_len: Int32[Array, "requests"]
    source: Int32[Array, "requests"]
    source_len: Int32[Array, "requests"]
    ticket: Int32[Array, "requests"]
    key: UInt32[Array, "requests 2"]
    parallel: Bool[Array, "requests"]
    limit: Int32[Array, "requests"]
    limit_reason: Int32[Array, "requests"]
    max_threads: Int32[Array, "requests"]
    max_thread_tokens: Int32[Array, "requests"]
    max_blocks: Int32[Array, "requests"]
    sampling: SamplingTable
    script: Int32[Array, "requests areas store"]


@dataclasses.dataclass(frozen=True)
class Arrival:
    """One request on its way in.

    Attributes:
      slot: the request slot that it will have.
      ticket: order of admission.
      request: what it asks for.
      source: see `Admission`.
      source_len: see `Admission`.
      script: `script_areas`, where the engine has room for scripts.
    """

    slot: int
    ticket: int
    request: Request
    source: int = -1
    source_len: int = 0
    script: Int32[np.ndarray, "areas store"] | None = None


def admission(program: Program, arrivals: Sequence[Arrival]) -> Admission:
    """Lays out requests for `admit`. Plain NumPy."""
    n = program.requests
    fields = {
        "arrives": np.zeros(n, np.bool_),
        "tokens": np.zeros((n, program.store_len), np.int32),
        "key": np.zeros((n, 2), np.uint32),
        "parallel": np.zeros(n, np.bool_),
        "sampling": sampling_table(
            {arrival.slot: arrival.request.sampling for arrival in arrivals},
            n,
            program.vocab,
            program.max_logit_bias,
        ),
        "script": np.zeros((n * program.scripts, program.areas, program.store_len), np.int32),
    }
    for field in dataclasses.fields(Admission):
        fields.setdefault(field.name, np.zeros(n, np.int32))
    for arrival in arrivals:
        for name, value in _asked(program, arrival).items():
            fields[name][arrival.slot] = value
        if program.scripts:
            fields["script"][arrival.slot] = arrival.script
    return Admission(**cast(dict[str, Any], fields))


def _asked(program: Program, arrival: Arrival) -> dict[str, Any]:
    """One line of an `Admission`."""
    request = arrival.request
    sampling = request.sampling
    known = [*request.prompt, *request.forced_prefix]
    budget = len(request.prompt) + sampling.max_response_tokens
    return {
        "arrives": True,
        "tokens": np.pad(np.array(known, np.int32), (0, program.store_len - len(known))),
        "prompt_len": len(request.prompt),
        "known_len": len(known),
        "source": arrival.source,
        "source_len": arrival.source_len,
        "ticket": arrival.ticket,
        # The two words that jax.random.PRNGKey makes of a 64-bit seed.
        "key": (request.seed >> 32, request.seed & 0xFFFFFFFF),
        "parallel": request.mode == "parallel",
        "limit": min(budget, program.context_len),
        "limit_reason": LENGTH if budget <= program.context_len else CONTEXT,
        "max_threads": sampling.max_threads,
        "max_thread_tokens": min(sampling.max_thread_tokens, program.context_len),
        "max_blocks": sampling.max_blocks,
    }


def admit(program: Program, state: EngineState, batch: Admission) -> EngineState:
    """Starts the requests in free rows; there must be one for each of them.

    Outlines in a forced prefix are read here, and a spawn trigger that ends the prefix opens its
    block at once: the prefix may hold a whole list of plans.
    """
    arrives, slots = batch.arrives, jnp.arange(program.requests)
    free_rows = jnp.nonzero(~state.rows.live, size=program.requests, fill_value=program.rows)[0]
    row = jnp.where(arrives, free_rows[jnp.cumsum(arrives) - 1], program.rows).astype(jnp.int32)

    def row_field(old, new):
        return old.at[row].set(new, mode="drop")

    def request_field(old, new):
        return jnp.where(arrives.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    rows, requests, reader = state.rows, state.requests, state.reader
    asked = {
        field.name: request_field(getattr(requests, field.name), getattr(batch, field.name))
        for field in dataclasses.fields(requests)
        if field.name in Admission.__dataclass_fields__ and field.name != "sampling"
    }
    area = jnp.where(arrives, slots * program.areas, len(state.tokens))
    lines = request_field(requests.row, row)
    kept = batch.source - program.requests
    source = jnp.where(kept < 0, lines[batch.source], program.rows + kept)
    state = replace(
        state,
        tokens=state.tokens.at[area].set(batch.tokens, mode="drop"),
        script=_scripts(program, state, batch),
        # Only sampled tokens write theirs: given ones must not show those of an earlier request.
        logprobs=jnp.where(jnp.repeat(arrives, program.areas)[:, None], 0, state.logprobs),
        rows=replace(
            rows,
            live=row_field(rows.live, True),
            request=row_field(rows.request, slots),
            area=row_field(rows.area, slots * program.areas),
            thread=row_field(rows.thread, 0),
            waiting=row_field(rows.waiting, False),
            n_known=row_field(rows.n_known, batch.known_len),
            n_kv=row_field(rows.n_kv, 0),
            shift=row_field(rows.shift, 0),
            bend=row_field(rows.bend, 0),
            source=row_field(rows.source, jnp.where(batch.source < 0, -1, source)),
            source_len=row_field(rows.source_len, batch.source_len),
            body=row_field(rows.body, batch.known_len),
            stop_at=row_field(rows.stop_at, batch.limit),
            unit=row_field(rows.unit, unit_number(0, 0)),
            start_step=row_field(rows.start_step, state.step),
        ),
        requests=replace(
            requests,
            **asked,
            sampling=requests.sampling.replaced(arrives, batch.sampling),
            phase=request_field(requests.phase, SEGMENT),
            row=lines,
            block=request_field(requests.block, 0),
            archived=request_field(requests.archived, 0),
        ),
        reader=replace(
            reader,
            open=reader.open & ~arrives,
            state=request_field(reader.state, 0),
            count=request_field(reader.count, 0),
            duplicates=request_field(reader.duplicates, 0),
        ),
    )
    state, asks = _read_prefix(program, state, batch)
    spawns, cramped = split_spawns(program, state, asks)
    state = open_blocks(program, state, spawns)
    return release_pages(program, end_segments(state, cramped, state.requests.limit_reason))


def _scripts(program: Program, state: EngineState, batch: Admission):
    if not program.scripts:
        return state.script
    lines = jnp.repeat(batch.arrives, program.areas)[:, None]
    return jnp.where(lines, batch.script.reshape(state.script.shape), state.script)


def forget_prefixes(program: Program, state: EngineState) -> EngineState:
    """Keeps no prefix any more; nothing may run."""
    kept = jnp.arange(program.layout.lines) >= program.rows
    return replace(state, pages=release(state.pages, kept))


def keep_prefix(
    program: Program,
    state: EngineState,
    kept: Int32[Array, ""],
    slot: Int32[Array, ""],
    pages: Int32[Array, ""],
) -> tuple[EngineState, Bool[Array, ""]]:
    """Keeps the first full pages of a running request's text as a prefix, in place of another.

    Returns:
      The state, and whether it was done: not while a row shares what was kept before.
    """
    table, done = keep(state.pages, program.rows + kept, pages)
    of_row = state.pages.pages[state.requests.row[slot]]
    cache = keep_pages(state.cache, of_row, kept, jnp.where(done, pages, 0))
    return replace(state, pages=table, cache=cache), done


def _read_prefix(
    program: Program, state: EngineState, batch: Admission
) -> tuple[EngineState, Bool[Array, "requests"]]:
    """Reads outline numbers in forced prefixes; returns where the last token asks for a spawn."""
    prefix_len = jnp.where(batch.arrives & batch.parallel, batch.known_len - batch.prompt_len, 0)
    longest = prefix_len.max()

    def body(carry):
        index, reader, asks = carry
        position = jnp.minimum(batch.prompt_len + index, batch.tokens.shape[1] - 1)
        token = jnp.take_along_axis(batch.tokens, position[:, None], axis=1)[:, 0]
        reader, closes = read_token(
            reader, program.alphabet, token, index < prefix_len, batch.max_threads, position
        )
        return index + 1, reader, asks | (closes & (index == prefix_len - 1))

    start = (jnp.int32(0), state.reader, jnp.zeros(program.requests, bool))
    _, reader, asks = lax.while_loop(lambda carry: carry[0] < longest, body, start)
    return replace(state, reader=reader), asks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Harvest:
    """What the host reads of every request slot when some have finished.

    Attributes:
      tokens: joined text, padded; under the join rule `message`, what the parent saw.
      logprobs: of its sampled tokens.
      length: length of the joined text.
      reason: why the rollout ended.
      blocks: parallel blocks.
      duplicates: outline numbers dropped as repeated.
      records: see `Records`.
      archive: see `EngineState`.
      archive_logprobs: see `EngineState`.
    """

    tokens: Int32[Array, "requests store"]
    logprobs: Float32[Array, "requests store"]
    length: Int32[Array, "requests"]
    reason: Int32[Array, "requests"]
    blocks: Int32[Array, "requests"]
    duplicates: Int32[Array, "requests"]
    records: Records
    archive: Int32[Array, "archives archive"]
    archive_logprobs: Float32[Array, "archives archive"]


def harvest(program: Program, state: EngineState) -> tuple[EngineState, Harvest]:
    """Frees the slots of finished requests and returns their results."""
    requests = state.requests
    joined = slice(None, None, program.areas)
    result = Harvest(
        tokens=state.tokens[joined],
        logprobs=state.logprobs[joined],
        length=requests.length,
        reason=requests.reason,
        blocks=requests.block,
        duplicates=state.reader.duplicates,
        records=state.records,
        archive=state.archive,
        archive_logprobs=state.archive_logprobs,
    )
    phase = jnp.where(requests.phase == FINISHED, FREE, requests.phase)
    return replace(state, requests=replace(requests, phase=phase)), result
