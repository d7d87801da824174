"""Total parser and strict validator of the ThreadWeaver text format (DESIGN section 5).

The parser walks control tags only; the text between them is looked at through prefix sums, so a
40,000-token trajectory costs a few array operations and a loop over its tags.

Error kinds of `parse`: `unexpected_tag`, `nested_block`, `stray_text`, `unclosed_block`,
`missing_outlines`, `missing_threads`, `outline_number`, `thread_number`. Of `validate`:
`outline_numbering`, `thread_numbering`, `empty_outline`, `empty_thread`, `white_space`,
`too_many_outlines`.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from tw_jax.trajectory.schema import ParseError, TokenClasses
from tw_jax.trajectory.trajectory import OutlineSpan, ParallelBlock, ThreadSpan, Trajectory

MAX_OUTLINES = 50  # the published filter's limit
MAX_NUMBER_TOKENS = 16

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


class _GrammarBreak(Exception):
    """Internal: leaves a broken block; never escapes `parse`."""

    def __init__(self, kind: str, index: int, message: str) -> None:
        super().__init__(message)
        self.error = ParseError(kind, index, message)


class _Cursor:
    """Reads control tags one after another, with O(1) questions about the text between them."""

    def __init__(
        self,
        tokens: Int32[np.ndarray, "len"],
        classes: TokenClasses,
        tag_names: tuple[str, ...],
        prompt_len: int,
    ) -> None:
        known = (tokens >= 0) & (tokens < len(classes.tag))
        safe = np.where(known, tokens, 0)
        tag = np.where(known, classes.tag[safe], -1)
        tag[:prompt_len] = -1
        self.positions: Int32[np.ndarray, "tags"] = np.flatnonzero(tag >= 0).astype(np.int32)
        self.tags = tag[self.positions]
        blank: Bool[np.ndarray, "len"] = known & classes.space[safe] & (tag < 0)
        self.text_before = np.concatenate([[0], np.cumsum(~blank)])
        self.tokens, self.classes, self.tag_names = tokens, classes, tag_names
        self.next = 0

    @property
    def done(self) -> bool:
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
            raise _GrammarBreak(
                "unclosed_block",
                opened_at,
                f"{self.tag_names[PARALLEL]} at {opened_at} is never closed: the text ends where "
                f"{self.tag_names[tag]} was expected",
            )
        index = int(self.positions[self.next])
        kind = "nested_block" if found == PARALLEL else "unexpected_tag"
        raise _GrammarBreak(
            kind,
            index,
            f"found {self.tag_names[found]} where {self.tag_names[tag]} was expected",
        )

    def require_blank(self, start: int, end: int) -> None:
        """Leaves the block with an error unless tokens `[start, end)` are white space."""
        if self.text_before[end] != self.text_before[start]:
            first = start + int(np.argmax(np.diff(self.text_before[start : end + 1]) > 0))
            raise _GrammarBreak(
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
        raise _GrammarBreak(
            kind, start, "expected a number followed by ':' at the start of the item"
        )


def parse(
    tokens: Any, classes: TokenClasses, tag_names: tuple[str, ...], prompt_len: int
) -> Trajectory | tuple[ParseError, ...]:
    """Reads token ids into a trajectory; a broken block is reported and the next one read."""
    ids = np.asarray(tokens).astype(np.int64, copy=False).reshape(-1)
    cursor = _Cursor(ids, classes, tag_names, prompt_len)
    blocks: list[ParallelBlock] = []
    errors: list[ParseError] = []
    while not cursor.done:
        try:
            if cursor.peek() != PARALLEL:
                name, index = tag_names[cursor.peek()], cursor.take()
                raise _GrammarBreak(
                    "unexpected_tag", index, f"{name} stands outside of any parallel block"
                )
            blocks.append(_block(cursor))
        except _GrammarBreak as broken:
            errors.append(broken.error)
            _skip_block(cursor)
    if errors:
        return tuple(errors)
    return Trajectory(ids.astype(np.int32), min(prompt_len, len(ids)), tuple(blocks))


def _skip_block(cursor: _Cursor) -> None:
    """Moves behind the block's closer, or to the next opener or the end."""
    while not cursor.done and cursor.peek() != PARALLEL:
        if cursor.peek() == PARALLEL_END:
            cursor.take()
            return
        cursor.take()


