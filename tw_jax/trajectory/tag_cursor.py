"""Reads control tags one after another; what the parsers of all schemas have in common.

A parser walks control tags only; the text between them is looked at through prefix sums, so a
40,000-token trajectory costs a few array operations and a loop over its tags.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from tw_jax.trajectory.schema import ParseError, TokenClasses
from tw_jax.trajectory.trajectory import OutlineSpan, ParallelBlock, ThreadSpan, Trajectory

MAX_NUMBER_TOKENS = 16


class GrammarBreak(Exception):
    """Leaves a broken block; `read_blocks` turns it into a `ParseError`."""

    def __init__(self, kind: str, index: int, message: str) -> None:
        """See `ParseError`."""
        super().__init__(message)
        self.error = ParseError(kind, index, message)


class TagCursor:
    """Reads control tags one after another, with O(1) questions about the text between them."""

    def __init__(
        self,
        tokens: Int32[np.ndarray, "len"],
        classes: TokenClasses,
        tag_names: tuple[str, ...],
        prompt_len: int,
        block_open: int,
    ) -> None:
        """Stands before the first tag behind the prompt; `block_open` is the tag of a block."""
        known = (tokens >= 0) & (tokens < len(classes.tag))
        safe = np.where(known, tokens, 0)
        tag = np.where(known, classes.tag[safe], -1)
        tag[:prompt_len] = -1
        self.positions: Int32[np.ndarray, "tags"] = np.flatnonzero(tag >= 0).astype(np.int32)
        self.tags = tag[self.positions]
        blank: Bool[np.ndarray, "len"] = known & classes.space[safe] & (tag < 0)
        self.text_before = np.concatenate([[0], np.cumsum(~blank)])
        self.tokens, self.classes, self.tag_names = tokens, classes, tag_names
        self.block_open = block_open
        self.next = 0

    @property
    def done(self) -> bool:
        """No tag is left."""
        return self.next >= len(self.positions)

    def peek(self) -> int:
        """Tag under the cursor, -1 at the end."""
        return -1 if self.done else int(self.tags[self.next])

    def take(self) -> int:
        """Position of the tag under the cursor; moves on."""
        self.next += 1
        return int(self.positions[self.next - 1])

    def expect(self, tag: int, opened_at: int) -> int:
        """Takes the given tag or leaves the block with an error."""
        found = self.peek()
        if found == tag:
            return self.take()
        if found < 0:
            raise GrammarBreak(
                "unclosed_block",
                opened_at,
                f"{self.tag_names[self.block_open]} at {opened_at} is never closed: the text ends "
                f"where {self.tag_names[tag]} was expected",
            )
        index = int(self.positions[self.next])
        kind = "nested_block" if found == self.block_open else "unexpected_tag"
        raise GrammarBreak(
            kind,
            index,
            f"found {self.tag_names[found]} where {self.tag_names[tag]} was expected",
        )

    def require_blank(self, start: int, end: int) -> None:
        """Leaves the block with an error unless tokens `[start, end)` are white space."""
        if self.text_before[end] != self.text_before[start]:
            first = start + int(np.argmax(np.diff(self.text_before[start : end + 1]) > 0))
            raise GrammarBreak(
                "stray_text", first, "only white space may stand between the tags of a block here"
            )

    def number(self, start: int, end: int, kind: str) -> tuple[str, int]:
        """Reads `[space] digits [. digits] [space] :`; returns it and the index behind."""
        text, spaced = "", False
        for index in range(start, min(end, start + MAX_NUMBER_TOKENS)):
            token = int(self.tokens[index])
            if not 0 <= token < len(self.classes.digit):
                break
            if self.classes.digit[token] >= 0 and not spaced:
                text += str(int(self.classes.digit[token]))
            elif self.classes.dot[token] and text and not spaced:
                text += "."
            elif self.classes.colon[token] and text:
                return text, index + 1
            elif self.classes.space[token]:
                spaced = bool(text)
            else:
                break
        raise GrammarBreak(
            kind, start, "expected a number followed by ':' at the start of the item"
        )


def read_blocks(
    tokens: Any,
    classes: TokenClasses,
    tag_names: tuple[str, ...],
    prompt_len: int,
    *,
    block_open: int,
    block_close: int,
    read_block: Callable[[TagCursor], ParallelBlock],
) -> Trajectory | tuple[ParseError, ...]:
    """Reads token ids into a trajectory; a broken block is reported and the next one read.

    Args:
      tokens: token ids, any integers.
      classes: per-id facts.
      tag_names: the schema's tags.
      prompt_len: leading tokens in which tags are no structure.
      block_open: index of the tag that opens a block.
      block_close: index of the tag that ends it, -1 where none does.
      read_block: reads one block; the cursor stands at its opening tag.
    """
    ids = np.asarray(tokens).astype(np.int64, copy=False).reshape(-1)
    cursor = TagCursor(ids, classes, tag_names, prompt_len, block_open)
    blocks: list[ParallelBlock] = []
    errors: list[ParseError] = []
    while not cursor.done:
        try:
            if cursor.peek() != block_open:
                name, index = tag_names[cursor.peek()], cursor.take()
                raise GrammarBreak(
                    "unexpected_tag", index, f"{name} stands outside of any parallel block"
                )
            blocks.append(read_block(cursor))
        except GrammarBreak as broken:
            errors.append(broken.error)
            _skip_block(cursor, block_close)
    if errors:
        return tuple(errors)
    return Trajectory(ids.astype(np.int32), min(prompt_len, len(ids)), tuple(blocks))


def _skip_block(cursor: TagCursor, block_close: int) -> None:
    """Moves behind the block's closer, or to the next opener or the end."""
    while not cursor.done and cursor.peek() != cursor.block_open:
        if cursor.peek() == block_close:
            cursor.take()
            return
        cursor.take()


