r"""Graders by name: is the answer that a response states the reference answer?

A grader is called with the part of a response where the answer must stand (`answers.answer_part`)
and with the reference. It never sees the prompt, and it never raises for anything a model wrote.

    exact      the last \boxed{}, or the last line, equals the reference as text
    choice     the letter of a multiple-choice question
    math       the last \boxed{} equals the reference as mathematics (math-verify, in processes)
    countdown  the last \boxed{}, or the last line, makes the target of the reference's numbers
    python     a user's function of a file says so (in processes)
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

from tw_jax.config_checks import require_at_least
from tw_jax.config_fields import SHORTHAND
from tw_jax.rewards.answers import (
    choice_letter,
    last_boxed,
    last_line,
    normalised,
    stated_choice,
)
from tw_jax.rewards.countdown import read_reference, solves
from tw_jax.rewards.function_pool import FunctionFailure, FunctionPool
from tw_jax.rewards.grading_pool import ComparisonPool
from tw_jax.tasks.task import Task

MOST_WORKERS = 8  # where no number is given
# Reading LaTeX takes time that grows with the square of its length. A box that holds more than this
# is prose, or a loop.
_LONGEST_ANSWER_CHARS = 2000
GraderName = Literal["exact", "choice", "math", "countdown", "python"]
# wrong: an answer, but another one. no_answer: none where one is looked for.
# unreadable_reference: the reference itself is no mathematics (or no letter, no Countdown).
# grading_timeout: grading took too long, or, with `math`, ended the process that compared.
# grading_died, _raised, _not_finite, _wrong_type, _out_of_range: what a user's function did.
# grading_backlog: other answers took so long that this one's turn did not come.
Reason = Literal[
    "correct",
    "wrong",
    "no_answer",
    "unreadable_reference",
    "grading_timeout",
    "grading_died",
    "grading_raised",
    "grading_not_finite",
    "grading_wrong_type",
    "grading_out_of_range",
    "grading_backlog",
]
_FUNCTION_REASONS: dict[str, Reason] = {
    "raised": "grading_raised",
    "not_finite": "grading_not_finite",
    "wrong_type": "grading_wrong_type",
    "out_of_range": "grading_out_of_range",
    "timeout": "grading_timeout",
    "died": "grading_died",
}


@dataclasses.dataclass(frozen=True)
class Grade:
    """How an answer was judged.

    Attributes:
      correct: it equals the reference.
      extracted: the answer as it was found; None if there was none.
      reason: why it is not correct, or "correct".
      score: share of the full credit, 0 to 1; None where the grader knows right and wrong only.
      message: what a grader that failed said.
    """

    correct: bool
    extracted: str | None
    reason: Reason
    score: float | None = None
    message: str | None = None

    @property
    def failure(self) -> str | None:
        """Why nothing is known of the answer; None where it was judged."""
        return None if self.reason in ("correct", "wrong", "no_answer") else self.reason


class Grader(Protocol):
    """Judges one answer; may be called from several threads at once."""

    def __call__(self, answer_text: str, reference: str | None, /) -> Grade:
        """Grades the answer in `answer_text` against the reference.

        Args:
          answer_text: the part of a response where the answer must stand.
          reference: None only for graders that need none (`GradingConfig.needs_answers`).
        """
        ...


@dataclasses.dataclass(frozen=True)
class GradingConfig:
    r"""How answers are graded.

    Attributes:
      grader: "math" compares the last \boxed{} as mathematics, "exact" compares text, "choice"
        the letter of a multiple-choice question, "countdown" computes an expression, "python" calls
        your own function. See docs/rewards.md.
      timeout_s: seconds that grading one answer may take; slower ones count as wrong, and are
        reported as `grading_timeout`.
      workers: processes that grade ("math" and "python"); null takes one per core, eight at most.
      file: with "python", the file of your function.
      function: its name there; it is called as `function(answer, reference)` and returns a truth
        value or a number from 0 to 1.
      needs_answers: refuse problems without a reference answer; false is for a function of yours
        that looks at the answer alone, and is given None as the reference then.
    """

    grader: GraderName = dataclasses.field(default="math", metadata={SHORTHAND: True})
    timeout_s: float = 10.0
    workers: int | None = None
    file: pathlib.Path | None = None
    function: str = "grade"
    needs_answers: bool = True

    def __post_init__(self) -> None:
        require_at_least(self, workers=1)
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s={self.timeout_s}: must be positive")
        if (self.grader == "python") != (self.file is not None):
            raise ValueError(
                f"grader={self.grader}, file={self.file}: a file belongs to grader=python, and "
                "grader=python needs one"
            )
        if not self.needs_answers and self.grader != "python":
            raise ValueError(
                f"needs_answers=false: grader={self.grader} compares with a reference; only "
                "grader=python can do without"
            )

    @property
    def at_once(self) -> int:
        """Answers that are graded at a time."""
        return min(os.cpu_count() or 1, MOST_WORKERS) if self.workers is None else self.workers


@contextlib.contextmanager
def open_grader(config: GradingConfig) -> Iterator[Grader]:
    """The grader that a configuration names; its processes end with the block.

    Raises:
      UserError: "math" without the package math-verify; a file or function that cannot be used.
    """
    if config.grader == "exact":
        yield grade_exact
    elif config.grader == "choice":
        yield grade_choice
    elif config.grader == "countdown":
        yield grade_countdown
    elif config.file is not None:
        sizes = {"workers": config.at_once, "timeout_s": config.timeout_s}
        with FunctionPool(config.file.absolute(), config.function, **sizes) as pool:
            yield function_grader(pool.score)
    else:
        with ComparisonPool(config.at_once, config.timeout_s) as pool:
            yield math_grader(pool.equal)


def grade_answers(grader: Grader, pairs: Sequence[tuple[str, str]], *, at_once: int) -> list[Grade]:
    """Grades pairs of (answer text, reference), several at a time; keeps their order."""
    with concurrent.futures.ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(lambda pair: grader(*pair), pairs))


def task_grader(task: Task) -> Grader:
    """Compares what the task's own reader finds in a response, as text."""

    def grade(answer_text: str, reference: str | None) -> Grade:
        stated = task.extract_answer(answer_text)
        if stated is None:
            return Grade(False, None, "no_answer")
        return _judged(stated, stated == reference)

    return grade


