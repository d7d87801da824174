"""One rollout on a completions server: segments one after another, threads at the same time.

The policy is the engine's (`tw_jax.rollout.spawn_join`): what a thread may write, when a block has
room, how a thread without its closing tag is closed and how the joined text is cut at its limit.

A server has no rows and steps. Here a unit's row is its lane in the rollout (segments and thread 1:
0, thread 2: 1, ...), and steps count tokens on the chain of dependent ones.
"""

import asyncio
import dataclasses
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import numpy as np

from tw_jax.rollout.assemble import FinishedText, assemble
from tw_jax.rollout.client_dialect import Completion
from tw_jax.rollout.outline_list import OutlineList
from tw_jax.rollout.request import Request, sampling_seed
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.sampling import unit_number
from tw_jax.rollout.state import (
    CONTEXT,
    DEADLINE,
    EOS,
    LENGTH,
    SPAWN,
    THREAD_FIELDS,
    THREAD_STOP,
)
from tw_jax.trajectory.schema import Schema

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Call:
    """What a rollout asks of the server.

    Attributes:
      context: token ids to continue.
      max_tokens: budget.
      stop_id: token that ends the unit, besides the end of text; None for none.
      seed: 31 bits that depend on the request's seed, the unit and the position alone.
    """

    context: list[int]
    max_tokens: int
    stop_id: int | None
    seed: int


Complete = Callable[[Request, Call], Awaitable[Completion]]


async def run_rollout(
    request: Request,
    schema: Schema,
    complete: Complete,
    *,
    context_len: int,
    max_number_digits: int,
    deadline_s: float,
) -> Rollout:
    """Samples one rollout.

    Args:
      request: what to sample; its `timeout_s` is part of `deadline_s` already.
      schema: a schema that joins by re-encoding.
      complete: asks the server.
      context_len: prompt and response together never get longer.
      max_number_digits: most tokens of an outline's number.
      deadline_s: when it ends where it is, on the monotonic clock.

    Returns:
      The rollout, units and all. At a deadline, what had not been answered is missing.
    """
    run = _Run(request, schema, complete, context_len, max_number_digits, deadline_s)
    reason = await run.run()
    return assemble(request, run.finished_text(reason), schema)


@dataclasses.dataclass(frozen=True)
class _Thread:
    """A thread that ended: its header, what it sampled, and why it ended."""

    header: tuple[int, ...]
    tokens: list[int]
    logprobs: list[float]
    reason: int


