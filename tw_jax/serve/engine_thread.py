"""The thread that owns the engine's session, and the event loop's way to it.

The loop's side (`submit`, `cancel`, `outstanding`) is called on the event loop only; the thread
takes commands from an inbox, polls while anything runs, sleeps while nothing does, and hands
results back with `call_soon_threadsafe`.

When the engine fails, the requests in it fail with it, and a fresh session takes over. When it
fails several times without a single request served in between, it stays down, and `on_fatal` is
called.
"""

import asyncio
import collections
import logging
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tw_jax.errors import UserError
from tw_jax.models import Params
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.live_text import LiveText
from tw_jax.rollout.request import Request, SamplingParams
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.session import Session

MAX_FAILURES = 3

logger = logging.getLogger(__name__)


class BusyError(Exception):
    """As many requests wait as the server takes."""


class EngineDownError(Exception):
    """The engine has failed for good."""


class Job:
    """One request on its way through the engine; its fields change on the event loop only.

    Attributes:
      request: what is asked of the engine.
      watched: whether `live` is kept up to date.
      on_change: called when a field below has changed.
      live: the newest text seen; older ones are of no interest, since texts only grow.
      rollout: the result.
      error: why there is none.
    """

    def __init__(self, request: Request, watched: bool, on_change: Callable[[], None]) -> None:
        """A request that has not been submitted."""
        self.request, self.watched, self.on_change = request, watched, on_change
        self.live: LiveText | None = None
        self.rollout: Rollout | None = None
        self.error: Exception | None = None

    @property
    def ended(self) -> bool:
        """Whether the engine is done with it."""
        return self.rollout is not None or self.error is not None


_Results = list[tuple[Job, LiveText | Rollout | Exception]]


def warm_up(
    engine: RolloutEngine, params: Params, prompt: Sequence[int], sampling: SamplingParams
) -> None:
    """Compiles all that a session runs, so that the first client does not wait for it.

    Raises:
      UserError: the engine cannot serve requests that leave sampling to the server.
    """
    request = Request(np.asarray(prompt, np.int32), seed=0, sampling=sampling)
    engine.check("the server's defaults", request)
    with engine.session(params) as session:
        ticket = session.submit(request)
        session.poll()
        session.live()
        session.cancel(ticket)
        while session.busy:
            session.poll()


class EngineThread:
    """See the top of the file."""

    def __init__(
        self,
        engine: RolloutEngine,
        params: Params,
        max_queue: int,
        on_failure: Callable[[], None],
        on_fatal: Callable[[], None],
    ) -> None:
        """Prepares the thread; `start` starts it.

        Args:
          engine: no other session may be open on it.
          params: the model's parameters.
          max_queue: requests beyond those that the engine runs at once.
          on_failure: called on the event loop when the engine has failed.
          on_fatal: called on the event loop when it has failed for good.
        """
        self._engine, self._params = engine, params
        self._on_failure, self._on_fatal = on_failure, on_fatal
        self._capacity = engine.config.requests + max_queue
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="rollout engine", daemon=True)
        # Shared between loop and thread, under the condition.
        self._wake = threading.Condition()
        self._inbox: collections.deque[tuple[Job, bool]] = collections.deque()
        self._closing = False
        # Set by the loop once it has taken the last texts; until then no new ones are read.
        self._texts_taken = threading.Event()
        self._texts_taken.set()
        # The thread's own. A failure at any place leaves every job in one of these.
        self._taken: collections.deque[tuple[Job, bool]] = collections.deque()
        self._tickets: dict[int, Job] = {}
        self._results: _Results = []
        self._failures = 0
        # The loop's own.
        self._jobs: set[Job] = set()
        self._down = False
        self.running = 0
        self.queued = 0

    # --- the event loop's side --------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread; results go to this loop."""
        self._loop = loop
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hands over requests, all or none.

        Raises:
          BusyError: there is no room for all of them.
          EngineDownError: the engine has failed for good.
        """
        if self._down:
            raise EngineDownError
        if len(self._jobs) + len(jobs) > self._capacity:
            raise BusyError
        self._jobs.update(jobs)
        self._send([(job, False) for job in jobs])

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Ends requests where they are; those that have ended already are left alone."""
        self._send([(job, True) for job in jobs if job in self._jobs])

    def cancel_all(self) -> None:
        """Ends every request where it is."""
        self.cancel(tuple(self._jobs))

    @property
    def outstanding(self) -> int:
        """Requests that have been submitted and not ended."""
        return len(self._jobs)

    @property
    def has_failed(self) -> bool:
        """Whether the engine has failed for good."""
        return self._down

    @property
    def is_up(self) -> bool:
        """Whether requests are served."""
        return not self._down and self._thread.is_alive()

    def close(self) -> None:
        """Stops the thread; requests that still run get no result."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _send(self, commands: list[tuple[Job, bool]]) -> None:
        if commands:
            with self._wake:
                self._inbox.extend(commands)
                self._wake.notify()

    def _deliver(self, results: _Results, running: int, queued: int) -> None:
        self._texts_taken.set()
        self.running, self.queued = running, queued
        for job, result in results:
            if isinstance(result, LiveText):
                job.live = result
            elif isinstance(result, Rollout):
                job.rollout = result
            else:
                job.error = result
            if job.ended:
                self._jobs.discard(job)
            job.on_change()

    def _failed(self, error: Exception, fatal: bool) -> None:
        self._on_failure()
        if fatal:
            self._down = True
            self._deliver([(job, error) for job in tuple(self._jobs)], 0, 0)
            self._on_fatal()

    # --- the thread's side ------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            try:
                with self._engine.session(self._params) as session:
                    self._serve(session)
            except Exception as error:
                logger.exception("the rollout engine failed; its requests are lost")
                self._failures += 1
                lost = [
                    *self._tickets.values(),
                    *(job for job, cancel in self._taken if not cancel),
                ]
                self._results += [(job, error) for job in lost]
                self._tickets.clear()
                self._taken.clear()
                fatal = self._failures >= MAX_FAILURES
                self._flush(running=0, queued=0)
                self._call(self._failed, error, fatal)
                if fatal:
                    return

    def _serve(self, session: Session) -> None:
        while True:
            self._take(wait=not session.busy)
            if self._closing:
                return
            while self._taken:
                self._obey(session, *self._taken[0])
                self._taken.popleft()
            for ticket, rollout in session.poll():
                self._results.append((self._tickets.pop(ticket), rollout))
                self._failures = 0
            watched = {ticket for ticket, job in self._tickets.items() if job.watched}
            if watched and self._texts_taken.is_set():
                self._texts_taken.clear()
                texts = session.live(watched).items()
                self._results += [(self._tickets[ticket], text) for ticket, text in texts]
            self._flush(session.running, session.queued)

    def _obey(self, session: Session, job: Job, is_cancel: bool) -> None:
        if is_cancel:
            for ticket in [t for t, other in self._tickets.items() if other is job]:
                session.cancel(ticket)
            return
        try:
            self._tickets[session.submit(job.request)] = job
        except UserError as error:
            self._results.append((job, error))

    def _take(self, wait: bool) -> None:
        with self._wake:
            if wait:
                self._wake.wait_for(lambda: self._inbox or self._closing)
            self._taken.extend(self._inbox)
            self._inbox.clear()

    def _flush(self, running: int, queued: int) -> None:
        results, self._results = self._results, []
        self._call(self._deliver, results, running, queued)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, *arguments)