def _block(cursor: _Cursor) -> ParallelBlock:
    start = cursor.take()
    outlines, outlines_end = _outlines(cursor, start)
    threads: list[ThreadSpan] = []
    previous_end = outlines_end
    while cursor.peek() == THREAD:
        opener = cursor.take()
        cursor.require_blank(previous_end, opener)
        closer = cursor.expect(THREAD_END, start)
        number, body = cursor.number(opener + 1, closer, "thread_number")
        previous_end = closer + 1
        threads.append(ThreadSpan(number, opener, body, previous_end, previous_end))
    closer = cursor.expect(PARALLEL_END, start)
    if not threads:
        raise _GrammarBreak("missing_threads", closer, "the block holds no thread")
    cursor.require_blank(previous_end, closer)
    return ParallelBlock(start, outlines_end, outlines, tuple(threads), closer, closer + 1)


def _outlines(cursor: _Cursor, start: int) -> tuple[tuple[OutlineSpan, ...], int]:
    opener = cursor.expect(OUTLINES, start)
    cursor.require_blank(start + 1, opener)
    outlines: list[OutlineSpan] = []
    previous_end = opener + 1
    while cursor.peek() == OUTLINE:
        item = cursor.take()
        cursor.require_blank(previous_end, item)
        closer = cursor.expect(OUTLINE_END, start)
        number, _ = cursor.number(item + 1, closer, "outline_number")
        previous_end = closer + 1
        outlines.append(OutlineSpan(number, item, previous_end))
    closer = cursor.expect(OUTLINES_END, start)
    if not outlines:
        raise _GrammarBreak("missing_outlines", closer, "the block's list of outlines is empty")
    cursor.require_blank(previous_end, closer)
    return tuple(outlines), closer + 1


def validate(trajectory: Trajectory, classes: TokenClasses) -> tuple[ParseError, ...]:
    """The strict format check of every block; empty when all are canonical."""
    errors: list[ParseError] = []
    # A model whose vocabulary is padded can sample ids that the tokenizer does not know. They count
    # as text, like the tag that stands in for them: neither digit, colon nor white space.
    known = (trajectory.tokens >= 0) & (trajectory.tokens < len(classes.tag))
    tokens = np.where(known, trajectory.tokens, np.argmax(classes.tag >= 0))
    for block in trajectory.blocks:
        errors += _numbering_errors(block)
        errors += _white_space_errors(tokens, block, classes)
        errors += _emptiness_errors(tokens, block, classes)
    return tuple(errors)


def _numbering_errors(block: ParallelBlock) -> list[ParseError]:
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


def _white_space_errors(
    tokens: Int32[np.ndarray, "len"], block: ParallelBlock, classes: TokenClasses
) -> list[ParseError]:
    """Canonical bytes: one line break where DESIGN section 5 has one, nothing elsewhere."""
    if not block.threads or not block.outlines:
        return []
    one_break: list[tuple[int, int]] = [(block.outlines_end, block.threads[0].start)]
    nothing: list[tuple[int, int]] = []
    opener = block.outlines[0].start
    one_break += [(block.start + 1, block.start + 2), (opener - 1, opener)]
    for item, following in zip(block.outlines, block.outlines[1:], strict=False):
        one_break.append((item.end, following.start))
    one_break.append((block.outlines[-1].end, block.outlines_end - 1))
    for thread, following in zip(block.threads, block.threads[1:], strict=False):
        nothing.append((thread.end, following.start))
    one_break.append((block.threads[-1].end, block.end - 1))
    one_break += [(thread.start + 1, thread.start + 2) for thread in block.threads]

    def is_break(start: int, end: int) -> bool:
        return end == start + 1 and bool(classes.line_break[tokens[start]])

    wrong = [start for start, end in one_break if not is_break(start, end)]
    wrong += [start for start, end in nothing if start != end]
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
    return [
        ParseError(
            "white_space", index, "white space differs from the canonical text of a block here"
        )
        for index in sorted(wrong)
    ]


def _emptiness_errors(
    tokens: Int32[np.ndarray, "len"], block: ParallelBlock, classes: TokenClasses
) -> list[ParseError]:
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
