"""A running rollout as people look at it: text, blocks that have closed, and threads that grow."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int32

from tw_jax.evals.sample import TextDecoder, decode_text
from tw_jax.rollout.live_text import LiveText, LiveThread
from tw_jax.trajectory.schema import Schema

ThreadState = Literal["running", "waiting to join", "joined"]
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # a character whose last bytes are still to come


@dataclasses.dataclass(frozen=True)
class ClosedBlock:
    """A parallel block whose threads have all joined.

    Attributes:
      thread_tokens: tokens strictly between each thread's tags.
    """

    thread_tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class GrowingThread:
    """A thread of the open block.

    Attributes:
      number: its number among the outlines.
      outline: its plan.
      text: what it has written.
      tokens: how many tokens it has sampled.
      state: joined threads are part of the joined text.
    """

    number: str
    outline: str
    text: str
    tokens: int
    state: ThreadState


@dataclasses.dataclass(frozen=True)
class LiveParts:
    """One running rollout.

    Attributes:
      sequential: text and closed blocks, in text order; the outlines of an open block are in its
        threads instead.
      threads: of the open block; empty between blocks.
      total_tokens: tokens after the prompt so far, each once.
      critical_path: those of them on the longest chain of dependent tokens.
    """

    sequential: tuple[str | ClosedBlock, ...]
    threads: tuple[GrowingThread, ...]
    total_tokens: int
    critical_path: int


def live_parts(live: LiveText, schema: Schema, tokenizer: TextDecoder) -> LiveParts:
    """Takes a running rollout apart."""
    reader = _Reader(live, schema, tokenizer)
    parts: list[str | ClosedBlock] = []
    position, saved = live.prompt_len, 0
    for threads in live.closed:
        fork = reader.fork_after(position, threads)
        spans = reader.joined_spans(fork)[: len(threads)]
        inside = tuple(max(0, end - start - 2) for start, end in spans)
        parts += reader.texts(position, reader.block_start(position, fork))
        parts.append(ClosedBlock(inside))
        saved += sum(inside) - max(inside, default=0)
        position = reader.block_end(spans[-1][1] if spans else fork)
    if live.block < 0:
        parts += reader.texts(position, len(live.tokens))
        total = len(live.tokens) - live.prompt_len
        return LiveParts(tuple(parts), (), total, total - saved)
    fork = reader.fork_after(position, live.threads)
    start = reader.block_start(position, fork)
    parts += reader.texts(position, start)
    joined = len(reader.joined_spans(fork))
    growing = reader.threads(live.threads, joined, start, fork)
    # Without the opening tag, and the closing one of those that have it.
    inside = [max(0, len(thread.tokens) - 1 - thread.ended) for thread in live.threads]
    total = fork - live.prompt_len + len(schema.fork_join.fork)
    total += sum(len(thread.tokens) for thread in live.threads)
    saved += sum(inside) - max(inside, default=0)
    return LiveParts(tuple(parts), growing, total, total - saved)


class _Reader:
    """Finds blocks in the joined text by what the engine forces."""

    def __init__(self, live: LiveText, schema: Schema, tokenizer: TextDecoder) -> None:
        self.tokens, self.schema, self.tokenizer = live.tokens, schema, tokenizer
        self.forced, self.tags = schema.fork_join, schema.classes.tag

    def text(self, tokens: Int32[np.ndarray, "n"]) -> str:
        """Text of tokens, without the half of a character at its end."""
        return decode_text(self.tokenizer, tokens).rstrip(_BROKEN)

    def texts(self, start: int, end: int) -> list[str]:
        """The text of a span, unless it is empty."""
        text = self.text(self.tokens[start:end])
        return [text] if text.strip() else []

    def fork_after(self, position: int, threads: tuple[LiveThread, ...]) -> int:
        """One past the spawn trigger of the block with these threads."""
        tokens = self.tokens
        triggers = np.flatnonzero(tokens[position:] == self.forced.spawn_trigger) + position + 1
        if threads:
            header = threads[0].tokens[: threads[0].header_len].tolist()
            forced = [*self.forced.fork, *header]
            for end in triggers.tolist():
                if tokens[end : end + len(forced)].tolist() == forced:
                    return end
        return len(tokens)

    def joined_spans(self, fork: int) -> list[tuple[int, int]]:
        """Start and end of the threads that stand one behind the other in the joined text."""
        start, opener = fork + len(self.forced.fork), list(self.forced.header_prefix)
        spans = []
        while self.tokens[start : start + len(opener)].tolist() == opener:
            stops = np.flatnonzero(self.tokens[start:] == self.forced.thread_stop)
            if not len(stops):
                break
            spans.append((start, start + int(stops[0]) + 1))
            start = spans[-1][1]
        return spans

    def block_start(self, earliest: int, fork: int) -> int:
        """Where the block's opening tag stands, or that of its list of outlines."""
        opened = np.flatnonzero(self.tokens[earliest:fork] == self.forced.plans_open)
        if not len(opened):
            return fork
        start = earliest + int(opened[-1])
        before = start - 1
        while before >= earliest and self._is_space(before):
            before -= 1
        is_opener = before >= earliest and not self._tag(before).startswith(("</", "no tag"))
        return before if is_opener else start

    def block_end(self, joined: int) -> int:
        """One past the block's closing tag where there is one."""
        end = joined
        while end < len(self.tokens) and self._is_space(end):
            end += 1
        closed = end < len(self.tokens) and self._tag(end).startswith("</")
        return end + 1 if closed else min(joined + len(self.forced.join), len(self.tokens))

    def threads(
        self, threads: tuple[LiveThread, ...], joined: int, start: int, fork: int
    ) -> tuple[GrowingThread, ...]:
        """The open block's threads, with their plans."""
        plans = self._plans(start, fork)
        found = []
        for thread in threads:
            number_end = thread.header_len - len(self.forced.header_suffix)
            number = self.text(thread.tokens[len(self.forced.header_prefix) : number_end]).strip()
            body = thread.tokens[thread.header_len :]
            shown = body[body != self.forced.thread_stop]
            state: ThreadState = "waiting to join" if thread.ended else "running"
            if thread.ordinal <= joined:
                state = "joined"
            found.append(
                GrowingThread(
                    number, plans.get(number, ""), self.text(shown).strip(), len(body), state
                )
            )
        return tuple(found)

    def _plans(self, start: int, fork: int) -> dict[str, str]:
        """The outlines' texts by their numbers."""
        openers = start + np.flatnonzero(self.tokens[start:fork] == self.forced.plan_open)
        plans: dict[str, str] = {}
        for opener in openers.tolist():
            end = opener + 1
            while end < fork and self._tag(end) == "no tag":
                end += 1
            number, _, plan = self.text(self.tokens[opener + 1 : end]).partition(":")
            plans.setdefault(number.strip(), plan.strip())
        return plans

    def _tag(self, index: int) -> str:
        token = int(self.tokens[index])
        tag = int(self.tags[token]) if token < len(self.tags) else -1
        return self.schema.tags[tag] if tag >= 0 else "no tag"

    def _is_space(self, index: int) -> bool:
        token, space = int(self.tokens[index]), self.schema.classes.space
        return token < len(space) and bool(space[token])
