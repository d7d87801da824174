"""Processes that answer questions, each question under a time limit.

What grades an answer may loop for ever, in C too, where no signal handler runs, or end its process.
So it runs in processes of its own; one that does not answer in time is ended and replaced, and the
run goes on.
"""

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from tw_jax.errors import UserError

_START_TIMEOUT_S = 120.0  # importing sympy, on a busy machine
_READ_BYTES = 65536
_READY = b"ready"


class NoReplyError(Exception):
    """A question got no answer.

    Attributes:
      kind: "timeout", or "died" where the process ended.
    """

    def __init__(self, kind: Literal["timeout", "died"]) -> None:
        super().__init__(kind)
        self.kind: Literal["timeout", "died"] = kind


class WorkerPool:
    """Asks processes; use it as `with WorkerPool(...) as pool`.

    A process is `python -m MODULE ARGUMENTS`. It prints the line `ready`, or why it cannot serve;
    then it reads questions, lines of JSON, and answers each with a line of JSON. Processes are
    started when they are needed first. Every method may be called from several threads; as many
    questions are worked on at a time as there are workers.

    Attributes:
      replaced: processes that were ended because they did not answer in time, or had died.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        workers: int,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
          module: what the processes run.
          arguments: its arguments.
          workers: processes.
          timeout_s: of one question.
          environment: added to this process's variables.
        """
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = {**os.environ, **(environment or {})}
        self._timeout_s = timeout_s
        self._idle: queue.Queue[_Worker | None] = queue.Queue()
        self._count = workers
        for _ in range(workers):
            self._idle.put(None)
        self.replaced = 0
        self._lock = threading.Lock()
        self._alive: set[_Worker] = set()
        self._closed = self._has_started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends all processes, also those that are at work: their questions get no answer."""
        with self._lock:
            self._closed = True
            for worker in self._alive:
                worker.kill()
        for _ in range(self._count):
            worker = self._idle.get()
            if worker is not None:
                worker.end()
        for _ in range(self._count):  # for whoever still waits for a worker
            self._idle.put(None)

    def start(self) -> None:
        """Starts one process now.

        Raises:
          UserError: it does not start; says what it printed.
        """
        worker = self._idle.get()
        try:
            worker = worker or self._start()
        finally:
            self._idle.put(worker)

    def ask(self, question: Mapping[str, Any]) -> Any:
        """The answer to a question; waits for a worker that is free.

        Raises:
          NoReplyError: no answer in time, or the worker died of the question.
          UserError: the pool's first process does not start.
        """
        worker = self._idle.get()
        try:
            if worker is not None and worker.has_ended:  # something else ended it while it was idle
                self._end(worker)
                worker = None
            if worker is None:
                worker = self._start()
            return json.loads(worker.ask(question, self._timeout_s))
        except BaseException as error:
            if worker is not None:
                self._end(worker)
                self.replaced += isinstance(error, NoReplyError)
            worker = None
            raise
        finally:
            self._idle.put(worker)

    def _start(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise NoReplyError("died")
            worker = _Worker(self._command, self._environment)
            self._alive.add(worker)
        try:
            said = worker.line(_START_TIMEOUT_S)
        except NoReplyError:
            said = b""
        if said == _READY:
            self._has_started = True
            return worker
        self._end(worker)
        if self._has_started or self._closed:  # it did before: the question is lost, not the run
            raise NoReplyError("died")
        raise UserError(
            said.decode(errors="replace")
            or "a process that grades answers does not start; see what "
            f"`{' '.join(self._command)}` says"
        )

    def _end(self, worker: "_Worker") -> None:
        with self._lock:
            self._alive.discard(worker)
        worker.end()


class _Worker:
    """One running process."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # it is ended with whatever it started; Ctrl-C is for the run
        )
        assert self._process.stdin is not None
        os.set_blocking(
            self._process.stdin.fileno(), False
        )  # one that does not read holds up nobody

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, question: Mapping[str, Any], timeout_s: float) -> bytes:
        deadline_s = time.monotonic() + timeout_s
        self._write(json.dumps({**question, "limit_s": timeout_s}).encode() + b"\n", deadline_s)
        return self.line(deadline_s - time.monotonic())

    def _write(self, asked: bytes, deadline_s: float) -> None:
        assert self._process.stdin is not None
        descriptor = self._process.stdin.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        while asked:
            left_ms = (deadline_s - time.monotonic()) * 1000
            if left_ms <= 0 or not poll.poll(left_ms):
                raise NoReplyError("timeout")
            try:
                asked = asked[os.write(descriptor, asked) :]
            except BlockingIOError:
                continue
            except OSError:  # it died just now
                raise NoReplyError("died") from None

    def kill(self) -> None:
        """Ends the process and what it started; the pipes stay, for whoever reads them."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()

    def line(self, timeout_s: float) -> bytes:
        """The next line without its end.

        Raises:
          NoReplyError: none comes in time, or the process ended.
        """
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        deadline_s, received = time.monotonic() + timeout_s, b""
        while not received.endswith(b"\n"):
            left_ms = (deadline_s - time.monotonic()) * 1000
            if left_ms <= 0 or not poll.poll(left_ms):
                raise NoReplyError("timeout")
            piece = os.read(descriptor, _READ_BYTES)
            if not piece:
                raise NoReplyError("died")
            received += piece
        return received[:-1]
