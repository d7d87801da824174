"""A plain host-driven controller of the native schema: one unit at a time, no cache.

Every token comes from a forward of its unit's whole context, at positions and under a mask that
this file keeps track of token by token. Numbers are read from text.
"""

import re

import numpy as np

from tests.rollout.dense_sampler import DenseSampler
from tests.rollout.host_oracle import OracleRollout, OracleUnit
from tests.rollout.sister_worlds import World
from tw_jax.rollout.request import Request
from tw_jax.trajectory.trajectory import ParallelBlock, ThreadSpan, Trajectory

NUMBER = re.compile(r"<plan>\s*(\d+(?:\.\d+)*)\s*:")


class _Line:
    """Tokens with their positions and the (block, thread) that each belongs to, if any."""

    def __init__(self, tokens=(), positions=(), owners=()) -> None:
        self.tokens, self.positions, self.owners = [*tokens], [*positions], [*owners]

    def __len__(self) -> int:
        return len(self.tokens)

    def copy(self) -> "_Line":
        return _Line(self.tokens, self.positions, self.owners)

    def write(self, tokens, owner=None, at=None) -> None:
        """Appends tokens, the first at position `at` or behind the last token."""
        for token in tokens:
            following = self.positions[-1] + 1 if self.positions else 0
            self.positions.append(following if at is None else at)
            self.tokens.append(token)
            self.owners.append(owner)
            at = None

    def extend(self, other: "_Line", start: int) -> None:
        """Appends what another line holds from `start` on, as it is."""
        self.tokens += other.tokens[start:]
        self.positions += other.positions[start:]
        self.owners += other.owners[start:]

    def hidden(self) -> np.ndarray:
        """Pairs of tokens of one block's different threads."""
        block = np.array([-1 if o is None else o[0] for o in self.owners])
        thread = np.array([-1 if o is None else o[1] for o in self.owners])
        same = (block[:, None] == block[None, :]) & (block[:, None] >= 0)
        return same & (thread[:, None] != thread[None, :])


class GatherOracle:
    """Runs one request after another."""

    def __init__(self, world: World, context_len: int, max_digits: int) -> None:
        self.world, self.max_digits = world, max_digits
        self.sampler = DenseSampler(world.graphdef, world.params, context_len, len(world.pieces))

    def rollout(self, request: Request) -> tuple[OracleRollout, Trajectory]:
        """The rollout, and its text with the spans of blocks (plans left out)."""
        return _Run(self, request).run()


