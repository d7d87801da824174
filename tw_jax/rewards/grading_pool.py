"""Processes that compare mathematical answers, each comparison under a time limit.

sympy can be sent into hours of work by a few characters (`9^{9^{9^9}}`), some of it in C, where no
signal reaches. So comparisons run in processes of their own; one that does not answer in time is
ended and replaced, and the run goes on.
"""

import contextlib
import importlib.util
import json
import os
import queue
import select
import subprocess
import sys
import time
from typing import Literal

from tw_jax.errors import UserError

Outcome = bool | Literal["unreadable_reference", "grading_timeout"]

_START_TIMEOUT_S = 120.0  # importing sympy, on a busy machine
_READ_BYTES = 65536


class ComparisonPool:
    """Compares answers in processes; use it as `with ComparisonPool(...) as pool`.

    Processes are started when they are needed first. Every method may be called from several
    threads; as many comparisons run at a time as there are workers.

    Attributes:
      replaced: processes that were ended because they did not answer in time.
    """

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
        self._timeout_s = timeout_s
        self._idle: queue.Queue[_Worker | None] = queue.Queue()
        self._count = workers
        for _ in range(workers):
            self._idle.put(None)
        self.replaced = 0

    def __enter__(self) -> "ComparisonPool":
        return self

    def __exit__(self, *error: object) -> None:
        for _ in range(self._count):
            worker = self._idle.get()
            if worker is not None:
                worker.end()

    def equal(self, stated: str, reference: str) -> Outcome:
        """Whether two answers are the same mathematics; waits for a worker that is free.

        Returns:
          `grading_timeout` also where the worker died of the comparison.

        Raises:
          UserError: a worker does not start.
        """
        worker = self._idle.get()
        try:
            if worker is not None and worker.has_ended:  # something else ended it while it was idle
                worker.end()
                worker = None
            if worker is None:
                worker = _Worker()
            outcome = worker.ask(stated, reference, self._timeout_s)
            if outcome == "grading_timeout":
                self.replaced += 1
                worker.end()
                worker = None
            return outcome
        except BaseException:
            if worker is not None:
                worker.end()
            worker = None
            raise
        finally:
            self._idle.put(worker)


class _Worker:
    """One running `tw_jax.rewards.math_worker`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tw_jax.rewards.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        if self._line(_START_TIMEOUT_S) != b"ready":
            self.end()
            raise UserError(
                "a process that grades mathematics does not start; "
                f"see what `{sys.executable} -m tw_jax.rewards.math_worker` says"
            )

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, stated: str, reference: str, timeout_s: float) -> Outcome:
        asked = {"stated": stated, "reference": reference, "limit_s": timeout_s}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        except OSError:  # it died just now
            return "grading_timeout"
        line = self._line(timeout_s)
        return "grading_timeout" if line is None else json.loads(line)

    def end(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()

    def _line(self, timeout_s: float) -> bytes | None:
        """The next line without its end; None if none comes in time."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        deadline_s, received = time.monotonic() + timeout_s, b""
        while not received.endswith(b"\n"):
            left_ms = (deadline_s - time.monotonic()) * 1000
            if left_ms <= 0 or not poll.poll(left_ms):
                return None
            piece = os.read(descriptor, _READ_BYTES)
            if not piece:
                return None
            received += piece
        return received[:-1]
