"""Processes that compare mathematical answers, each comparison under a time limit.

sympy can be sent into hours of work by a few characters (`9^{9^{9^9}}`), some of it in C, where no
signal reaches; see `tw_jax.rewards.worker_pool`.
"""

import importlib.util
from typing import Literal

from tw_jax.errors import UserError
from tw_jax.rewards.worker_pool import NoReplyError, WorkerPool

Outcome = bool | Literal["unreadable_reference", "grading_timeout"]


class ComparisonPool(WorkerPool):
    """Compares answers in processes; use it as `with ComparisonPool(...) as pool`."""

    def __init__(self, workers: int, timeout_s: float) -> None:
        """Starts nothing yet.

        Args:
          workers: processes.
          timeout_s: of one comparison.

        Raises:
          UserError: math-verify is not installed.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "grading mathematics needs the package 'math-verify': pip install 'tw-jax[data]'"
            )
        super().__init__("tw_jax.rewards.math_worker", workers=workers, timeout_s=timeout_s)

    def equal(self, stated: str, reference: str) -> Outcome:
        """Whether two answers are the same mathematics; waits for a worker that is free.

        Returns:
          `grading_timeout` also where the worker died of the comparison.

        Raises:
          UserError: a worker does not start.
        """
        try:
            return self.ask({"stated": stated, "reference": reference})
        except NoReplyError:
            return "grading_timeout"
