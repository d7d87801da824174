"""Rebuilds a `Rollout` on the host from a finished request's joined text and records."""

import dataclasses

import numpy as np
from jaxtyping import Float32, Int32

from tw_jax.rollout.message_text import message_blocks
from tw_jax.rollout.request import Request
from tw_jax.rollout.rollout import FinishReason, Rollout, RolloutUnit
from tw_jax.rollout.state import (
    BODY_AT,
    COUNT,
    END_STEP,
    EOS,
    JOIN_END,
    JOINED,
    OUTLINES_END,
    REASON,
    ROW,
    SAMPLED_END,
    START_STEP,
    TAG_AT,
    THREAD_END,
)
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import OutlineSpan, ParallelBlock, ThreadSpan, Trajectory

# Indexed by the codes of state.py; code 0 is a unit that still runs.
FINISH_REASONS: tuple[FinishReason, ...] = (
    "length",
    "spawn",
    "thread_stop",
    "eos",
    "length",
    "context",
    "cancelled",
    "deadline",
    "controller",
)


@dataclasses.dataclass(frozen=True)
class FinishedText:
    """One finished request, read back from the device.

    Attributes:
      tokens: joined text.
      logprobs: at the positions of sampled tokens.
      reason: code of the finish reason.
      duplicates: outline numbers dropped.
      segments: `Records.segments` of the request.
      blocks: `Records.blocks`, cut to the blocks that were opened.
      threads: `Records.threads`, likewise.
      first_step: engine step that counts as 0.
    """

    tokens: Int32[np.ndarray, "len"]
    logprobs: Float32[np.ndarray, "len"]
    reason: int
    duplicates: int
    segments: Int32[np.ndarray, "blocks_and_one 3"]
    blocks: Int32[np.ndarray, "blocks 3"]
    threads: Int32[np.ndarray, "blocks threads fields"]
    first_step: int


def assemble(request: Request, text: FinishedText, schema: Schema) -> Rollout:
    """The rollout with its spans and units."""
    prompt_len = len(request.prompt)
    sampled_start = prompt_len + len(request.forced_prefix)
    if schema.join_rule == "message":
        blocks = message_blocks(
            text.tokens,
            text.blocks,
            text.threads,
            schema,
            prompt_len,
            request.sampling.max_threads,
        )
    else:
        reader = _BlockReader(text, schema, prompt_len)
        blocks = tuple(reader.block(index) for index in range(len(text.blocks)))
    trajectory = Trajectory(
        tokens=text.tokens,
        prompt_len=prompt_len,
        blocks=blocks,
        sampled_start=sampled_start if request.forced_prefix else None,
    )
    units = _units(trajectory, text, schema)
    if schema.join_rule == "message":
        # No unit sees the text as a whole: each has a context of its own.
        units = tuple(
            dataclasses.replace(unit, context_len=len(own.context))
            for unit, own in zip(units, schema.units(trajectory), strict=True)
        )
    return Rollout(
        trajectory=trajectory,
        units=units,
        finish_reason=FINISH_REASONS[text.reason],
        critical_path=schema.critical_path(trajectory),
        total_tokens=len(text.tokens) - prompt_len,
        duplicate_outlines=text.duplicates,
    )