def grade_exact(answer_text: str, reference: str | None) -> Grade:
    r"""Compares the last `\boxed{}`, or the last line where nothing is boxed, as text."""
    stated = _stated(answer_text)
    if not stated:
        return Grade(False, None, "no_answer")
    return _judged(stated, normalised(stated) == normalised(_present(reference)))


def grade_countdown(answer_text: str, reference: str | None) -> Grade:
    r"""Computes the expression in the last `\boxed{}`, or in the last line."""
    try:
        problem = read_reference(_present(reference))
    except ValueError as error:
        return Grade(False, None, "unreadable_reference", message=str(error))
    stated = _stated(answer_text)
    if not stated:
        return Grade(False, None, "no_answer")
    return _judged(stated, solves(stated, problem))


def function_grader(score: Callable[[str, str | None], float | FunctionFailure]) -> Grader:
    """A grader that asks a function for a score; the full one is correct."""

    def grade(answer_text: str, reference: str | None) -> Grade:
        stated, value = _stated(answer_text), score(answer_text, reference)
        if isinstance(value, FunctionFailure):
            return Grade(False, stated, _FUNCTION_REASONS[value.kind], 0.0, value.message)
        return dataclasses.replace(_judged(stated, value >= 1), score=value)

    return grade


def grade_choice(answer_text: str, reference: str | None) -> Grade:
    """Compares the letters of a multiple-choice question."""
    expected = choice_letter(normalised(_present(reference)))
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

    def grade(answer_text: str, reference: str | None) -> Grade:
        stated = last_boxed(answer_text)
        if not stated:
            return Grade(False, None, "no_answer")
        expected = last_boxed(_present(reference)) or _present(reference)
        if normalised(stated) == normalised(expected):
            return Grade(True, stated, "correct")  # costs nothing, and cannot hang
        if len(stated) > _LONGEST_ANSWER_CHARS:
            return Grade(False, stated, "wrong")
        outcome = equal(stated, expected)
        if isinstance(outcome, bool):
            return _judged(stated, outcome)
        return Grade(False, stated, outcome)

    return grade


def _stated(answer_text: str) -> str | None:
    boxed = last_boxed(answer_text)
    return last_line(answer_text) if boxed is None else boxed


def _present(reference: str | None) -> str:
    assert reference is not None  # problems without one are refused where they are read
    return reference


def _judged(stated: str | None, correct: bool) -> Grade:
    return Grade(correct, stated, "correct" if correct else "wrong")
