"""An open engine: requests are submitted, cancelled and finished while it runs.

    with engine.session(params) as session:
        ticket = session.submit(request)
        while session.busy:
            for ticket, rollout in session.poll():
                ...

One `poll` is one dispatch: it admits what there is room for, lets the device run, and collects.
A session belongs to one thread, and an engine has one session at a time.
"""

import collections
import dataclasses
import time
from collections.abc import Container
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tw_jax.errors import UserError
from tw_jax.rollout.admit import Arrival, Harvest, admission
from tw_jax.rollout.advance import MAX_IDLE_STEPS
from tw_jax.rollout.assemble import FinishedText, assemble
from tw_jax.rollout.live_text import LiveText, live_texts
from tw_jax.rollout.message_text import LoggedText, inline_threads
from tw_jax.rollout.pages import pages_in_use
from tw_jax.rollout.placement import Agreement
from tw_jax.rollout.prefix_book import PrefixBook
from tw_jax.rollout.request import Request
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.script import script_areas
from tw_jax.rollout.state import CANCELLED, DEADLINE, FINISHED, EngineState
from tw_jax.rollout.weights import Weights

if TYPE_CHECKING:
    from tw_jax.rollout.engine import RolloutEngine


class QueueFullError(UserError):
    """As many requests wait as the session takes."""


class RolloutsStopped(Exception):
    """The caller asked for rollouts to stop; those that still ran are dropped."""


@dataclasses.dataclass(frozen=True)
class _Waiting:
    ticket: int
    request: Request
    deadline_s: float  # on the monotonic clock; infinite without a limit


def _content(request: Request) -> tuple[Any, ...]:
    """What a request asks for, as plain values."""
    script = None if request.script is None else request.script.tokens.tobytes()
    known = (request.prompt.tobytes(), request.forced_prefix, script)
    return (*known, request.seed, request.sampling, request.mode)