class _BlockReader:
    """Finds the spans of blocks: the engine's records, and the tags around them."""

    def __init__(self, text: FinishedText, schema: Schema, prompt_len: int) -> None:
        self.text, self.schema = text, schema
        self.tags = schema.classes.tag
        self.earliest = prompt_len  # a block lies behind the prompt and behind the one before

    def block(self, index: int) -> ParallelBlock:
        """Spans of one block."""
        record = self.text.blocks[index]
        outlines_end, join_end = int(record[OUTLINES_END]), int(record[JOIN_END])
        start, closing_tag, plans_start = self._opener(outlines_end)
        end = self._closer(join_end, closing_tag)
        threads = self.text.threads[index, : record[JOINED]]
        block = ParallelBlock(
            start=start,
            outlines_end=outlines_end,
            outlines=self._outlines(plans_start, outlines_end),
            threads=tuple(self._thread(fields) for fields in threads.tolist()),
            join_end=join_end,
            end=end,
        )
        self.earliest = end
        return block

    def _tag(self, index: int) -> int:
        token = self.text.tokens[index]
        return int(self.tags[token]) if token < len(self.tags) else -1

    def _blank(self, index: int) -> bool:
        space = self.schema.classes.space
        return bool(self.text.tokens[index] < len(space) and space[self.text.tokens[index]])

    def _partner(self, tag: int) -> int:
        """The tag that closes an opening tag, -1 if there is none."""
        closing = self.schema.tags[tag].replace("<", "</", 1)
        return self.schema.tags.index(closing) if closing in self.schema.tags else -1

    def _opener(self, outlines_end: int) -> tuple[int, int, int]:
        """Start of the block, the tag that will close it (-1: none), and start of its plans."""
        plans = np.flatnonzero(
            self.text.tokens[self.earliest : outlines_end] == self.schema.fork_join.plans_open
        )
        plans_start = self.earliest + int(plans[-1])
        before = plans_start - 1
        while before >= self.earliest and self._blank(before):
            before -= 1
        if before >= self.earliest and self._tag(before) >= 0:
            closing = self._partner(self._tag(before))
            if closing >= 0:
                return before, closing, plans_start
        return plans_start, -1, plans_start

    def _closer(self, join_end: int, closing_tag: int) -> int:
        """One past the block's closing tag, or `join_end` if the model wrote something else."""
        index = join_end
        while index < len(self.text.tokens) and self._blank(index):
            index += 1
        closed = index < len(self.text.tokens) and 0 <= closing_tag == self._tag(index)
        return index + 1 if closed else join_end

    def _outlines(self, start: int, end: int) -> tuple[OutlineSpan, ...]:
        """Plans with a readable number, repeated ones included; each ends at its closing tag."""
        fork_join = self.schema.fork_join
        openers = start + np.flatnonzero(self.text.tokens[start:end] == fork_join.plan_open)
        spans = []
        for opener in openers.tolist():
            number = self._number(opener + 1, end)
            close = opener + 1
            while close < end and self._tag(close) < 0:
                close += 1
            own = close < end and self._tag(close) == self._partner(self._tag(opener))
            if number is not None:
                spans.append(OutlineSpan(number, opener, close + own))
        return tuple(spans)

    def _number(self, start: int, end: int) -> str | None:
        """The number at the head of a plan; the same grammar as `tw_jax.rollout.outlines`."""
        classes, index, text = self.schema.classes, start, ""
        while index < end and self._blank(index):
            index += 1
        while index < end and (piece := self._number_piece(index, text)):
            text, index = text + piece, index + 1
        while index < end and self._blank(index):
            index += 1
        token = int(self.text.tokens[index]) if index < end else len(classes.colon)
        is_colon = token < len(classes.colon) and bool(classes.colon[token])
        return text if is_colon and text and text[-1] != "." else None

    def _number_piece(self, index: int, before: str) -> str:
        """A digit, or a dot behind a digit; empty for any other token."""
        classes, token = self.schema.classes, int(self.text.tokens[index])
        if token >= len(classes.digit):
            return ""
        if classes.digit[token] >= 0:
            return str(int(classes.digit[token]))
        return "." if classes.dot[token] and before and before[-1] != "." else ""

    def _thread(self, fields: list[int]) -> ThreadSpan:
        fork_join = self.schema.fork_join
        number = range(
            fields[TAG_AT] + len(fork_join.header_prefix),
            fields[BODY_AT] - len(fork_join.header_suffix),
        )
        text = ""
        for index in number:
            text += self._number_piece(index, text)
        return ThreadSpan(
            number=text,
            start=fields[TAG_AT],
            body=fields[BODY_AT],
            sampled_end=fields[SAMPLED_END],
            end=fields[THREAD_END],
            replaced=(self.schema.eos_id,) if fields[REASON] == EOS else (),
        )


def _units(trajectory: Trajectory, text: FinishedText, schema: Schema) -> tuple[RolloutUnit, ...]:
    """Segments and threads in text order: the order in which they began."""
    units: list[RolloutUnit] = []
    fork_len = len(schema.fork_join.fork)
    start, parent = trajectory.response_start, -1
    for index, block in enumerate(trajectory.blocks):
        units.append(_segment(text, index, start, block.outlines_end, parent, "spawn"))
        parent = len(units) - 1
        for ordinal, (span, fields) in enumerate(
            zip(block.threads, text.threads[index].tolist(), strict=False), start=1
        ):
            count = fields[COUNT]
            sampled = slice(span.body, span.body + count)
            completion = np.concatenate(
                [text.tokens[span.body : span.sampled_end], np.array(span.replaced, np.int32)]
            )
            units.append(
                RolloutUnit(
                    kind="thread",
                    parent=parent,
                    block=index,
                    thread=ordinal,
                    context_len=block.outlines_end + fork_len + span.body - span.start,
                    start=span.body,
                    completion=completion,
                    logprobs=text.logprobs[sampled],
                    finish_reason=FINISH_REASONS[fields[REASON]],
                    row=fields[ROW],
                    start_step=fields[START_STEP] - text.first_step,
                    end_step=fields[END_STEP] - text.first_step,
                )
            )
        start = block.join_end
    length = len(trajectory.tokens)
    if start < length:
        blocks = len(trajectory.blocks)
        reason = FINISH_REASONS[text.reason]
        units.append(_segment(text, blocks, start, length, parent, reason))
    return tuple(units)


def _segment(
    text: FinishedText, block: int, start: int, end: int, parent: int, reason: FinishReason
) -> RolloutUnit:
    row, first, last = text.segments[block].tolist()
    return RolloutUnit(
        kind="segment",
        parent=parent,
        block=block,
        thread=0,
        context_len=start,
        start=start,
        completion=text.tokens[start:end],
        logprobs=text.logprobs[start:end],
        finish_reason=reason,
        row=row,
        start_step=first - text.first_step,
        end_step=last - text.first_step,
    )
