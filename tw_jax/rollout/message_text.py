"""The text of rollouts whose threads exchange messages, put together on the host.

The engine keeps the parent's context and, in an archive, the text of the threads. A trajectory
holds every token once: each thread's text stands where the parent's context has only a copy of its
answer.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32, Int32

from tw_jax.rollout.state import (
    BODY_AT,
    EOS,
    JOIN_END,
    JOINED,
    OUTLINES_END,
    PARENT_LEN,
    REASON,
    SAMPLED_END,
    TAG_AT,
    THREAD_END,
)
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import OutlineSpan, ParallelBlock, ThreadSpan


@dataclasses.dataclass(frozen=True)
class LoggedText:
    """Tokens, and the log-probabilities of the sampled ones."""

    tokens: Int32[np.ndarray, "len"]
    logprobs: Float32[np.ndarray, "len"]

    def part(self, start: int, end: int | None = None) -> "LoggedText":
        """A piece of it."""
        return LoggedText(self.tokens[start:end], self.logprobs[start:end])


def inline_threads(
    parent: LoggedText,
    archive: LoggedText,
    blocks: Int32[np.ndarray, "blocks 3"],
    threads: Int32[np.ndarray, "blocks threads fields"],
    fork_len: int,
) -> tuple[LoggedText, Int32[np.ndarray, "blocks 3"], Int32[np.ndarray, "blocks threads fields"]]:
    """Puts threads in the place of their answers.

    Args:
      parent: the parent's context.
      archive: the text of the joined threads.
      blocks: `Records.blocks` of the blocks that have a joined thread.
      threads: `Records.threads`, likewise.
      fork_len: tokens forced behind the spawn trigger.

    Returns:
      The text that holds every token once, and the records with their places in it.
    """
    blocks, threads = np.array(blocks), np.array(threads)
    pieces, length, cursor = [], 0, 0
    for block, lines in zip(blocks, threads, strict=True):
        lines = lines[: block[JOINED]]
        fork_end, join_end = block[OUTLINES_END] + fork_len, block[JOIN_END]
        answers_end = lines[-1, PARENT_LEN] if len(lines) else fork_end
        pieces.append(parent.part(cursor, fork_end))
        length += fork_end - cursor
        block[OUTLINES_END] = length - fork_len
        if len(lines):
            first, last = int(lines[0, TAG_AT]), int(lines[-1, THREAD_END])
            pieces.append(archive.part(first, last))
            lines[:, TAG_AT : THREAD_END + 1] += length - first
            length += last - first
        pieces.append(parent.part(answers_end, join_end))
        length += join_end - answers_end
        block[JOIN_END] = length
        cursor = join_end
    pieces.append(parent.part(cursor))
    text = LoggedText(
        np.concatenate([piece.tokens for piece in pieces]),
        np.concatenate([piece.logprobs for piece in pieces]),
    )
    return text, blocks, threads


def message_blocks(
    tokens: Int32[np.ndarray, "len"],
    blocks: Int32[np.ndarray, "blocks 3"],
    threads: Int32[np.ndarray, "blocks threads fields"],
    schema: Schema,
    earliest: int,
    max_threads: int,
) -> tuple[ParallelBlock, ...]:
    """The spans of blocks, from what `inline_threads` returned.

    Args:
      tokens: the text.
      blocks: its blocks.
      threads: their threads.
      schema: the language.
      earliest: the first block lies behind this place.
      max_threads: messages that can be sent at once; further ones were dropped.
    """
    found = []
    for block, lines in zip(blocks.tolist(), threads.tolist(), strict=True):
        outlines_end, join_end = block[OUTLINES_END], block[JOIN_END]
        lists = np.flatnonzero(tokens[earliest:outlines_end] == schema.fork_join.plans_open)
        start = earliest + int(lists[-1])
        found.append(
            ParallelBlock(
                start=start,
                outlines_end=outlines_end,
                outlines=_messages(tokens, start, outlines_end, schema)[:max_threads],
                threads=tuple(
                    _thread(str(ordinal), fields, schema)
                    for ordinal, fields in enumerate(lines[: block[JOINED]], start=1)
                ),
                join_end=join_end,
                end=join_end,
            )
        )
        earliest = join_end
    return tuple(found)


def _messages(
    tokens: Int32[np.ndarray, "len"], start: int, end: int, schema: Schema
) -> tuple[OutlineSpan, ...]:
    """Closed messages of one list; the same grammar as `tw_jax.rollout.outlines`."""
    opening, closing = schema.fork_join.plan_open, schema.fork_join.plan_close
    inside = tokens[start:end]
    spans, opened = [], None
    for index in np.flatnonzero((inside == opening) | (inside == closing)).tolist():
        if inside[index] == opening:
            opened = start + index
        elif opened is not None:
            spans.append(OutlineSpan(str(len(spans) + 1), opened, start + index + 1))
            opened = None
    return tuple(spans)


def _thread(number: str, fields: list[int], schema: Schema) -> ThreadSpan:
    return ThreadSpan(
        number=number,
        start=fields[TAG_AT],
        body=fields[BODY_AT],
        sampled_end=fields[SAMPLED_END],
        end=fields[THREAD_END],
        replaced=(schema.eos_id,) if fields[REASON] == EOS else (),
    )
