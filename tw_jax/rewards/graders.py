r"""Graders by name: is the answer that a response states the reference answer?

A grader is called with the part of a response where the answer must stand (`answers.answer_part`)
and with the reference. It never sees the prompt, and it never raises for anything a model wrote.

    exact    the last \boxed{}, or the last line, equals the reference as text
    choice   the letter of a multiple-choice question
    math     the last \boxed{} equals the reference as mathematics (math-verify, in processes)
"""

import concurrent.futures
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

from tw_jax.config_checks import require_at_least
from tw_jax.rewards.answers import (
    choice_letter,
    last_boxed,
    last_line,
    normalised,
    stated_choice,
)
from tw_jax.rewards.grading_pool import ComparisonPool
from tw_jax.tasks.task import Task

MOST_WORKERS = 8  # where no number is given
# Reading LaTeX takes time that grows with the square of its length. A box that holds more than this
# is prose, or a loop.
_LONGEST_ANSWER_CHARS = 2000
GraderName = Literal["exact", "choice", "math"]
# wrong: an answer, but another one. no_answer: none where one is looked for.
# unreadable_reference: the reference itself is no mathematics (or no letter).
# grading_timeout: comparing took too long, or ended the process that compared.
Reason = Literal["correct", "wrong", "no_answer", "unreadable_reference", "grading_timeout"]


@dataclasses.dataclass(frozen=True)
class Grade:
    """How an answer was judged.

    Attributes:
      correct: it equals the reference.
      extracted: the answer as it was found; None if there was none.
      reason: why it is not correct, or "correct".
    """

    correct: bool
    extracted: str | None
    reason: Reason


class Grader(Protocol):
    """Judges one answer; may be called from several threads at once."""

    def __call__(self, answer_text: str, reference: str) -> Grade:
        """Grades the answer in `answer_text` against the reference."""
        ...


@dataclasses.dataclass(frozen=True)
class GradingConfig:
    r"""How answers are graded.

    Attributes:
      grader: "math" compares the last \boxed{} as mathematics, "exact" compares text, "choice"
        the letter of a multiple-choice question.
      timeout_s: seconds that comparing one answer may take; slower ones count as wrong, and are
        reported as `grading_timeout`.
      workers: processes that compare mathematics; null takes one per core, eight at most.
    """

    grader: GraderName = "math"
    timeout_s: float = 10.0
    workers: int | None = None

    def __post_init__(self) -> None:
        require_at_least(self, workers=1)
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s={self.timeout_s}: must be positive")

    @property
    def at_once(self) -> int:
        """Answers that are graded at a time."""
        return min(os.cpu_count() or 1, MOST_WORKERS) if self.workers is None else self.workers


@contextlib.contextmanager
def open_grader(config: GradingConfig) -> Iterator[Grader]:
    """The grader that a configuration names; its processes end with the block.

    Raises:
      UserError: "math" without the package math-verify.
    """
    if config.grader == "exact":
        yield grade_exact
    elif config.grader == "choice":
        yield grade_choice
    else:
        with ComparisonPool(config.at_once, config.timeout_s) as pool:
            yield math_grader(pool.equal)


def grade_answers(grader: Grader, pairs: Sequence[tuple[str, str]], *, at_once: int) -> list[Grade]:
    """Grades pairs of (answer text, reference), several at a time; keeps their order."""
    with concurrent.futures.ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(lambda pair: grader(*pair), pairs))


def task_grader(task: Task) -> Grader:
    """Compares what the task's own reader finds in a response, as text."""

    def grade(answer_text: str, reference: str) -> Grade:
        stated = task.extract_answer(answer_text)
        if stated is None:
            return Grade(False, None, "no_answer")
        return _judged(stated, stated == reference)

    return grade


def grade_exact(answer_text: str, reference: str) -> Grade:
    r"""Compares the last `\boxed{}`, or the last line where nothing is boxed, as text."""
    stated = last_boxed(answer_text)
    if stated is None:
        stated = last_line(answer_text)
    if not stated:
        return Grade(False, None, "no_answer")
    return _judged(stated, normalised(stated) == normalised(reference))


def grade_choice(answer_text: str, reference: str) -> Grade:
    """Compares the letters of a multiple-choice question."""
    expected = choice_letter(normalised(reference))
    if expected is None:
        return Grade(False, None, "unreadable_reference")
    stated = stated_choice(answer_text)
    if stated is None:
        return Grade(False, None, "no_answer")
    return _judged(stated, stated == expected)


def math_grader(
    equal: Callable[[str, str], bool | Literal["unreadable_reference", "grading_timeout"]],
) -> Grader:
    r"""A grader that compares the last `\boxed{}` with `equal(stated, reference)`."""

    def grade(answer_text: str, reference: str) -> Grade:
        stated = last_boxed(answer_text)
        if not stated:
            return Grade(False, None, "no_answer")
        expected = last_boxed(reference) or reference
        if normalised(stated) == normalised(expected):
            return Grade(True, stated, "correct")  # costs nothing, and cannot hang
        if len(stated) > _LONGEST_ANSWER_CHARS:
            return Grade(False, stated, "wrong")
        outcome = equal(stated, expected)
        if isinstance(outcome, bool):
            return _judged(stated, outcome)
        return Grade(False, stated, outcome)

    return grade


def _judged(stated: str, correct: bool) -> Grade:
    return Grade(correct, stated, "correct" if correct else "wrong")
