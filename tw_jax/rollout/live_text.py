"""What running requests have written so far: for streams and for people who watch."""

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Float32, Int32

from tw_jax.rollout.message_text import LoggedText, inline_threads
from tw_jax.rollout.program import Program
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.state import (
    BODY_AT,
    COUNT,
    EOS,
    JOIN_END,
    JOINED,
    REASON,
    RUNNING,
    TAG_AT,
    THREADS,
    EngineState,
)


@dataclasses.dataclass(frozen=True)
class LiveThread:
    """One thread of a block.

    Attributes:
      ordinal: 1, 2, ... in the order of the outlines.
      tokens: its forced header and what it has sampled.
      header_len: tokens of the header.
      ended: it samples no more; it waits for its turn to join.
    """

    ordinal: int
    tokens: Int32[np.ndarray, "n"]
    header_len: int
    ended: bool


@dataclasses.dataclass(frozen=True)
class LiveText:
    """One running request.

    The joined text only ever grows: what a thread writes is no part of it until it has joined.

    Attributes:
      tokens: joined text, prompt included.
      logprobs: of its sampled tokens; 0 elsewhere.
      prompt_len: tokens of the prompt.
      block: index of the open block, -1 between blocks.
      threads: threads of the open block that have begun.
      closed: the joined threads of each block before it, in join order.
    """

    tokens: Int32[np.ndarray, "len"]
    logprobs: Float32[np.ndarray, "len"]
    prompt_len: int
    block: int
    threads: tuple[LiveThread, ...]
    closed: tuple[tuple[LiveThread, ...], ...] = ()


def live_texts(program: Program, state: EngineState, slots: Iterable[int]) -> dict[int, LiveText]:
    """Reads the running requests' texts off the device, by request slot."""
    wanted = sorted(slots)
    if not wanted:
        return {}
    # Everything but the cache.
    host: EngineState = jax.device_get(dataclasses.replace(state, cache=None))
    return {slot: _live_text(program, host, slot) for slot in wanted}


def finished_text(rollout: Rollout) -> LiveText:
    """What a finished request has written, as it would have been seen while it ran."""
    trajectory = rollout.trajectory
    logprobs = np.zeros(len(trajectory.tokens), np.float32)
    closed: list[list[LiveThread]] = [[] for _ in trajectory.blocks]
    for unit in rollout.units:
        logprobs[unit.start : unit.start + len(unit.logprobs)] = unit.logprobs
        if unit.kind == "thread":
            span = trajectory.blocks[unit.block].threads[unit.thread - 1]
            header = trajectory.tokens[span.start : span.body]
            tokens = np.concatenate([header, unit.completion])
            closed[unit.block].append(LiveThread(unit.thread, tokens, len(header), True))
    return LiveText(
        tokens=trajectory.tokens,
        logprobs=logprobs,
        prompt_len=trajectory.prompt_len,
        block=-1,
        threads=(),
        closed=tuple(map(tuple, closed)),
    )


def _live_text(program: Program, host: EngineState, slot: int) -> LiveText:
    requests, threads = host.requests, host.threads
    area = slot * program.areas
    open_block = requests.phase[slot] == THREADS
    joined = 0
    if open_block:
        joined = int(threads.next_join[slot]) - 1
        block = int(requests.block[slot])
        fork_at = int(threads.fork_at[slot])
        length = int(host.records.blocks[slot, block, JOIN_END]) if joined else fork_at
        live = _threads(program, host, slot)
    else:
        block, length, live = -1, int(host.rows.n_known[requests.row[slot]]), ()
    text = LoggedText(np.array(host.tokens[area, :length]), np.array(host.logprobs[area, :length]))
    if program.messages:
        with_threads = int(requests.block[slot]) + (joined > 0)
        text, _, _ = inline_threads(
            text,
            LoggedText(np.array(host.archive[slot]), np.array(host.archive_logprobs[slot])),
            np.asarray(host.records.blocks[slot, :with_threads]),
            np.asarray(host.records.threads[slot, :with_threads]),
            len(program.tokens.fork),
        )
    return LiveText(
        tokens=text.tokens,
        logprobs=text.logprobs,
        prompt_len=int(requests.prompt_len[slot]),
        block=block,
        threads=live,
        closed=tuple(
            _joined_threads(program, host, slot, block) for block in range(requests.block[slot])
        ),
    )


def _joined_threads(
    program: Program, host: EngineState, slot: int, block: int
) -> tuple[LiveThread, ...]:
    joined = host.records.blocks[slot, block, JOINED]
    text = host.archive[slot] if program.messages else host.tokens[slot * program.areas]
    found = []
    for index, fields in enumerate(host.records.threads[slot, block, :joined].tolist()):
        tokens = np.array(text[fields[TAG_AT] : fields[BODY_AT] + fields[COUNT]])
        if fields[REASON] == EOS:  # its place in the joined text holds the closer
            tokens[-1] = program.eos_id
        found.append(LiveThread(index + 1, tokens, fields[BODY_AT] - fields[TAG_AT], True))
    return tuple(found)


def _threads(program: Program, host: EngineState, slot: int) -> tuple[LiveThread, ...]:
    threads, rows = host.threads, host.rows
    found = []
    for ordinal in range(1, int(threads.next_spawn[slot])):
        header_len = program.fixed_header_len
        if program.messages:
            start = len(program.tokens.context_prefix)
            start += int(host.reader.plan_len[slot, ordinal - 1])
        else:
            start = int(threads.fork_at[slot]) + len(program.tokens.fork)
            header_len += int(host.reader.number_len[slot, ordinal - 1])
        outcome = threads.outcome[slot, ordinal - 1]
        ended = bool(outcome[REASON] != RUNNING)
        if ended:
            stop = start + header_len + int(outcome[COUNT])
        else:
            mine = rows.live & (rows.request == slot) & (rows.thread == ordinal)
            stop = int(rows.n_known[np.argmax(mine)])
        area = slot * program.areas + ordinal - 1 + program.messages
        tokens = np.array(host.tokens[area, start:stop])
        if outcome[REASON] == EOS:  # once thread 1 has joined, a closer stands in its place
            tokens[-1] = program.eos_id
        found.append(LiveThread(ordinal, tokens, header_len, ended))
    return tuple(found)
