"""Grades a rollout: is the answer right, are the blocks well formed."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tw_jax.errors import UserError
from tw_jax.rewards.answers import answer_part
from tw_jax.rewards.facts import RolloutFacts
from tw_jax.rewards.graders import Grade
from tw_jax.rollout.rollout import Rollout
from tw_jax.tasks.task import Problem, Task
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import Trajectory

_SHOWN_MESSAGES = 3


@dataclasses.dataclass(frozen=True)
class Graded:
    """How a rollout was judged.

    Attributes:
      answer: what the response states where its answer must stand, None if nothing.
      correct: the answer equals the problem's.
      format_valid: every parallel block parses strictly.
    """

    answer: str | None
    correct: bool
    format_valid: bool


def response_text(rollout: Rollout, tokenizer: Any) -> str:
    """The response as text, control tags kept."""
    return tokenizer.decode(rollout.response, skip_special_tokens=False)


def answer_text(rollout: Rollout, tokenizer: Any, schema: Schema) -> str:
    """The part of a response where its answer must stand; the prompt is never looked at.

    See `tw_jax.rewards.answers.answer_part`; the end-of-text token is left out.
    """
    tokens, prompt_len = rollout.trajectory.tokens, rollout.trajectory.prompt_len
    ended = len(tokens) > prompt_len and int(tokens[-1]) == schema.eos_id
    return _answer_text(rollout.trajectory, len(tokens) - ended, tokenizer)


def _answer_text(trajectory: Trajectory, end: int, tokenizer: Any) -> str:
    def text(start: int) -> str:
        return tokenizer.decode(trajectory.tokens[start:end], skip_special_tokens=False)

    behind = text(trajectory.blocks[-1].end) if trajectory.blocks else None
    return answer_part(text(trajectory.prompt_len), behind)


def rollout_answer(rollout: Rollout, task: Task, tokenizer: Any) -> str | None:
    """The answer to a task's problem, stated where `answer_text` looks; None if nothing."""
    trajectory = rollout.trajectory
    return task.extract_answer(_answer_text(trajectory, len(trajectory.tokens), tokenizer))


def grade(rollout: Rollout, problem: Problem, task: Task, tokenizer: Any, schema: Schema) -> Graded:
    """Grades a task's problem by exact match of the stated answer."""
    answer = rollout_answer(rollout, task, tokenizer)
    return Graded(answer, answer == problem.answer, format_valid(rollout.trajectory, schema))


def rollout_facts(
    rollout: Rollout, grade: Grade, schema: Schema, *, token_budget: int | None = None
) -> RolloutFacts:
    """What rewards depend on.

    Args:
      rollout: finished.
      grade: of its answer.
      schema: its language.
      token_budget: most tokens after the prompt that it could have.
    """
    breaks = format_breaks(rollout.trajectory, schema)
    blocks = rollout.trajectory.blocks
    return RolloutFacts(
        correct=grade.correct,
        format_valid=not breaks,
        total_tokens=rollout.total_tokens,
        critical_path=rollout.critical_path,
        blocks=len(blocks),
        threads=sum(len(block.threads) for block in blocks),
        format_breaks=breaks,
        score=grade.score,
        grading_failure=grade.failure,
        finish_reason=rollout.finish_reason,
        token_budget=token_budget,
    )


def format_breaks(trajectory: Trajectory, schema: Schema) -> tuple[str, ...]:
    """Kinds of all that does not parse strictly, each once; a response without blocks has none."""
    parsed = schema.parse(trajectory.tokens, trajectory.prompt_len)
    errors = schema.validate(parsed) if isinstance(parsed, Trajectory) else parsed
    return tuple(dict.fromkeys(error.kind for error in errors))


def format_valid(trajectory: Trajectory, schema: Schema) -> bool:
    """Whether every block parses strictly; a response without blocks is valid."""
    return not format_breaks(trajectory, schema)


def require_graded(grades: Sequence[Grade], max_ungraded_share: float) -> None:
    """Stops a run whose grader fails more often than admitted.

    Raises:
      UserError: it did; says how often, in which ways, and what the grader said.
    """
    failed = [grade for grade in grades if grade.failure is not None]
    if len(failed) <= max_ungraded_share * len(grades):
        return
    kinds = [grade.failure for grade in failed]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    said = list(dict.fromkeys(grade.message for grade in failed if grade.message))
    shown = "".join(f"\n  {message}" for message in said[:_SHOWN_MESSAGES])
    raise UserError(
        f"{len(failed)} of {len(grades)} answers of a step could not be graded ({counts}), more "
        f"than max_ungraded_share={max_ungraded_share:g} admits. Mend the grader or the reference "
        f"answers, raise grading.timeout_s, or raise max_ungraded_share; the same command goes on "
        f"from the last checkpoint{shown}"
    )
