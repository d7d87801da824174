"""Total parser and strict validator of the APR text format (see `tw_jax.trajectory.apr`).

The parser takes every text that the engine can leave behind: threads that returned nothing, or
opened their answer more than once.

Error kinds of `parse`: `unexpected_tag`, `nested_block`, `stray_text`, `unclosed_block`,
`missing_outlines`, `missing_threads`, `thread_without_message`. Of `validate`: `missing_threads`
(fewer threads than messages), `empty_outline`, `empty_answer`, `repeated_answer`, `white_space`,
`too_many_outlines`.
"""

from typing import Any

import numpy as np
from jaxtyping import Int32

from tw_jax.trajectory import block_checks
from tw_jax.trajectory.schema import ParseError, TokenClasses
from tw_jax.trajectory.tag_cursor import GrammarBreak, TagCursor, read_blocks
from tw_jax.trajectory.trajectory import OutlineSpan, ParallelBlock, ThreadSpan, Trajectory

# Order of `tw_jax.trajectory.apr.APR_TAGS`.
SPAWN, SPAWN_END, MESSAGE, MESSAGE_END, THREAD, JOIN, JOIN_END = range(7)


def parse(
    tokens: Any, classes: TokenClasses, tag_names: tuple[str, ...], prompt_len: int
) -> Trajectory | tuple[ParseError, ...]:
    """Reads token ids into a trajectory; a broken block is reported and the next one read.

    Blocks end behind their last thread.
    """
    return read_blocks(
        tokens,
        classes,
        tag_names,
        prompt_len,
        block_open=SPAWN,
        block_close=-1,
        read_block=_block,
    )


def _block(cursor: TagCursor) -> ParallelBlock:
    start = cursor.take()
    messages, messages_end = _messages(cursor, start)
    threads: list[ThreadSpan] = []
    previous_end = messages_end
    while cursor.peek() == THREAD:
        opener = cursor.take()
        if len(threads) == len(messages):
            message = f"the block has {len(messages)} messages, and one thread more"
            raise GrammarBreak("thread_without_message", opener, message)
        cursor.require_blank(previous_end, opener)
        while cursor.peek() == JOIN:
            cursor.take()
        previous_end = cursor.expect(JOIN_END, start) + 1
        body = opener + 1
        following = int(cursor.tokens[body])
        if 0 <= following < len(cursor.classes.line_break):
            body += int(cursor.classes.line_break[following])
        number = str(len(threads) + 1)
        threads.append(ThreadSpan(number, opener, body, previous_end, previous_end))
    if not threads:
        raise GrammarBreak("missing_threads", messages_end - 1, "the block holds no thread")
    return ParallelBlock(start, messages_end, messages, tuple(threads), previous_end, previous_end)


def _messages(cursor: TagCursor, start: int) -> tuple[tuple[OutlineSpan, ...], int]:
    messages: list[OutlineSpan] = []
    previous_end = start + 1
    while cursor.peek() == MESSAGE:
        opener = cursor.take()
        cursor.require_blank(previous_end, opener)
        previous_end = cursor.expect(MESSAGE_END, start) + 1
        messages.append(OutlineSpan(str(len(messages) + 1), opener, previous_end))
    closer = cursor.expect(SPAWN_END, start)
    if not messages:
        raise GrammarBreak("missing_outlines", closer, "the block sends no message")
    cursor.require_blank(previous_end, closer)
    return tuple(messages), closer + 1


def validate(trajectory: Trajectory, classes: TokenClasses) -> tuple[ParseError, ...]:
    """The strict format check of every block; empty when all are canonical."""
    errors: list[ParseError] = []
    tokens = block_checks.readable_tokens(trajectory.tokens, classes)
    for block in trajectory.blocks:
        if len(block.threads) < len(block.outlines):
            message = f"{len(block.outlines)} messages, {len(block.threads)} threads"
            errors.append(ParseError("missing_threads", block.outlines_end - 1, message))
        if len(block.outlines) > block_checks.MAX_OUTLINES:
            index = block.outlines[block_checks.MAX_OUTLINES].start
            message = f"{len(block.outlines)} messages; {block_checks.MAX_OUTLINES} are allowed"
            errors.append(ParseError("too_many_outlines", index, message))
        if block.threads and block.outlines:
            errors += _white_space_errors(tokens, block, classes)
        errors += _content_errors(tokens, block, classes)
    return tuple(errors)


def _white_space_errors(
    tokens: Int32[np.ndarray, "len"], block: ParallelBlock, classes: TokenClasses
) -> list[ParseError]:
    one_break = block_checks.plan_list_breaks(block, block.start + 1)
    one_break.append((block.outlines_end, block.threads[0].start))
    one_break += [(thread.start + 1, thread.body) for thread in block.threads]
    one_break.append((block.threads[-1].end, block.join_end))
    nothing = [
        (thread.end, following.start)
        for thread, following in zip(block.threads, block.threads[1:], strict=False)
    ]
    return block_checks.white_space_errors(
        block_checks.misplaced_white_space(tokens, classes, one_break, nothing)
    )


def _content_errors(
    tokens: Int32[np.ndarray, "len"], block: ParallelBlock, classes: TokenClasses
) -> list[ParseError]:
    """Messages and answers hold text, and each thread answers once."""
    errors = []
    for message in block.outlines:
        if classes.space[tokens[message.start + 1 : message.end - 1]].all():
            errors.append(ParseError("empty_outline", message.start, "the message holds no text"))
    for thread in block.threads:
        body = tokens[thread.body : thread.end - 1]
        openers = np.flatnonzero(classes.tag[body] == JOIN)
        if len(openers) > 1:
            index = thread.body + int(openers[1])
            errors.append(ParseError("repeated_answer", index, "the thread answers twice"))
        if not len(openers) or classes.space[body[openers[-1] + 1 :]].all():
            errors.append(ParseError("empty_answer", thread.end - 1, "the thread answers nothing"))
    return errors
