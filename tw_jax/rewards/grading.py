"""Grades a rollout: is the answer right, are the blocks well formed."""

import dataclasses
from typing import Any

from tw_jax.rollout.rollout import Rollout
from tw_jax.tasks.task import Problem, Task
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Graded:
    """How a rollout was judged.

    Attributes:
      answer: what the response states after its last parallel block, None if nothing.
      correct: the answer equals the problem's.
      format_valid: every parallel block parses strictly.
    """

    answer: str | None
    correct: bool
    format_valid: bool


def response_text(rollout: Rollout, tokenizer: Any) -> str:
    """The response as text, control tags kept."""
    return tokenizer.decode(rollout.response, skip_special_tokens=False)


def rollout_answer(rollout: Rollout, task: Task, tokenizer: Any) -> str | None:
    """The answer stated behind the last parallel block, None if nothing."""
    trajectory = rollout.trajectory
    start = trajectory.blocks[-1].end if trajectory.blocks else trajectory.prompt_len
    tail = tokenizer.decode(trajectory.tokens[start:], skip_special_tokens=False)
    return task.extract_answer(tail)


def grade(rollout: Rollout, problem: Problem, task: Task, tokenizer: Any, schema: Schema) -> Graded:
    """Grades by exact match of the answer stated behind the last parallel block."""
    answer = rollout_answer(rollout, task, tokenizer)
    return Graded(answer, answer == problem.answer, format_valid(rollout.trajectory, schema))


def format_valid(trajectory: Trajectory, schema: Schema) -> bool:
    """Whether every block parses strictly; a response without blocks is valid."""
    parsed = schema.parse(trajectory.tokens, trajectory.prompt_len)
    return isinstance(parsed, Trajectory) and not schema.validate(parsed)
