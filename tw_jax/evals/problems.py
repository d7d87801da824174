"""From a task's problem to an engine's request, and from its rollout to a record."""

from typing import Any

from tw_jax.data.text import encode_prompt, encode_response
from tw_jax.evals.metrics import RolloutRecord, Style
from tw_jax.rewards.grading import grade
from tw_jax.rollout.request import Request, SamplingParams
from tw_jax.rollout.rollout import Rollout
from tw_jax.tasks.task import Problem, Task
from tw_jax.trajectory.metrics import acceleration_ratio
from tw_jax.trajectory.schema import Schema


def style_request(
    tokenizer: Any,
    schema: Schema,
    task: Task,
    problem: Problem,
    style: Style,
    sampling: SamplingParams,
    seed: int,
) -> Request:
    """The request that asks one problem in one style."""
    prefix: tuple[int, ...] = ()
    if style != "free":
        text = task.style_prefix(style, problem)
        # Ours, not a user's: its tags are meant to be control tokens. The end of text goes.
        prefix = tuple(encode_response(tokenizer, text, schema.eos_id)[:-1].tolist())
    return Request(
        prompt=encode_prompt(tokenizer, problem.prompt),
        seed=seed,
        sampling=sampling,
        mode="sequential" if style == "sequential" else "parallel",
        forced_prefix=prefix,
    )


def record_rollout(
    rollout: Rollout,
    problem: Problem,
    task: Task,
    tokenizer: Any,
    schema: Schema,
    *,
    index: int,
    style: Style,
    seconds: float | None = None,
) -> RolloutRecord:
    """Grades a rollout of problem number `index`."""
    graded = grade(rollout, problem, task, tokenizer, schema)
    return judged_record(
        rollout,
        index=index,
        style=style,
        answer=graded.answer,
        correct=graded.correct,
        valid=graded.format_valid,
        seconds=seconds,
    )


def judged_record(
    rollout: Rollout,
    *,
    index: int,
    style: Style,
    answer: str | None,
    correct: bool,
    valid: bool,
    seconds: float | None = None,
) -> RolloutRecord:
    """The record of a rollout of problem number `index` that has been judged already."""
    return RolloutRecord(
        problem=index,
        style=style,
        answer=answer,
        correct=correct,
        total_tokens=rollout.total_tokens,
        critical_path=rollout.critical_path,
        acceleration_ratio=acceleration_ratio(rollout.total_tokens, rollout.critical_path),
        has_block=bool(rollout.trajectory.blocks),
        format_valid=valid,
        finish_reason=rollout.finish_reason,
        seconds=seconds,
    )
