"""Proof that a rewritten trace holds every line of its source exactly once, in order.

Written apart from extraction and rendering on purpose: it reads the finished text, takes the tags
away, undoes the recorded edits, and must be left with the source, byte for byte.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_BLOCK = re.compile(
    r"<Parallel>\n<Outlines>\n(?P<outlines>.*?)\n</Outlines>\n(?P<threads>.*?)\n</Parallel>",
    re.DOTALL,
)
_THREAD = re.compile(r"<Thread>\n(?P<number>[0-9]+): (?P<body>.*?)\n</Thread>", re.DOTALL)


class Unconserved(Exception):
    """The text and the record do not lead back to the source; the message says where."""


def restore(text: str, blocks: Sequence[Mapping[str, Any]]) -> str:
    """The source that a rewritten reasoning came from, by its provenance record.

    Args:
      text: the reasoning with its blocks.
      blocks: the record's `blocks`: each with `threads`, each with `first`, `last` and `edits`.

    Raises:
      Unconserved: text and record contradict each other.
    """
    pieces, start, next_line = [], 0, 1
    found = list(_BLOCK.finditer(text))
    if len(found) != len(blocks):
        raise Unconserved(f"the text holds {len(found)} blocks, the record {len(blocks)}")
    for number, (match, recorded) in enumerate(zip(found, blocks, strict=True), start=1):
        before = text[start : match.start()]
        next_line += before.count("\n")
        body = "\n".join(_threads(f"block {number}", match["threads"], recorded, next_line))
        next_line += body.count("\n")
        pieces += [before, body]
        start = match.end()
    return "".join([*pieces, text[start:]])


def require_conserved(source: str, text: str, blocks: Sequence[Mapping[str, Any]]) -> None:
    """Checks a rewritten reasoning against its source.

    Args:
      source: the sequential reasoning.
      text: the reasoning with its blocks.
      blocks: see `restore`.

    Raises:
      Unconserved: a line is missing, doubled, moved or changed without a record.
    """
    restored = restore(text, blocks)
    if restored == source:
        return
    pairs = zip(source.split("\n"), restored.split("\n"), strict=False)
    for line, (expected, found) in enumerate(pairs, start=1):
        if expected != found:
            raise Unconserved(f"line {line} of the source is {expected!r:.80}, got {found!r:.80}")
    raise Unconserved(
        f"the source has {source.count(chr(10)) + 1} lines, {restored.count(chr(10)) + 1} are left"
    )


def _threads(where: str, text: str, recorded: Mapping[str, Any], first_line: int) -> list[str]:
    """Source texts of a block's threads."""
    found = list(_THREAD.finditer(text))
    if "".join(match.group() for match in found) != text:
        raise Unconserved(f"{where}: text between its threads")
    threads = recorded["threads"]
    if len(found) != len(threads):
        raise Unconserved(f"{where}: {len(found)} threads, {len(threads)} in the record")
    bodies = []
    for number, (match, thread) in enumerate(zip(found, threads, strict=True), start=1):
        here = f"{where}, thread {number}"
        if match["number"] != str(number):
            raise Unconserved(f"{here} is numbered {match['number']}")
        body = match["body"]
        for edit in reversed(thread["edits"]):
            start, replace = edit["start"], edit["replace"]
            if start < 0 or body[start : start + len(replace)] != replace:
                raise Unconserved(f"{here}: no {replace!r:.80} at character {start}")
            body = body[:start] + edit["find"] + body[start + len(replace) :]
        last_line = first_line + body.count("\n")
        if (thread["first"], thread["last"]) != (first_line, last_line):
            raise Unconserved(
                f"{here} holds lines {first_line} to {last_line}; the record says "
                f"{thread['first']} to {thread['last']}"
            )
        bodies.append(body)
        first_line = last_line + 1
    return bodies