def read_plans(
    cursor: TagCursor, start: int, *, first: int, plan: int, plan_end: int, plans_end: int
) -> tuple[tuple[OutlineSpan, ...], int]:
    """Reads numbered plans up to the tag that closes their list.

    Args:
      cursor: stands behind the tag that opens the list.
      start: position of the block's opening tag.
      first: position behind the tag that opens the list.
      plan: index of the tag that opens a plan.
      plan_end: of the tag that closes it.
      plans_end: of the tag that closes the list.

    Returns:
      The plans, and the position behind the list.
    """
    outlines: list[OutlineSpan] = []
    previous_end = first
    while cursor.peek() == plan:
        item = cursor.take()
        cursor.require_blank(previous_end, item)
        closer = cursor.expect(plan_end, start)
        number, _ = cursor.number(item + 1, closer, "outline_number")
        previous_end = closer + 1
        outlines.append(OutlineSpan(number, item, previous_end))
    closer = cursor.expect(plans_end, start)
    if not outlines:
        raise GrammarBreak("missing_outlines", closer, "the block's list of outlines is empty")
    cursor.require_blank(previous_end, closer)
    return tuple(outlines), closer + 1


def read_threads(
    cursor: TagCursor, start: int, previous_end: int, *, thread: int, thread_end: int
) -> tuple[tuple[ThreadSpan, ...], int]:
    """Reads numbered threads; at least one.

    Args:
      cursor: stands behind the list of plans.
      start: position of the block's opening tag.
      previous_end: position behind the list.
      thread: index of the tag that opens a thread.
      thread_end: of the tag that closes it.

    Returns:
      The threads, and the position behind the last one.
    """
    threads: list[ThreadSpan] = []
    while cursor.peek() == thread:
        opener = cursor.take()
        cursor.require_blank(previous_end, opener)
        closer = cursor.expect(thread_end, start)
        number, body = cursor.number(opener + 1, closer, "thread_number")
        previous_end = closer + 1
        threads.append(ThreadSpan(number, opener, body, previous_end, previous_end))
    return tuple(threads), previous_end
