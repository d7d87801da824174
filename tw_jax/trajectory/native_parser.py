"""Total parser and strict validator of NPR's text format (arXiv 2512.07461, section 3).

Error kinds of `parse`: `unexpected_tag`, `nested_block`, `stray_text`, `unclosed_block`,
`missing_outlines`, `missing_threads`, `outline_number`, `thread_number`. Of `validate`:
`outline_numbering`, `thread_numbering`, `empty_outline`, `empty_thread`, `empty_takeaway`,
`white_space`, `too_many_outlines`.
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

# Order of `tw_jax.trajectory.native.NATIVE_TAGS`.
(
    GUIDELINE,
    GUIDELINE_END,
    PLAN,
    PLAN_END,
    STEP,
    STEP_END,
    TAKEAWAY,
    TAKEAWAY_END,
) = range(8)


def parse(
    tokens: Any, classes: TokenClasses, tag_names: tuple[str, ...], prompt_len: int
) -> Trajectory | tuple[ParseError, ...]:
    """Reads token ids into a trajectory; a broken block is reported and the next one read.

    Blocks end one past `<takeaway>`.
    """
    return read_blocks(
        tokens,
        classes,
        tag_names,
        prompt_len,
        block_open=GUIDELINE,
        block_close=TAKEAWAY_END,
        read_block=_block,
    )


def _block(cursor: TagCursor) -> ParallelBlock:
    start = cursor.take()
    outlines, outlines_end = read_plans(
        cursor, start, first=start + 1, plan=PLAN, plan_end=PLAN_END, plans_end=GUIDELINE_END
    )
    threads, threads_end = read_threads(
        cursor, start, outlines_end, thread=STEP, thread_end=STEP_END
    )
    takeaway = cursor.expect(TAKEAWAY, start)
    if not threads:
        raise GrammarBreak("missing_threads", takeaway, "the block holds no thread")
    cursor.require_blank(threads_end, takeaway)
    cursor.expect(TAKEAWAY_END, start)
    return ParallelBlock(start, outlines_end, outlines, threads, takeaway + 1, takeaway + 1)


def validate(trajectory: Trajectory, classes: TokenClasses) -> tuple[ParseError, ...]:
    """The strict format check of every block; empty when all are canonical."""
    errors: list[ParseError] = []
    tokens = block_checks.readable_tokens(trajectory.tokens, classes)
    tags = np.flatnonzero(classes.tag[tokens] >= 0)
    for block in trajectory.blocks:
        errors += block_checks.numbering_errors(block)
        errors += block_checks.emptiness_errors(tokens, block, classes)
        if block.threads and block.outlines:
            errors += _join_errors(tokens, block, classes, tags)
    return tuple(errors)


def _join_errors(
    tokens: Int32[np.ndarray, "len"],
    block: ParallelBlock,
    classes: TokenClasses,
    tags: Int32[np.ndarray, "tags"],
) -> list[ParseError]:
    """White space of the block, and its takeaway; `tags` are the positions of all tags."""
    behind = tags[np.searchsorted(tags, block.threads[-1].end) :].tolist()
    if [classes.tag[tokens[index]] for index in behind[:2]] != [TAKEAWAY, TAKEAWAY_END]:
        return []  # a rollout that ended here; as text it does not parse
    takeaway, takeaway_end = behind[:2]
    one_break = [(block.outlines_end, block.threads[0].start), (takeaway + 1, takeaway + 2)]
    one_break += block_checks.plan_list_breaks(block, block.start + 1)
    one_break += [(thread.start + 1, thread.start + 2) for thread in block.threads]
    starts = [thread.start for thread in block.threads[1:]] + [takeaway]
    one_break += [(thread.end, start) for thread, start in zip(block.threads, starts, strict=True)]
    wrong = block_checks.misplaced_white_space(tokens, classes, one_break, ())
    wrong += block_checks.misplaced_in_items(tokens, block, classes)
    if not classes.line_end[tokens[takeaway_end - 1]]:
        wrong.append(takeaway_end)
    errors = block_checks.white_space_errors(wrong)
    if classes.space[tokens[takeaway + 1 : takeaway_end]].all():
        errors.append(ParseError("empty_takeaway", takeaway, "the takeaway holds no text"))
    return errors
