"""Evaluation on problems of files: sampled and graded as reinforcement learning does it."""

import collections
from collections.abc import Mapping, Sequence

from tw_jax.data.problem_file import ProblemColumns
from tw_jax.data.problem_prompts import PromptedProblem, read_prompted_problems
from tw_jax.data.rejects import Rejects
from tw_jax.evals.metrics import RolloutRecord, Style
from tw_jax.evals.problems import judged_record
from tw_jax.rewards.graders import Grade, GradingConfig, open_grader
from tw_jax.rewards.grading import answer_text, format_valid
from tw_jax.rewards.grading_queue import GradingQueue
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.request import Request, SamplingParams, sampling_seed
from tw_jax.rollout.rollout import Rollout
from tw_jax.train.run_dir import LoadedModel


def evaluate_sources(
    engine: RolloutEngine,
    model: LoadedModel,
    sources: Sequence[str],
    *,
    columns: ProblemColumns,
    as_chat: bool,
    max_reject_share: float,
    grading: GradingConfig,
    styles: Sequence[Style],
    sampling: SamplingParams,
    seed: int,
    samples_per_problem: int,
) -> tuple[dict[Style, list[RolloutRecord]], Mapping[str, int]]:
    """Asks all problems of the sources in every style.

    Args:
      engine: bound to the model's graph and schema.
      model: what is measured.
      sources: of problems; bad ones are counted and said.
      columns: names of their fields.
      as_chat: put plain prompts through the chat template.
      max_reject_share: more bad problems than this share are refused.
      grading: how answers are judged, while others are being sampled.
      styles: "sequential" never forks, "free" lets the model choose.
      sampling: how rollouts are drawn.
      seed: of sampling; the same in every style.
      samples_per_problem: rollouts of each problem in each style.

    Returns:
      Records by style, and how many answers could not be graded, by kind; they count as wrong.

    Raises:
      UserError: a source or a grader that cannot be used.
    """
    rejects = Rejects(None)
    problems = read_prompted_problems(
        sources,
        columns,
        rejects,
        model.tokenizer,
        as_chat=as_chat,
        context_len=engine.config.context_len,
        needs_answers=grading.needs_answers,
        max_reject_share=max_reject_share,
    )
    print(f"{len(problems)} problems, {rejects.summary()}")
    records: dict[Style, list[RolloutRecord]] = {}
    ungraded: collections.Counter[str] = collections.Counter()
    with open_grader(grading) as grader, GradingQueue(grader, grading.at_once) as queue:
        for style in styles:
            requests = [
                Request(
                    problem.prompt,
                    sampling_seed(seed, index, sample),
                    sampling,
                    mode="sequential" if style == "sequential" else "parallel",
                )
                for index, problem in enumerate(problems)
                for sample in range(samples_per_problem)
            ]
            rollouts, grades = _sample(
                engine, model, problems, requests, samples_per_problem, queue
            )
            ungraded.update(grade.failure for grade in grades if grade.failure is not None)
            records[style] = [
                _record(model, rollout, grade, index // samples_per_problem, style)
                for index, (rollout, grade) in enumerate(zip(rollouts, grades, strict=True))
            ]
    for kind, count in sorted(ungraded.items()):
        print(f"{count} answers could not be graded ({kind}); they count as wrong")
    return records, ungraded


def _sample(
    engine: RolloutEngine,
    model: LoadedModel,
    problems: Sequence[PromptedProblem],
    requests: Sequence[Request],
    samples: int,
    queue: GradingQueue,
) -> tuple[list[Rollout], list[Grade]]:
    def submit(index: int, rollout: Rollout) -> None:
        text = answer_text(rollout, model.tokenizer, model.schema)
        queue.submit(index, text, problems[index // samples].reference)

    rollouts = engine.generate(model.params, requests, on_finish=submit)
    grades = queue.collect(None)
    return rollouts, [grades[index] for index in range(len(rollouts))]


def _record(
    model: LoadedModel, rollout: Rollout, grade: Grade, problem: int, style: Style
) -> RolloutRecord:
    return judged_record(
        rollout,
        index=problem,
        style=style,
        answer=grade.extracted,
        correct=grade.correct,
        valid=format_valid(rollout.trajectory, model.schema),
    )
