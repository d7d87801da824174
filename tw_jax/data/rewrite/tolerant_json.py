"""JSON out of an LLM's answer: fences, prose and trailing commas are forgiven, missing ends not."""

import json
from collections.abc import Iterator
from typing import Any

_CLOSERS = {"{": "}", "[": "]"}
_THINK_END = "</think>"


class NoJson(Exception):
    """An answer that holds no whole JSON object or list; the message can be shown to the LLM."""


def json_values(text: str) -> list[Any]:
    """The outermost JSON objects and lists of an answer, in order.

    Args:
      text: the answer; hidden reasoning up to `</think>` is skipped.

    Raises:
      NoJson: there is none, or the answer ends before one does: what is missing is never guessed.
    """
    text = text.rpartition(_THINK_END)[2]
    whole = _decoded(text)
    if whole is not None:
        return [whole]
    values = [value for part in _outermost(text) if (value := _decoded(part)) is not None]
    if not values:
        raise NoJson("the answer holds no JSON object")
    return values


def _decoded(text: str) -> Any:
    """The object or list that a text is; None if it is neither."""
    for candidate in (text, _without_trailing_commas(text)):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        return value if isinstance(value, dict | list) else None
    return None


def _outermost(text: str) -> Iterator[str]:
    """Texts from an opening bracket to the one that closes it."""
    place = 0
    while (start := _next_opener(text, place)) is not None:
        end = _matching_end(text, start)
        if end is None:
            raise NoJson("the answer ends in the middle of its JSON")
        yield text[start:end]
        place = end


def _next_opener(text: str, place: int) -> int | None:
    starts = [start for opener in _CLOSERS if (start := text.find(opener, place)) >= 0]
    return min(starts, default=None)


def _matching_end(text: str, start: int) -> int | None:
    """One past the bracket that closes the one at `start`, or where brackets stop to match."""
    open_brackets: list[str] = []
    in_string = escaped = False
    for place in range(start, len(text)):
        character = text[place]
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        elif character in _CLOSERS:
            open_brackets.append(_CLOSERS[character])
        elif open_brackets and character in "]}":
            if character != open_brackets.pop():
                return place + 1
            if not open_brackets:
                return place + 1
    return None


def _without_trailing_commas(text: str) -> str:
    """Leaves out commas that only white space parts from a closing bracket."""
    kept: list[str] = []
    comma: int | None = None  # where in `kept` the last comma is, while nothing but space follows
    in_string = escaped = False
    for character in text:
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string, comma = True, None
        elif character == ",":
            comma = len(kept)
        elif character in "]}" and comma is not None:
            kept[comma] = ""
            comma = None
        elif not character.isspace():
            comma = None
        kept.append(character)
    return "".join(kept)
