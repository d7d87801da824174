"""A plain host-driven controller of the APR schema: one unit at a time, no cache.

Every token comes from a full causal forward of its unit's own context, from position 0. Messages
and answers are read from text.
"""

import re

import numpy as np

from tests.rollout.dense_sampler import DenseSampler
from tests.rollout.host_oracle import OracleRollout, OracleUnit
from tests.rollout.sister_worlds import World
from tw_jax.rollout.request import Request
from tw_jax.trajectory.trajectory import OutlineSpan, ParallelBlock, ThreadSpan, Trajectory

MESSAGE = re.compile(r"<Message>(?:(?!</?Message>).)*</Message>", re.DOTALL)


class MessageOracle:
    """Runs one request after another."""

    def __init__(self, world: World, context_len: int) -> None:
        self.world = world
        self.sampler = DenseSampler(world.graphdef, world.params, context_len, len(world.pieces))

    def rollout(self, request: Request) -> tuple[OracleRollout, Trajectory]:
        """The rollout, and its text with the spans of blocks."""
        return _Run(self, request).run()


class _Run:
    def __init__(self, oracle: MessageOracle, request: Request) -> None:
        self.request, self.s = request, request.sampling
        self.world, self.sampler = oracle.world, oracle.sampler
        ids = self.world.ids
        self.fork, self.close, self.join = ids("\n"), ids("<Join></Join>"), ids("\n")
        self.header, self.prefix = ids("<Thread>\n"), ids("<bos>")
        (self.stop,), (self.eos,) = ids("</Join>"), ids("<eos>")
        # `text` holds every token once, `parent` is what the parent sees.
        self.text = [*map(int, request.prompt), *request.forced_prefix]
        self.parent = [*self.text]
        budget = len(request.prompt) + self.s.max_response_tokens
        self.limit = min(budget, self.sampler.context_len)
        self.limit_reason = "length" if budget <= self.sampler.context_len else "context"
        self.units: list[OracleUnit] = []
        self.blocks: list[ParallelBlock] = []
        self.block = self.saved = 0

    def run(self) -> tuple[OracleRollout, Trajectory]:
        prompt_len = len(self.request.prompt)
        text_start, reason = prompt_len, None
        forced = bool(self.request.forced_prefix)
        while reason is None:
            start = len(self.parent)
            reason, logprobs, messages = self._segment(text_start, forced)
            forced = False
            done = self.parent[start:]
            if reason == "spawn" or done:
                self._note("segment", 0, self.parent[:start], done, logprobs, reason)
            if reason == "spawn":
                reason = self._spawn(messages)
                self.block += 1
                text_start = len(self.parent)
        total = len(self.text) - prompt_len
        sampled_start = prompt_len + len(self.request.forced_prefix)
        tokens = np.array(self.text, np.int32)
        return (
            OracleRollout(self.text, self.units, reason, 0, total - self.saved),
            Trajectory(tokens, prompt_len, tuple(self.blocks), sampled_start),
        )

    def _note(self, kind, thread, context, completion, logprobs, reason) -> None:
        self.units.append(
            OracleUnit(kind, self.block, thread, [*context], [*completion], [*logprobs], reason)
        )

    def _sample(self, thread: int, context: list[int]) -> tuple[int, float]:
        return self.sampler.sample(self.request, self.block * 1024 + thread, context)

    def _segment(self, text_start: int, forced: bool):
        """Decodes the parent's text until it spawns or ends: (reason, logprobs, messages)."""
        logprobs: list[float] = []
        fresh = not forced  # a forced prefix may end with the trigger already
        while True:
            if fresh:
                token, logprob = self._sample(0, self.parent)
                self.parent.append(token)
                self.text.append(token)
                logprobs.append(logprob)
                if token == self.eos or len(self.parent) >= self.limit:
                    return "eos" if token == self.eos else self.limit_reason, logprobs, None
            fresh = True
            messages = self._messages(text_start)
            if messages and self.block < self.s.max_blocks:
                if len(self.parent) + len(self.fork) + len(self.close) > self.limit:
                    return self.limit_reason, logprobs, None
                return "spawn", logprobs, messages

    def _messages(self, text_start: int) -> list[tuple[int, list[int]]] | None:
        """Messages to send if the text ends with a usable trigger: (place in `text`, tokens)."""
        own = self.parent[text_start:]
        text = self.world.text_of(own)
        if self.request.mode == "sequential" or not text.endswith("</Spawn>"):
            return None
        opened = text.rfind("<Spawn>")
        inside = text[opened : -len("</Spawn>")]
        if opened < 0 or "</Spawn>" in inside:
            return None
        found = []
        for match in MESSAGE.finditer(inside):
            before = len(self.world.ids(text[: opened + match.start()]))
            place = len(self.text) - len(own) + before
            found.append((place, self.world.ids(match[0])))
        return found[: self.s.max_threads]

    def _spawn(self, messages: list[tuple[int, list[int]]]) -> str | None:
        """Runs the threads one after another and joins them; a reason if the rollout ends."""
        outlines_end = len(self.text)
        self.text += self.fork
        self.parent += self.fork
        spans: list[ThreadSpan] = []
        reason = None
        for ordinal, (_, message) in enumerate(messages, start=1):
            context = [*self.prefix, *message, *self.header]
            body, logprobs, ending = self._thread(ordinal, context)
            self._note("thread", ordinal, context, body, logprobs, ending)
            # The end of text was sampled, but is no part of the text.
            kept = body[:-1] if ending == "eos" else body
            closed = kept if ending == "thread_stop" else [*kept, *self.close]
            start = len(self.text)
            self.text += [*self.header, *closed]
            spans.append(
                ThreadSpan(
                    str(ordinal),
                    start,
                    start + len(self.header),
                    start + len(self.header) + len(kept),
                    len(self.text),
                    (self.eos,) if ending == "eos" else (),
                )
            )
            answer = self._answer(self.world.text_of(closed))
            if len(self.parent) + len(answer) > self.limit:
                reason = self.limit_reason
                break
            self.parent += answer
        inside = [span.end - span.start - 2 for span in spans]
        self.saved += sum(inside) - max(inside)
        if reason is None and len(self.parent) + len(self.join) + 1 > self.limit:
            reason = self.limit_reason
        if reason is None:
            self.text += self.join
            self.parent += self.join
        end = len(self.text)
        outlines = tuple(
            OutlineSpan(str(k), place, place + len(message))
            for k, (place, message) in enumerate(messages, start=1)
        )
        self.blocks.append(
            ParallelBlock(outlines[0].start, outlines_end, outlines, tuple(spans), end, end)
        )
        return reason

    def _answer(self, closed: str) -> list[int]:
        """What the parent gets of a thread's text, which ends with its closing tag."""
        _, opened, answer = closed.removesuffix("</Join>").rpartition("<Join>")
        return self.world.ids(f"<Join>{answer if opened else ''}</Join>")

    def _thread(self, ordinal: int, context: list[int]):
        """One thread, which sees nothing but its message and itself."""
        room = self.sampler.context_len - len(context) - len(self.close)
        body: list[int] = []
        logprobs: list[float] = []
        while True:
            token, logprob = self._sample(ordinal, [*context, *body])
            body.append(token)
            logprobs.append(logprob)
            if token == self.stop:
                return body, logprobs, "thread_stop"
            if token == self.eos:
                return body, logprobs, "eos"
            if len(body) == self.s.max_thread_tokens:
                return body, logprobs, "length"
            if len(body) == room:
                return body, logprobs, "context"
