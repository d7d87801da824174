"""Which problem stands at which position of an RL run, and how its answers are graded.

A run asks positions 0, 1, 2, ... in order, `prompts` of them per step. The problem at a position is
a function of the seed alone, so that a resumed run goes on without any state: of a task, its
stream; of files, a new shuffled order in every pass over them.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from tw_jax.data.problem_prompts import problems_digest, read_prompted_problems
from tw_jax.data.rejects import Rejects
from tw_jax.data.text import encode_prompt
from tw_jax.parallel.processes import is_first_process
from tw_jax.rewards.graders import open_grader, task_grader
from tw_jax.rewards.grading_queue import GradingQueue
from tw_jax.tasks.registry import make_task
from tw_jax.tasks.task import random_words
from tw_jax.train.rl_config import RLConfig

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer


@dataclasses.dataclass(frozen=True)
class RLProblem:
    """One problem of a step.

    Attributes:
      prompt: token ids.
      reference: the answer; None where the grader needs none.
    """

    prompt: Int32[np.ndarray, "prompt"]
    reference: str | None


@dataclasses.dataclass(frozen=True)
class RLProblems:
    """The problems of a run.

    Attributes:
      at: the problem at a position.
      grading: judges answers while others are being sampled.
      meta: what a resumed run must agree on.
    """

    at: Callable[[int], RLProblem]
    grading: GradingQueue
    meta: Mapping[str, Any]


@contextlib.contextmanager
def open_problems(
    config: RLConfig, tokenizer: "Tokenizer", run_dir: pathlib.Path
) -> Iterator[RLProblems]:
    """The problems that a configuration names; what grades them ends with the block.

    Args:
      config: of the run.
      tokenizer: the model's.
      run_dir: bad problems are listed there, in `rejects.jsonl`.

    Raises:
      UserError: a source of problems or a grader that cannot be used.
    """
    if not config.problems:
        task = make_task(config.task)

        def of_task(position: int) -> RLProblem:
            problem = task.problem("train", position, config.seed)
            return RLProblem(encode_prompt(tokenizer, problem.prompt), problem.answer)

        with GradingQueue(task_grader(task), at_once=1) as grading:
            yield RLProblems(of_task, grading, {"task": dataclasses.asdict(config.task)})
        return

    listed = run_dir / "rejects.jsonl" if is_first_process() else None
    rejects = Rejects(listed, sources=config.problems)
    problems = read_prompted_problems(
        config.problems,
        config.columns,
        rejects,
        tokenizer,
        as_chat=config.as_chat,
        context_len=config.engine.context_len,
        needs_answers=config.grading.needs_answers,
        max_reject_share=config.max_reject_share,
    )
    if is_first_process():
        print(f"{len(problems)} problems, {rejects.summary()}")

    def of_files(position: int) -> RLProblem:
        problem = problems[shuffled_index(len(problems), position, config.seed)]
        return RLProblem(problem.prompt, problem.reference)

    with (
        open_grader(config.grading) as grader,
        GradingQueue(grader, config.grading.at_once) as grading,
    ):
        yield RLProblems(of_files, grading, {"problems": problems_digest(problems)})


def shuffled_index(count: int, position: int, seed: int) -> int:
    """Which of `count` items stands at a position: every pass has all, in an order of its own."""
    epoch, place = divmod(position, count)
    return int(_order(count, epoch, seed)[place])


@functools.lru_cache(maxsize=2)  # a step may span the end of a pass
def _order(count: int, epoch: int, seed: int) -> Int32[np.ndarray, "count"]:
    """Sorted by a keyed hash: NumPy's own shuffling may change between its versions."""
    keys = [next(random_words("problem order", seed, epoch, index)) for index in range(count)]
    return np.argsort(np.asarray(keys, np.uint64), kind="stable").astype(np.int32)
