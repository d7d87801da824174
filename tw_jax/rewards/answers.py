"""Where a response states its answer, and how answers are written: plain functions of text."""

import re
import unicodedata

_THINKING, _THINKING_END = "<think>", "</think>"
_BOXES = ("\\boxed", "\\fbox")
# "B", "(B)", "B.", "\text{(B)}": a letter of a multiple-choice question and nothing else.
_CHOICE = re.compile(r"(?:\\(?:text|textbf|mathrm)\s*\{)?\s*\(?\s*([A-Z])\s*\)?\s*[.:]?\s*\}?")
_STATED_CHOICE = re.compile(
    r"(?i:\banswer)(?i:\s+is)?\s*[:=]?\s*\**\s*(?i:option\s+)?\(?([A-Z])(?![A-Za-z'])"
)


def answer_part(response: str, behind_blocks: str | None = None) -> str:
    """What follows the reasoning: there the answer must stand.

    Args:
      response: all that the model wrote.
      behind_blocks: its part behind the last parallel block, where it has one.

    Returns:
      The text behind the last `</think>`; nothing, where the thinking began and was cut off;
      without any thinking, what stands behind the last parallel block; without that, the whole
      response.
    """
    _, mark, behind = response.rpartition(_THINKING_END)
    if mark:
        return behind
    if _THINKING in response:
        return ""
    return response if behind_blocks is None else behind_blocks


def last_boxed(text: str) -> str | None:
    r"""The content of the last whole `\boxed{...}` or `\fbox{...}`, None if there is none.

    Braces inside are balanced; escaped ones (`\{`) do not count. `\boxed 5`, which TeX admits for
    one character, is read as well.
    """
    place = len(text)
    while (place := max(text.rfind(box, 0, place) for box in _BOXES)) >= 0:
        start = place + len(next(box for box in _BOXES if text.startswith(box, place)))
        content = _argument(text, start)
        if content is not None:
            return content.strip()
    return None


def _argument(text: str, start: int) -> str | None:
    """The TeX argument at `start`: a balanced group or, behind a space, one character."""
    if text[start : start + 1] == " " and text[start + 1 : start + 2].isalnum():
        return text[start + 1]
    while text[start : start + 1] == " ":
        start += 1
    if text[start : start + 1] != "{":
        return None
    depth, place = 0, start
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 1 : place]
        place += 1
    return None


def last_line(text: str) -> str | None:
    """The last line that is not blank, None if all are."""
    lines = text.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def normalised(text: str) -> str:
    """Text for comparison: Unicode forms unified, runs of white space one blank, case kept."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def choice_letter(text: str) -> str | None:
    """The letter that an answer to a multiple-choice question consists of, None if it is none."""
    match = _CHOICE.fullmatch(text.strip())
    return match[1] if match else None


def stated_choice(text: str) -> str | None:
    r"""The letter that a text settles on, None if it names none.

    Looked for in this order: the last `\boxed{}`; the last "answer is B" or "Answer: (B)"; a last
    line that is a letter alone.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return choice_letter(boxed)
    stated = _STATED_CHOICE.findall(text)
    if stated:
        return stated[-1]
    line = last_line(text)
    return None if line is None else choice_letter(line)