class _Run:
    def __init__(self, oracle: GatherOracle, request: Request) -> None:
        self.oracle, self.request, self.s = oracle, request, request.sampling
        self.world, self.sampler = oracle.world, oracle.sampler
        ids = self.world.ids
        self.fork, self.close, self.tail = ids("\n"), ids("\n</step>"), ids("\n")
        self.join, (self.stop,), (self.eos,) = ids("<takeaway>\n"), ids("</step>"), ids("<eos>")
        self.line = _Line()
        self.line.write([*map(int, request.prompt), *request.forced_prefix])
        budget = len(request.prompt) + self.s.max_response_tokens
        context_len = self.sampler.context_len
        self.limit = min(budget, context_len)
        self.limit_reason = "length" if budget <= context_len else "context"
        self.units: list[OracleUnit] = []
        self.blocks: list[ParallelBlock] = []
        self.duplicates = self.block = self.saved = 0

    def run(self) -> tuple[OracleRollout, Trajectory]:
        prompt_len = len(self.request.prompt)
        text_start, reason = prompt_len, None
        forced = bool(self.request.forced_prefix)
        while reason is None:
            start = len(self.line)
            reason, logprobs, numbers = self._segment(text_start, forced)
            forced = False
            done = self.line.tokens[start:]
            if reason == "spawn" or done:
                self._note("segment", 0, self.line.tokens[:start], done, logprobs, reason)
            if reason == "spawn":
                reason = self._spawn(numbers)
                self.block += 1
                text_start = len(self.line)
        total = len(self.line) - prompt_len
        tokens = self.line.tokens
        sampled_start = prompt_len + len(self.request.forced_prefix)
        return (
            OracleRollout(tokens, self.units, reason, self.duplicates, total - self.saved),
            Trajectory(np.array(tokens, np.int32), prompt_len, tuple(self.blocks), sampled_start),
        )

    def _note(self, kind, thread, context, completion, logprobs, reason) -> None:
        self.units.append(
            OracleUnit(kind, self.block, thread, [*context], [*completion], [*logprobs], reason)
        )

    def _sample(self, thread: int, line: _Line) -> tuple[int, float]:
        unit = self.block * 1024 + thread
        return self.sampler.sample(self.request, unit, line.tokens, line.positions, line.hidden())

    def _segment(self, text_start: int, forced: bool):
        """Decodes sequential text until it spawns or ends: (reason, logprobs, numbers)."""
        logprobs: list[float] = []
        fresh = not forced  # a forced prefix may end with the trigger already
        while True:
            if fresh:
                token, logprob = self._sample(0, self.line)
                self.line.write([token])
                logprobs.append(logprob)
                if token == self.eos or len(self.line) >= self.limit:
                    self._count_duplicates(text_start)
                    return "eos" if token == self.eos else self.limit_reason, logprobs, None
            fresh = True
            numbers = self._numbers(text_start)
            if numbers and self.block < self.s.max_blocks:
                self._count_duplicates(text_start)
                thread = [*self._header(numbers[0]), 0, *self.close, *self.tail]
                if len(self.line) + len(self.fork) + len(thread) > self.limit:
                    return self.limit_reason, logprobs, None
                return "spawn", logprobs, numbers

    def _list_numbers(self, text: str) -> list[str]:
        return [n for n in NUMBER.findall(text) if len(n) <= self.oracle.max_digits]

    def _numbers(self, text_start: int) -> list[str] | None:
        """Numbers to spawn if the text ends with a usable trigger."""
        text = self.world.text_of(self.line.tokens[text_start:])
        if self.request.mode == "sequential" or not text.endswith("</guideline>"):
            return None
        opened = text.rfind("<guideline>")
        inside = text[opened : -len("</guideline>")]
        if opened < 0 or "</guideline>" in inside:
            return None
        return list(dict.fromkeys(self._list_numbers(inside)))[: self.s.max_threads]

    def _count_duplicates(self, text_start: int) -> None:
        """Repeats in any list of the segment that just ended."""
        if self.request.mode == "sequential":
            return
        text = self.world.text_of(self.line.tokens[text_start:])
        for piece in text.split("<guideline>")[1:]:
            held: list[str] = []
            for number in self._list_numbers(piece.split("</guideline>")[0]):
                if number in held:
                    self.duplicates += 1
                elif len(held) < self.s.max_threads:
                    held.append(number)

    def _header(self, number: str) -> list[int]:
        return self.world.ids(f"<step>\n{number}:")

    def _spawn(self, numbers: list[str]) -> str | None:
        """Runs the threads one after another and joins them; a reason if the rollout ends."""
        outlines_end = len(self.line)
        first = self.line.positions[-1] + 1  # where every thread begins
        self.line.write(self.fork)
        shared = self.line.copy()
        spans: list[ThreadSpan] = []
        furthest, reason = 0, None
        for ordinal, number in enumerate(numbers, start=1):
            header = self._header(number)
            room = self.limit - len(self.line) - len(header) - len(self.close) - len(self.tail)
            if room < 1:
                reason = self.limit_reason
                break
            thread, owner = shared.copy(), (self.block, ordinal)
            thread.write(header, owner, at=first)
            context = [*thread.tokens]
            body, logprobs, ending = self._thread(ordinal, owner, thread, room)
            self._note("thread", ordinal, context, body, logprobs, ending)
            # The end of text was sampled, but is no part of the text.
            replaced = (self.eos,) if ending == "eos" else ()
            sampled_end = len(thread)
            if ending != "thread_stop":
                thread.write(self.close, owner)
            end = len(thread)
            furthest = max(furthest, thread.positions[-1])
            thread.write(self.tail, owner)
            shift = len(self.line) - len(shared)
            self.line.extend(thread, len(shared))
            spans.append(
                ThreadSpan(
                    number,
                    len(shared) + shift,
                    len(context) + shift,
                    sampled_end + shift,
                    end + shift,
                    replaced,
                )
            )
        inside = [span.end - span.start - 2 for span in spans]
        self.saved += sum(inside) - max(inside)
        if reason is None and len(self.line) + len(self.join) + 1 > self.limit:
            reason = self.limit_reason
        if reason is None:
            self.line.write(self.join, at=furthest + 1)
        end = len(self.line)
        self.blocks.append(ParallelBlock(outlines_end, outlines_end, (), tuple(spans), end, end))
        return reason

    def _thread(self, ordinal: int, owner, thread: _Line, room: int):
        """One thread in its own context, which it extends; `room` is what fits into the text."""
        body: list[int] = []
        logprobs: list[float] = []
        while True:
            token, logprob = self._sample(ordinal, thread)
            body.append(token)
            logprobs.append(logprob)
            if token == self.eos:
                return body, logprobs, "eos"
            thread.write([token], owner)
            if token == self.stop:
                return body, logprobs, "thread_stop"
            if len(body) == self.s.max_thread_tokens:
                return body, logprobs, "length"
            if len(body) == room:
                return body, logprobs, self.limit_reason
