"""Total parser and strict validator of the ThreadWeaver text format (DESIGN section 5).

Error kinds of `parse`: `unexpected_tag`, `nested_block`, `stray_text`, `unclosed_block`,
`missing_outlines`, `missing_threads`, `outline_number`, `thread_number`. Of `validate`:
`outline_numbering`, `thread_numbering`, `empty_outline`, `empty_thread`, `white_space`,
`too_many_outlines`.
"""

from typing import Any

import numpy as np
from jaxtyping import Int32

from tw_jax.trajectory import block_checks
from tw_jax.trajectory.schema import ParseError, TokenClasses
from tw_jax.trajectory.tag_cursor import (
    GrammarBreak,
    TagCursor,
    read_blocks,
    read_plans,
    read_threads,
)
from tw_jax.trajectory.trajectory import ParallelBlock, Trajectory

# Order of `tw_jax.trajectory.threadweaver.THREADWEAVER_TAGS`.
(
    PARALLEL,
    PARALLEL_END,
    OUTLINES,
    OUTLINES_END,
    OUTLINE,
    OUTLINE_END,
    THREAD,
    THREAD_END,
) = range(8)


def parse(
    tokens: Any, classes: TokenClasses, tag_names: tuple[str, ...], prompt_len: int
) -> Trajectory | tuple[ParseError, ...]:
    """Reads token ids into a trajectory; a broken block is reported and the next one read."""
    return read_blocks(
        tokens,
        classes,
        tag_names,
        prompt_len,
        block_open=PARALLEL,
        block_close=PARALLEL_END,
        read_block=_block,
    )


def _block(cursor: TagCursor) -> ParallelBlock:
    start = cursor.take()
    opener = cursor.expect(OUTLINES, start)
    cursor.require_blank(start + 1, opener)
    outlines, outlines_end = read_plans(
        cursor,
        start,
        first=opener + 1,
        plan=OUTLINE,
        plan_end=OUTLINE_END,
        plans_end=OUTLINES_END,
    )
    threads, threads_end = read_threads(
        cursor, start, outlines_end, thread=THREAD, thread_end=THREAD_END
    )
    closer = cursor.expect(PARALLEL_END, start)
    if not threads:
        raise GrammarBreak("missing_threads", closer, "the block holds no thread")
    cursor.require_blank(threads_end, closer)
    return ParallelBlock(start, outlines_end, outlines, threads, closer, closer + 1)


def validate(trajectory: Trajectory, classes: TokenClasses) -> tuple[ParseError, ...]:
    """The strict format check of every block; empty when all are canonical."""
    errors: list[ParseError] = []
    tokens = block_checks.readable_tokens(trajectory.tokens, classes)
    for block in trajectory.blocks:
        errors += block_checks.numbering_errors(block)
        errors += _white_space_errors(tokens, block, classes)
        errors += block_checks.emptiness_errors(tokens, block, classes)
    return tuple(errors)


def _white_space_errors(
    tokens: Int32[np.ndarray, "len"], block: ParallelBlock, classes: TokenClasses
) -> list[ParseError]:
    """Canonical bytes: one line break where DESIGN section 5 has one, nothing elsewhere."""
    if not block.threads or not block.outlines:
        return []
    opener = block.outlines[0].start
    one_break = [(block.outlines_end, block.threads[0].start), (block.start + 1, block.start + 2)]
    # The break before the first plan is one token wide; the opener stands before that.
    one_break += block_checks.plan_list_breaks(block, opener - 1)
    one_break.append((block.threads[-1].end, block.end - 1))
    one_break += [(thread.start + 1, thread.start + 2) for thread in block.threads]
    nothing = [
        (thread.end, following.start)
        for thread, following in zip(block.threads, block.threads[1:], strict=False)
    ]
    wrong = block_checks.misplaced_white_space(tokens, classes, one_break, nothing)
    wrong += block_checks.misplaced_in_items(tokens, block, classes)
    return block_checks.white_space_errors(wrong)
