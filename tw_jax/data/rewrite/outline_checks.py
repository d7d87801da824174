"""What a plan must be: one short line per thread, written from the context alone."""

import re
from collections.abc import Collection, Sequence

from tw_jax.data.rewrite.control_text import find_control_tag

_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_OWN_NUMBER = re.compile(r"^\s*(\d+)\s*[:.)]\s+")


def tidy_outlines(outlines: Sequence[str]) -> list[str]:
    """Plans without white space around them and without the numbers that an LLM may have added."""
    tidy = []
    for number, plan in enumerate(outlines, start=1):
        match = _OWN_NUMBER.match(plan)
        if match and match[1] == str(number):
            plan = plan[match.end() :]
        tidy.append(plan.strip())
    return tidy


def outline_problem(
    outlines: Sequence[str],
    threads: Sequence[str],
    known: str,
    *,
    max_outline_chars: int,
    tags: Collection[str],
) -> str | None:
    """What is wrong with a block's plans; None if nothing is.

    Args:
      outlines: the plans, tidy.
      threads: the texts that they plan.
      known: the problem and everything before the block.
      max_outline_chars: longest plan.
      tags: control tags that a plan must not spell out.
    """
    if len(outlines) != len(threads):
        return f"{len(outlines)} outlines for {len(threads)} threads; give one per thread, in order"
    known_numbers = long_numbers(known)
    for number, (plan, thread) in enumerate(zip(outlines, threads, strict=True), start=1):
        if not plan:
            return f"outline {number} is empty"
        if len(plan.splitlines()) > 1:
            return f"outline {number} has a line break; it must be one line"
        if len(plan) > max_outline_chars:
            return f"outline {number} has {len(plan)} characters; at most {max_outline_chars}"
        if tag := find_control_tag(plan, tags):
            return f"outline {number} spells out the control tag {tag!r}"
        if leaked := (long_numbers(plan) & long_numbers(thread)) - known_numbers:
            return (
                f"outline {number} gives away {', '.join(sorted(leaked))}, which the thread only "
                "finds out; a plan says what to do, not what comes out"
            )
    if len(set(outlines)) < len(outlines):
        return "two outlines are the same; each must say what its own thread does"
    return None


def long_numbers(text: str) -> set[str]:
    """Numbers of two or more digits, without separators of thousands."""
    numbers = (match.group().replace(",", "") for match in _NUMBER.finditer(text))
    return {number for number in numbers if sum(c.isdigit() for c in number) >= 2}
