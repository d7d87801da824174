"""Strict checks of a block that parsed: what the published filters ask beyond the grammar.

Shared by the schemas; each says where its canonical text has a line break and where nothing.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from tw_jax.trajectory.schema import ParseError, TokenClasses
from tw_jax.trajectory.trajectory import ParallelBlock

MAX_OUTLINES = 50  # the published filter's limit

Gap = tuple[int, int]


def readable_tokens(
    tokens: Int32[np.ndarray, "len"], classes: TokenClasses
) -> Int32[np.ndarray, "len"]:
    """Token ids that the classes can be indexed with.

    A model whose vocabulary is padded can sample ids that the tokenizer does not know. They count
    as text, like the tag that stands in for them: neither digit, colon nor white space.
    """
    known = (tokens >= 0) & (tokens < len(classes.tag))
    return np.where(known, tokens, np.argmax(classes.tag >= 0))


def numbering_errors(block: ParallelBlock) -> list[ParseError]:
    """Plans are numbered 1, 2, ..., threads like the plans, and there are not too many."""
    errors = []
    expected = [str(i + 1) for i in range(len(block.outlines))]
    planned = [outline.number for outline in block.outlines]
    executed = [thread.number for thread in block.threads]
    if planned != expected:
        errors.append(
            ParseError(
                "outline_numbering",
                block.start,
                f"outlines are numbered {planned}, expected {expected}",
            )
        )
    if executed != planned:
        index = block.threads[0].start if block.threads else block.outlines_end
        errors.append(
            ParseError(
                "thread_numbering", index, f"threads are numbered {executed}, outlines {planned}"
            )
        )
    if len(planned) > MAX_OUTLINES:
        errors.append(
            ParseError(
                "too_many_outlines",
                block.outlines[MAX_OUTLINES].start,
                f"{len(planned)} outlines; at most {MAX_OUTLINES} are allowed",
            )
        )
    return errors


def plan_list_breaks(block: ParallelBlock, first: int) -> list[Gap]:
    """The gaps around the plans, each of which holds one line break.

    Args:
      block: has plans.
      first: one past the tag that opens the list.
    """
    gaps = [(first, block.outlines[0].start)]
    for item, following in zip(block.outlines, block.outlines[1:], strict=False):
        gaps.append((item.end, following.start))
    gaps.append((block.outlines[-1].end, block.outlines_end - 1))
    return gaps


def misplaced_white_space(
    tokens: Int32[np.ndarray, "len"],
    classes: TokenClasses,
    one_break: Sequence[Gap],
    nothing: Sequence[Gap],
) -> list[int]:
    """Starts of gaps that do not hold what the canonical text has there."""

    def is_break(start: int, end: int) -> bool:
        return end == start + 1 and bool(classes.line_break[tokens[start]])

    wrong = [start for start, end in one_break if not is_break(start, end)]
    return wrong + [start for start, end in nothing if start != end]


def misplaced_in_items(
    tokens: Int32[np.ndarray, "len"], block: ParallelBlock, classes: TokenClasses
) -> list[int]:
    """Places in numbered plans and threads with white space that canonical items do not have."""
    wrong = []
    for outline in block.outlines:
        inside = tokens[outline.start + 1 : outline.end - 1]
        number = inside[: int(np.argmax(classes.colon[inside]))]
        if classes.space[number].any():
            wrong.append(outline.start + 1)
    for thread in block.threads:
        if classes.space[tokens[thread.start + 2 : thread.body - 1]].any():
            wrong.append(thread.start + 2)
        if not classes.line_end[tokens[thread.end - 2]]:
            wrong.append(thread.end - 1)
        if not classes.space_start[tokens[thread.body]]:
            wrong.append(thread.body)
    return wrong


def white_space_errors(wrong: Sequence[int]) -> list[ParseError]:
    """One error per place, in text order."""
    return [
        ParseError(
            "white_space", index, "white space differs from the canonical text of a block here"
        )
        for index in sorted(wrong)
    ]


def emptiness_errors(
    tokens: Int32[np.ndarray, "len"], block: ParallelBlock, classes: TokenClasses
) -> list[ParseError]:
    """Numbered plans and threads hold text."""
    errors = []
    for outline in block.outlines:
        inside = tokens[outline.start + 1 : outline.end - 1]
        colon = int(np.argmax(classes.colon[inside])) + 1
        if classes.space[inside[colon:]].all():
            errors.append(ParseError("empty_outline", outline.start, "the outline holds no plan"))
    for thread in block.threads:
        if classes.space[tokens[thread.body : thread.end - 1]].all():
            errors.append(ParseError("empty_thread", thread.start, "the thread holds no text"))
    return errors