class _Run:
    def __init__(
        self,
        request: Request,
        schema: Schema,
        complete: Complete,
        context_len: int,
        max_digits: int,
        deadline_s: float,
    ) -> None:
        self.request, self.schema, self.sampling = request, schema, request.sampling
        self.forced, self.complete = schema.fork_join, complete
        self.max_digits, self.deadline_s = max_digits, deadline_s
        self.tokens = [*map(int, request.prompt), *map(int, request.forced_prefix)]
        self.logprobs = [0.0] * len(self.tokens)
        budget = len(request.prompt) + request.sampling.max_response_tokens
        self.limit = min(budget, context_len)
        self.limit_reason = LENGTH if budget <= context_len else CONTEXT
        self.duplicates = self.clock = 0
        self.segments: list[tuple[int, int, int]] = []
        self.blocks: list[tuple[int, int, int]] = []
        self.threads: list[list[list[int]]] = []

    async def run(self) -> int:
        """Runs to the end; returns why."""
        unread = self.tokens[len(self.request.prompt) :]
        while True:
            outlines = OutlineList(self.schema, self.sampling.max_threads, self.max_digits)
            reason = await self._segment(outlines, unread)
            self.duplicates += outlines.duplicates
            if reason != SPAWN:
                return reason
            reason = await self._block(outlines.numbers)
            if reason is not None:
                return reason
            unread = []

    def finished_text(self, reason: int) -> FinishedText:
        """The records from which units and spans are rebuilt."""
        widest = max(map(len, self.threads), default=0)
        threads = np.zeros((len(self.blocks), widest, THREAD_FIELDS), np.int32)
        for block, entries in enumerate(self.threads):
            threads[block, : len(entries)] = entries
        unbegun = [(0, self.clock, self.clock)]  # of the segment behind the last block
        return FinishedText(
            tokens=np.array(self.tokens, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            reason=reason,
            duplicates=self.duplicates,
            segments=np.array([*self.segments, *unbegun], np.int32),
            blocks=np.array(self.blocks, np.int32).reshape(-1, 3),
            threads=threads,
            first_step=0,
        )

    # --- sequential text --------------------------------------------------------------------------

    async def _segment(self, outlines: OutlineList, unread: list[int]) -> int:
        """Writes sequential text until it spawns (SPAWN) or ends; `unread` is forced text."""
        start, parallel = self.clock, self.request.mode == "parallel"
        asks = False
        for token in unread if parallel else []:
            asks = outlines.read(token)
        reason = self._spawn_or_end(asks, outlines)
        while reason is None:
            reason = await self._extend(outlines, parallel)
        self.segments.append((0, start, max(start, self.clock - 1)))
        return reason

    async def _extend(self, outlines: OutlineList, parallel: bool) -> int | None:
        """One call of a segment; a reason if it ends there."""
        may_spawn = parallel and len(self.blocks) < self.sampling.max_blocks
        stop_id = self.forced.spawn_trigger if may_spawn else None
        room = self.limit - len(self.tokens)
        try:
            answer = await self._ask(self.tokens, room, stop_id, ordinal=0)
        except TimeoutError:
            return DEADLINE
        tokens, logprobs = answer.tokens, answer.logprobs
        if answer.ending == "unknown":
            # Inside a list of outlines the end of the list is likelier than the end of the text.
            trigger = self._would_trigger(outlines, tokens)
            tokens = [*tokens, self.forced.spawn_trigger if trigger else self.schema.eos_id]
            logprobs = [*logprobs, math.nan]
        for token, logprob in zip(tokens, logprobs, strict=True):
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.clock += 1
            asks = parallel and outlines.read(token)
            if token == self.schema.eos_id:
                return EOS
            if len(self.tokens) >= self.limit:
                return self.limit_reason
            # What a server wrote behind a trigger that it did not stop at is dropped.
            if (reason := self._spawn_or_end(asks, outlines)) is not None:
                return reason
        # A trigger without numbers is plain text: write on. A server that gave less than its budget
        # has a shorter context than we were told.
        return CONTEXT if answer.ending == "length" and len(tokens) < room else None

    def _would_trigger(self, outlines: OutlineList, tokens: list[int]) -> bool:
        """Whether a list of outlines is open behind the given tokens."""
        is_open = outlines.open
        for token in tokens:
            is_open = is_open or token == self.forced.plans_open
            is_open = is_open and token != self.forced.spawn_trigger
        return is_open

    def _spawn_or_end(self, asks: bool, outlines: OutlineList) -> int | None:
        """What a spawn trigger leads to: a block, the end for want of room, or nothing."""
        if not asks or len(self.blocks) >= self.sampling.max_blocks:
            return None
        header = len(self.forced.fork) + len(self._header(outlines.numbers[0]))
        least = len(self.tokens) + header + 1 + len(self.forced.thread_close)
        return SPAWN if least <= self.limit else self.limit_reason

    # --- threads ----------------------------------------------------------------------------------

    def _header(self, number: tuple[int, ...]) -> tuple[int, ...]:
        return (*self.forced.header_prefix, *number, *self.forced.header_suffix)

    async def _block(self, numbers: list[tuple[int, ...]]) -> int | None:
        """Runs the threads of a block and joins them; a reason if the rollout ends there."""
        outlines_end, fork = len(self.tokens), self.forced.fork
        running = []
        for ordinal, number in enumerate(numbers, start=1):
            header = self._header(number)
            room = self.limit - len(self.forced.thread_close)
            room -= outlines_end + len(fork) + len(header)
            if room < 1:  # nor will there be room in the joined text: the join ends the rollout
                break
            running.append(asyncio.ensure_future(self._thread(ordinal, header, room)))
        try:
            await asyncio.gather(*running)
        except TimeoutError:
            pass
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        done: list[_Thread] = []  # those before the first that is missing can join
        for task in running:
            if task.cancelled() or task.exception() is not None:
                break
            done.append(task.result())
        if not done:
            return DEADLINE
        self._append(fork)
        reason = self._join(done, numbers, outlines_end)
        if reason is None and len(done) < len(running):
            return DEADLINE
        return reason

    async def _thread(self, ordinal: int, header: tuple[int, ...], room: int) -> _Thread:
        """Runs one thread in its own context; `room` is what fits there."""
        context = [*self.tokens, *self.forced.fork, *header]
        budget = min(self.sampling.max_thread_tokens, room)
        stop_id, eos_id = self.forced.thread_stop, self.schema.eos_id
        answer = await self._ask(context, budget, stop_id, ordinal)
        tokens, logprobs = answer.tokens, answer.logprobs
        if answer.ending == "unknown":
            tokens, logprobs = [*tokens, stop_id], [*logprobs, math.nan]
        if stop_id in tokens:  # what a server wrote behind it is dropped
            end = tokens.index(stop_id) + 1
            return _Thread(header, tokens[:end], logprobs[:end], THREAD_STOP)
        if tokens[-1] == eos_id:
            return _Thread(header, tokens, logprobs, EOS)
        if len(tokens) < budget:
            return _Thread(header, tokens, logprobs, CONTEXT)
        spent = len(tokens) == self.sampling.max_thread_tokens
        return _Thread(header, tokens, logprobs, LENGTH if spent else self.limit_reason)

    def _join(
        self, done: list[_Thread], numbers: list[tuple[int, ...]], outlines_end: int
    ) -> int | None:
        """Appends threads to the joined text; a reason if its limit ends the rollout."""
        close, start_step = self.forced.thread_close, self.clock
        entries: list[list[int]] = []
        self.blocks.append((outlines_end, len(self.tokens), 0))
        self.threads.append(entries)
        for lane, thread in enumerate(done):
            room = self.limit - len(self.tokens) - len(thread.header) - len(close)
            if room < 1:
                return self.limit_reason
            start = len(self.tokens)
            self._append(thread.header)
            body, count = len(self.tokens), min(len(thread.tokens), room)
            reason = thread.reason if count == len(thread.tokens) else self.limit_reason
            self.tokens += thread.tokens[:count]
            self.logprobs += thread.logprobs[:count]
            sampled_end = len(self.tokens)
            if reason == EOS:  # replaced; its log-probability stays, under the closer
                sampled_end -= 1
                self.tokens.pop()
            if reason != THREAD_STOP:
                self.tokens += close
                self.logprobs += [0.0] * (len(self.tokens) - len(self.logprobs))
            end_step = start_step + count - 1
            self.clock = max(self.clock, end_step + 1)
            end = len(self.tokens)
            steps, places = (start_step, end_step), (start, body, sampled_end, end)
            entries.append([count, reason, lane, *steps, *places, end])
            self.blocks[-1] = (outlines_end, end, len(entries))
        if len(done) < len(numbers):
            # Of a thread that did not run: it has no room, or the time was up.
            return None if self._fits(self._header(numbers[len(done)])) else self.limit_reason
        if len(self.tokens) + len(self.forced.join) + 1 > self.limit:
            return self.limit_reason
        self._append(self.forced.join)
        self.blocks[-1] = (outlines_end, len(self.tokens), len(entries))
        return None

    def _fits(self, header: tuple[int, ...]) -> bool:
        """Whether a thread with one token fits behind the joined text."""
        least = len(self.tokens) + len(header) + 1 + len(self.forced.thread_close)
        return least <= self.limit

    def _append(self, forced: tuple[int, ...]) -> None:
        self.tokens += forced
        self.logprobs += [0.0] * len(forced)

    # --- calls ------------------------------------------------------------------------------------

    async def _ask(
        self, context: list[int], max_tokens: int, stop_id: int | None, ordinal: int
    ) -> Completion:
        """Asks the server, until the deadline.

        Raises:
          TimeoutError: the time is up.
        """
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        unit = unit_number(len(self.blocks), ordinal)
        seed = sampling_seed(self.request.seed, unit, len(context)) >> 1
        call = Call(list(context), max_tokens, stop_id, seed)
        async with asyncio.timeout(None if math.isinf(left_s) else left_s):
            return await self.complete(self.request, call)
