"""Recorded replacements in a thread's text: applied one after another, undone in reverse."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence

from tw_jax.data.rewrite.control_text import find_control_tag


@dataclasses.dataclass(frozen=True)
class Edit:
    """One replacement.

    Attributes:
      start: where it begins, in the text that all edits before it left.
      find: the characters that stood there.
      replace: the characters that stand there now.
      reason: why.
    """

    start: int
    find: str
    replace: str
    reason: str


class RefusedEdit(Exception):
    """A replacement that must not be made; the message can be shown to the LLM."""


def strip_edges(text: str) -> tuple[str, tuple[Edit, ...]]:
    """Removes white space at both ends, and says so."""
    edits = []
    front = len(text) - len(text.lstrip())
    if front:
        edits.append(Edit(0, text[:front], "", "white space before the thread"))
        text = text[front:]
    end = len(text.rstrip())
    if end < len(text):
        edits.append(Edit(end, text[end:], "", "white space behind the thread"))
        text = text[:end]
    return text, tuple(edits)


def replace_once(
    text: str,
    replacements: Sequence[tuple[str, str, str]],
    *,
    max_changed_chars: float,
    tags: Collection[str],
) -> tuple[str, tuple[Edit, ...]]:
    """Makes minimal replacements.

    Args:
      text: the thread.
      replacements: (find, replace, reason); each `find` occurs exactly once, and no two overlap.
      max_changed_chars: how many characters the replacements may touch.
      tags: control tags that the result must not spell out.

    Returns:
      The new text without white space at its ends, and the edits that led to it.

    Raises:
      RefusedEdit: one of the rules above is broken, or nothing is left.
    """
    places: list[tuple[int, str, str, str]] = []
    for find, replace, reason in replacements:
        if not find:
            raise RefusedEdit("a `find` is empty")
        if find == replace:
            raise RefusedEdit(f"`find` and `replace` are the same: {find!r:.200}")
        count = _occurrences(text, find)
        if count != 1:
            raise RefusedEdit(
                f"the `find` {find!r:.200} occurs {count} times in the thread; it must be copied "
                "character by character and occur exactly once"
            )
        places.append((text.index(find), find, replace, reason))
    places.sort()
    for (start, find, _, _), following in zip(places, places[1:], strict=False):
        if start + len(find) > following[0]:
            raise RefusedEdit(f"the `find`s {find!r:.200} and {following[1]!r:.200} overlap")
    touched = changed_chars((find, replace) for _, find, replace, _ in places)
    if touched > max_changed_chars:
        raise RefusedEdit(
            f"the replacements touch {touched} characters, at most {int(max_changed_chars)} may "
            "change: replace only the words that refer to another thread"
        )
    edits, shift = [], 0
    for start, find, replace, reason in places:
        edits.append(Edit(start + shift, find, replace, reason))
        text = text[: start + shift] + replace + text[start + shift + len(find) :]
        shift += len(replace) - len(find)
    if tag := find_control_tag(text, tags):
        raise RefusedEdit(f"the result spells out the control tag {tag!r}")
    text, edges = strip_edges(text)
    if not text:
        raise RefusedEdit("nothing is left of the thread")
    return text, (*edits, *edges)


def changed_chars(pairs: Iterable[tuple[str, str]]) -> int:
    """Characters that replacements touch: of each, the longer of before and after."""
    return sum(max(len(find), len(replace)) for find, replace in pairs)


def _occurrences(text: str, find: str) -> int:
    """How often a text occurs in another, overlapping ones included."""
    count, place = 0, text.find(find)
    while place >= 0:
        count, place = count + 1, text.find(find, place + 1)
    return count