class Session:
    """See the module docstring; made by `RolloutEngine.session`."""

    def __init__(
        self, engine: "RolloutEngine", weights: Weights, state: EngineState, max_queue: int | None
    ) -> None:
        """Opens a session on an engine's state."""
        self.weights, self.state = weights, state
        self._engine = engine
        self._config, self._program = engine.config, engine.program
        self._max_queue = max_queue
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._running: dict[int, _Waiting] = {}  # by request slot
        self._ended: list[tuple[int, Rollout]] = []  # cancelled before they ran
        self._next_ticket = 0
        self._free_rows = engine.config.rows
        self._first_step = int(state.step)
        self._spawning = False
        self._book = PrefixBook(engine.program)
        # The two that do nothing are compiled now, not in a busy hour.
        nothing = np.zeros(engine.config.requests, np.bool_)
        self.state = engine.interrupt(self.state, nothing, np.int32(CANCELLED))
        if engine.config.kept_prefixes:
            # The book knows nothing of what the last session kept, perhaps for other parameters.
            self.state = engine.forget_prefixes(self.state)
            self.state, _ = engine.keep_prefix(self.state, 0, 0, 0)
        self._agreement = None
        if engine.placement is not None and engine.placement.spans_processes:
            self._agreement = Agreement(engine.placement)

    # --- what a caller does -----------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Queues a request.

        Returns:
          Its ticket: 0, 1, 2, ... in order of submission. Older ones are served first.

        Raises:
          UserError: the request does not fit the engine.
          QueueFullError: the queue is full.
        """
        if self._max_queue is not None and len(self._queue) >= self._max_queue:
            raise QueueFullError(f"{self._max_queue} requests wait already; try again later")
        self._engine.check(f"request {self._next_ticket}", request)
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        timeout_s = request.timeout_s
        deadline_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        self._queue.append(_Waiting(ticket, request, deadline_s))
        if self._agreement is not None:
            self._agreement.tell("submit", ticket, *_content(request))
        # Thread 1 runs in the parent's row, unless it hears a message only.
        needs_rows = request.sampling.max_threads > 1 or self._program.messages
        self._spawning |= request.mode == "parallel" and needs_rows
        return ticket

    def cancel(self, ticket: int) -> None:
        """Ends a request; the next `poll` returns what it had written. Unknown tickets: nothing."""
        if self._agreement is not None:
            self._agreement.tell("cancel", ticket)
        self._end({ticket}, CANCELLED)

    def poll(self) -> list[tuple[int, Rollout]]:
        """Admits, runs the device for at most `steps_per_dispatch` steps, and collects.

        Returns:
          Tickets and rollouts that ended, oldest first.

        Raises:
          RuntimeError: the engine made no progress, which is a bug of ours.
          UserError: processes that share the engine were given different requests or cancellations.
        """
        if self._agreement is not None:
            self._agreement.check()
        now = time.monotonic()
        late = [w for w in (*self._queue, *self._running.values()) if w.deadline_s <= now]
        self._end({waiting.ticket for waiting in late}, DEADLINE)
        self._admit()
        ended, self._ended = self._ended, []
        if self._running:
            # With requests in the queue a finished rollout should make room soon; at the end only
            # the caller waits for it.
            most = max(1, len(self._running) // 8) if self._queue else len(self._running)
            self.state, status = self._engine.advance(
                self.weights, self.state, self._config.steps_per_dispatch, most
            )
            ended += self._collect(np.asarray(status))
        return sorted(ended, key=lambda pair: pair[0])

    def live(self, tickets: Container[int] | None = None) -> dict[int, LiveText]:
        """What running requests have written so far, by ticket; reads the device.

        Args:
          tickets: requests to look at; None for all that run.
        """
        slots = [s for s, w in self._running.items() if tickets is None or w.ticket in tickets]
        texts = live_texts(self._program, self.state, slots)
        return {self._running[slot].ticket: text for slot, text in texts.items()}

    @property
    def steps(self) -> int:
        """Steps of the engine since the session began; reads the device."""
        return int(self.state.step) - self._first_step

    @property
    def busy(self) -> bool:
        """Whether a request waits, runs, or has ended without having been returned by `poll`."""
        return bool(self._queue or self._running or self._ended)

    @property
    def pages_in_use(self) -> int:
        """Pages of the cache that hold something; shared ones count once. Reads the device."""
        return int(pages_in_use(jax.device_get(self.state.pages)))

    @property
    def queued(self) -> int:
        """Requests that wait for a place."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests in the engine."""
        return len(self._running)

    # --- how --------------------------------------------------------------------------------------

    def _script(self, request: Request) -> np.ndarray | None:
        program = self._program
        if not program.scripts:
            return None
        schema = self._engine.schema
        return script_areas(request, schema, program.areas, program.store_len)

    def _keep_prefixes(self, cached: np.ndarray) -> None:
        """Keeps the beginnings of prompts that come again and again."""
        for kept, slot, pages in self._book.to_keep(cached):
            self.state, done = self._engine.keep_prefix(self.state, kept, slot, pages)
            if not done:
                self._book.give_up(kept)

    def _end(self, tickets: set[int], reason: int) -> None:
        """Ends requests where they are: in the queue or in the engine."""
        if not tickets:
            return
        for waiting in [w for w in self._queue if w.ticket in tickets]:
            self._queue.remove(waiting)
            self._ended.append((waiting.ticket, self._unstarted(waiting.request, reason)))
        ending = np.zeros(self._config.requests, np.bool_)
        for slot, waiting in self._running.items():
            if waiting.ticket in tickets:
                ending[slot] = True
                self._book.leave(slot)  # its row is free at once: nobody may share it any more
        if ending.any():
            self.state = self._engine.interrupt(self.state, ending, np.int32(reason))

    def _unstarted(self, request: Request, reason: int) -> Rollout:
        """The rollout of a request that never ran."""
        known = np.array([*request.prompt, *request.forced_prefix], np.int32)
        text = FinishedText(
            tokens=known,
            logprobs=np.zeros(len(known), np.float32),
            reason=reason,
            duplicates=0,
            segments=np.zeros((1, 3), np.int32),
            blocks=np.zeros((0, 3), np.int32),
            threads=np.zeros((0, 0, 0), np.int32),
            first_step=0,
        )
        return assemble(request, text, self._engine.schema)

    def _admit(self) -> None:
        # A parent that waits for its threads holds a row: one row must be left for threads to run.
        capacity = min(self._config.requests, self._config.rows - self._spawning)
        slots = [slot for slot in range(self._config.requests) if slot not in self._running]
        room = min(capacity - len(self._running), self._free_rows, len(self._queue))
        arrivals = []
        for slot in slots[: max(room, 0)]:
            waiting = self._queue.popleft()
            self._running[slot] = waiting
            source, source_len = self._book.admit(slot, waiting.request.prompt)
            arrivals.append(
                Arrival(
                    slot,
                    waiting.ticket,
                    waiting.request,
                    source,
                    source_len,
                    self._script(waiting.request),
                )
            )
        if arrivals:
            self.state = self._engine.admit(self.state, admission(self._program, arrivals))
            self._free_rows -= len(arrivals)

    def _collect(self, status: np.ndarray) -> list[tuple[int, Rollout]]:
        slots = self._config.requests
        phase, cached = status[:slots], status[slots : 2 * slots]
        self._free_rows, step, idle_steps = (int(n) for n in status[2 * slots :])
        if idle_steps >= MAX_IDLE_STEPS:
            raise RuntimeError(
                f"the rollout engine made no progress at step {step}: {len(self._running)} active "
                f"requests, {self._free_rows} of {self._config.rows} rows free. Please report this "
                "with the engine's configuration; more rows may avoid it."
            )
        finished = np.flatnonzero(phase == FINISHED).tolist()
        self._keep_prefixes(np.where(phase == FINISHED, 0, cached))
        if not finished:
            return []
        self.state, device_harvest = self._engine.harvest(self.state)
        crop: Harvest = jax.device_get(device_harvest)
        ended = []
        for slot in finished:
            waiting = self._running.pop(slot)
            self._book.leave(slot)
            text = self._text(crop, slot)
            ended.append((waiting.ticket, assemble(waiting.request, text, self._engine.schema)))
        return ended

    def _text(self, crop: Harvest, slot: int) -> FinishedText:
        length, blocks = int(crop.length[slot]), int(crop.blocks[slot])
        text = LoggedText(
            np.array(crop.tokens[slot, :length]), np.array(crop.logprobs[slot, :length])
        )
        spans = np.asarray(crop.records.blocks[slot, :blocks])
        threads = np.asarray(crop.records.threads[slot, :blocks])
        if self._program.messages:
            archive = LoggedText(
                np.asarray(crop.archive[slot]), np.asarray(crop.archive_logprobs[slot])
            )
            fork_len = len(self._program.tokens.fork)
            text, spans, threads = inline_threads(text, archive, spans, threads, fork_len)
        return FinishedText(
            tokens=text.tokens,
            logprobs=text.logprobs,
            reason=int(crop.reason[slot]),
            duplicates=int(crop.duplicates[slot]),
            segments=np.asarray(crop.records.segments[slot]),
            blocks=spans,
            threads=threads,
            first_step=self._first_step,
        )
