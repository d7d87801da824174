"""A user's grading function from a Python file, in processes and under a time limit.

    # my_rewards.py
    def grade(answer: str, reference: str | None) -> bool | float: ...

It is the user's own code, named by the user; nothing a model wrote is ever run.
"""

import dataclasses
import pathlib
from typing import Literal, Self

from tw_jax.rewards.worker_pool import NoReplyError, WorkerPool

# raised: an exception. not_finite: NaN or infinite. wrong_type: neither a truth value nor a number.
# out_of_range: not in 0..1. timeout: no answer in time. died: the function ended its process.
FailureKind = Literal["raised", "not_finite", "wrong_type", "out_of_range", "timeout", "died"]


@dataclasses.dataclass(frozen=True)
class FunctionFailure:
    """Why a call gave no score.

    Attributes:
      kind: see `FailureKind`.
      message: what was raised or returned.
    """

    kind: FailureKind
    message: str


class FunctionPool(WorkerPool):
    """Calls a function of a file in processes; use it as `with FunctionPool(...) as pool`."""

    def __init__(self, file: pathlib.Path, function: str, *, workers: int, timeout_s: float):
        """Starts nothing yet.

        Args:
          file: the Python file.
          function: its name there.
          workers: processes.
          timeout_s: of one call.
        """
        self._name = f"{file}:{function}"
        super().__init__(
            "tw_jax.rewards.function_worker",
            [str(file), function],
            workers=workers,
            timeout_s=timeout_s,
            environment={"JAX_PLATFORMS": "cpu"},  # the accelerator is the run's
        )

    def __enter__(self) -> Self:
        """Starts one process, so that a file that cannot be used is refused before anything is run.

        Raises:
          UserError: the file cannot be imported, or holds no such function.
        """
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def score(self, answer: str, reference: str | None) -> float | FunctionFailure:
        """The score of an answer, 0 to 1."""
        try:
            reply = self.ask({"answer": answer, "reference": reference})
        except NoReplyError as error:
            said = "gave no answer in time" if error.kind == "timeout" else "ended its process"
            return FunctionFailure(error.kind, f"{self._name} {said}")
        if "failure" in reply:
            return FunctionFailure(reply["failure"], f"{self._name} {reply['message']}")
        return float(reply["score"])
