"""Blocks into the canonical bytes of the text contract (DESIGN section 5)."""

import dataclasses
from collections.abc import Sequence

from tw_jax.data.rewrite.edits import Edit
from tw_jax.data.rewrite.extraction import Block, LineSpan


@dataclasses.dataclass(frozen=True)
class WrittenThread:
    """A thread as it is written.

    Attributes:
      span: the source lines it holds.
      text: its body.
      edits: what was changed in those lines, in order.
    """

    span: LineSpan
    text: str
    edits: tuple[Edit, ...]


@dataclasses.dataclass(frozen=True)
class WrittenBlock:
    """A block as it is written.

    Attributes:
      block: where it comes from.
      outlines: a plan per thread.
      threads: in text order.
    """

    block: Block
    outlines: tuple[str, ...]
    threads: tuple[WrittenThread, ...]


def render(lines: Sequence[str], blocks: Sequence[WrittenBlock]) -> str:
    """The reasoning with its blocks in it.

    A block takes the place of its lines: what is written is lines and blocks, in the order of the
    source, with a line break between them.

    Args:
      lines: of the source.
      blocks: in text order.
    """
    items, following = [], 1
    for written in blocks:
        span = written.block.span
        items += lines[following - 1 : span.first - 1]
        items.append(_block_text(written))
        following = span.last + 1
    return "\n".join([*items, *lines[following - 1 :]])


def plain_text(lines: Sequence[str], blocks: Sequence[WrittenBlock], first: int) -> str:
    """What stands before line `first`, edits made, without tags and plans."""
    items, following = [], 1
    for written in blocks:
        span = written.block.span
        items += lines[following - 1 : span.first - 1]
        items += [thread.text for thread in written.threads]
        following = span.last + 1
    return "\n".join([*items, *lines[following - 1 : first - 1]])


def _block_text(written: WrittenBlock) -> str:
    outlines = "\n".join(
        f"<Outline>{number}: {plan}</Outline>"
        for number, plan in enumerate(written.outlines, start=1)
    )
    threads = "".join(
        f"<Thread>\n{number}: {thread.text}\n</Thread>"
        for number, thread in enumerate(written.threads, start=1)
    )
    return f"<Parallel>\n<Outlines>\n{outlines}\n</Outlines>\n{threads}\n</Parallel>"
