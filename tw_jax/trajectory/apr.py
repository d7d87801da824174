r"""The APR schema (Adaptive Parallel Reasoning, arXiv 2504.15466): threads exchange messages.

APR's published traces are plain text around one task's solver. Here the same calls, `spawn(msgs)`
and `join(msg)`, are control tags, so that they can be read token by token:

    <Spawn>\n<Message>task 1</Message>\n<Message>task 2</Message>\n</Spawn>\n
    <Thread>\nprivate text<Join>answer 1</Join><Thread>\nprivate text<Join>answer 2</Join>\n

(no line break where this page wraps). This is the text of a trajectory, which holds every token
once. No unit sees it as a whole: a thread sees its message and itself; the parent sees its own text
and, in place of each thread, `<Join>answer</Join>`. Messages carry no numbers: thread k answers
message k. One thing differs from the paper: its parent forgets the spawn call when the answers
arrive, here the call stays in its context.

Training lays out separate trees: the parent's context is the first, with copies of the answers
(`TokenKind.JOINED`); every thread is one of its own. Attention is plain causal everywhere.

What the engine does (join rule `message`, DESIGN section 6):

1. The parent samples `</Spawn>`. It ends the segment's unit, and spawns one thread per message: per
   `<Message>` (`plan_open`) that was closed by `</Message>` (`plan_close`) since the last `<Spawn>`
   (`plans_open`), empty and repeated ones included. An opening tag before the closing one starts
   the message anew; a message still open at the trigger does not count.
2. Thread k starts with an empty cache. Its context is `context_prefix` (the begin-of-text token,
   if there is one), the message with both tags as the parent wrote it, and `header_prefix`
   ("<Thread>\n"), at positions 0, 1, 2, ...; sampling begins behind that.
3. It ends by sampling `</Join>` (`thread_stop`). If its budget ends, or it samples the end of text
   (`ThreadSpan.replaced`), `thread_close` ("<Join></Join>") takes the place of the stop in the
   text; nothing is fed any more, since nobody reads the thread's cache again.
4. Its answer is what lies between the last `<Join>` (`return_open`) and that closing tag; nothing
   if there is no `<Join>`.
5. The parent's cache stays as it was. Fed behind `</Spawn>`, at the next positions: `fork` ("\n"),
   then per thread in order `<Join>`, the answer's tokens, `</Join>`, then `join` ("\n"). The
   parent samples on behind that; its unit's context is its own tokens and these.

A thread's budget is `max_thread_tokens` and the room in its own context; `max_response_tokens`
bounds the parent's context behind the prompt, not the text. Of one rollout's joined threads the
engine keeps as many tokens as `max_threads` contexts hold: when the next one finds no room there,
the rollout ends in its place, with the reason of its limit.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from tw_jax.trajectory import apr_parser, metrics
from tw_jax.trajectory.chains import ForestBuilder, Node
from tw_jax.trajectory.schema import (
    ForkJoinTokens,
    JoinRule,
    ParseError,
    PositionRule,
    TokenClasses,
)
from tw_jax.trajectory.thread_text import (
    Written,
    isolated_thread,
    join_written,
    replaced_tokens,
    text_kinds,
)
from tw_jax.trajectory.trajectory import (
    OutlineSpan,
    ParallelBlock,
    ThreadSpan,
    Trajectory,
    shared_prompt,
)
from tw_jax.trajectory.trie import TokenKind, Trie
from tw_jax.trajectory.units import Unit
from tw_jax.trajectory.vocabulary import bind_tags, forced_ids

APR_TAGS = ("<Spawn>", "</Spawn>", "<Message>", "</Message>", "<Thread>", "<Join>", "</Join>")


@dataclasses.dataclass(frozen=True, eq=False)
class AprSchema:
    """`Schema` for APR, bound to one tokenizer; make it with `from_tokenizer`."""

    tag_ids: Int32[np.ndarray, "tags"]
    eos_id: int
    classes: TokenClasses
    fork_join: ForkJoinTokens

    name: str = "apr"
    tags: tuple[str, ...] = APR_TAGS
    join_rule: JoinRule = "message"
    position_rule: PositionRule = "fresh"

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "AprSchema":
        """Looks up the tags and the pieces of the forced text.

        Raises:
          UserError: the tokenizer lacks a control tag or an end-of-text token.
        """
        bound = bind_tags(tokenizer, APR_TAGS)
        tags, line_break = bound.by_name, forced_ids(tokenizer, "\n")
        bos = tokenizer.bos_token_id
        return cls(
            tag_ids=bound.ids,
            eos_id=bound.eos_id,
            classes=bound.classes,
            fork_join=ForkJoinTokens(
                spawn_trigger=tags["</Spawn>"],
                plans_open=tags["<Spawn>"],
                plan_open=tags["<Message>"],
                plan_close=tags["</Message>"],
                thread_stop=tags["</Join>"],
                fork=line_break,
                header_prefix=(tags["<Thread>"], *line_break),
                header_suffix=(),
                thread_close=(tags["<Join>"], tags["</Join>"]),
                join=line_break,
                numbered=False,
                context_prefix=() if bos is None else (int(bos),),
                return_open=tags["<Join>"],
            ),
        )

    def parse(self, tokens: Any, prompt_len: int = 0) -> Trajectory | tuple[ParseError, ...]:
        """See `Schema.parse`; error kinds in `tw_jax.trajectory.apr_parser`."""
        parsed = apr_parser.parse(tokens, self.classes, self.tags, prompt_len)
        if isinstance(parsed, tuple):
            return parsed
        return dataclasses.replace(
            parsed, blocks=tuple(self._with_join(parsed, block) for block in parsed.blocks)
        )

    def _with_join(self, parsed: Trajectory, block: ParallelBlock) -> ParallelBlock:
        """The block, ending behind what the engine forces at the join if the text has it."""
        join, start = self.fork_join.join, block.end
        found = tuple(parsed.tokens[start : start + len(join)].tolist())
        end = start + (len(join) if found == join else 0)
        return dataclasses.replace(block, join_end=end, end=end)

    def validate(self, trajectory: Trajectory) -> tuple[ParseError, ...]:
        """See `Schema.validate`."""
        return apr_parser.validate(trajectory, self.classes)

    def critical_path(self, trajectory: Trajectory) -> int:
        """See `Schema.critical_path`: the parent's own tokens and each block's longest thread."""
        return metrics.critical_path(trajectory)

    def units(self, trajectory: Trajectory) -> tuple[Unit, ...]:
        """See `Schema.units`."""
        tokens, units = trajectory.tokens, []
        parent, joins = self._parent_context(trajectory)
        start = context_len = trajectory.response_start
        for index, block in enumerate(trajectory.blocks):
            units.append(
                Unit(
                    "segment",
                    index,
                    0,
                    parent.tokens[:context_len],
                    tokens[start : block.outlines_end],
                )
            )
            for ordinal, (thread, message) in enumerate(_threads(block), start=1):
                context = [
                    self._thread_prompt(tokens, message).tokens,
                    tokens[thread.start : thread.body],
                ]
                completion = [
                    tokens[thread.body : thread.sampled_end],
                    np.array(thread.replaced, np.int32),
                ]
                units.append(
                    Unit(
                        "thread",
                        index,
                        ordinal,
                        np.concatenate(context),
                        np.concatenate(completion),
                    )
                )
            start, context_len = block.join_end, joins[index]
        if start < len(tokens):
            context = parent.tokens[:context_len]
            units.append(Unit("segment", len(trajectory.blocks), 0, context, tokens[start:]))
        return tuple(units)

    def forest(self, trajectories: Sequence[Trajectory]) -> Trie:
        """See `Schema.forest`: the parents' tree, then one tree per thread.

        Raises:
          ValueError: the trajectories do not share one non-empty prompt.
        """
        builder = ForestBuilder()
        prompt_end = builder.add_prompt(shared_prompt(trajectories))
        for rollout, trajectory in enumerate(trajectories):
            self._add_response(builder, prompt_end, trajectory, rollout)
        return builder.flatten()

    def _add_response(
        self, builder: ForestBuilder, prompt_end: Node, trajectory: Trajectory, rollout: int
    ) -> None:
        """Hangs the parent's text on the prompt, and plants a tree per thread."""
        parent, _ = self._parent_context(trajectory)
        response = Written(*(array[trajectory.prompt_len :] for array in parent))
        if len(response.tokens):
            builder.add_chain(prompt_end, *response, rollout=rollout)
        replaced_source = len(trajectory.tokens)
        for block in trajectory.blocks:
            for thread, message in _threads(block):
                written = join_written(
                    self._thread_prompt(trajectory.tokens, message),
                    isolated_thread(trajectory.tokens, thread),
                    replaced_tokens(thread, replaced_source),
                )
                replaced_source += len(thread.replaced)
                builder.add_chain(None, *written, rollout=rollout)

    def _thread_prompt(self, tokens: Int32[np.ndarray, "len"], message: OutlineSpan) -> Written:
        """What a thread's context holds before its header."""
        prefix = np.array(self.fork_join.context_prefix, np.int32)
        # The prefix is copied from nowhere; the message's tag is the nearest place in the text.
        source = np.concatenate(
            [np.full(len(prefix), message.start), np.arange(message.start, message.end)]
        )
        return Written(
            np.concatenate([prefix, tokens[message.start : message.end]]),
            np.full(len(source), TokenKind.PROMPT, np.int8),
            source.astype(np.int32),
        )

    def _parent_context(self, trajectory: Trajectory) -> tuple[Written, list[int]]:
        """All that the parent ever sees, and its length behind each block's join."""
        kind = text_kinds(trajectory, later_threads=TokenKind.SAMPLED)

        def span(start: int, end: int) -> Written:
            source = np.arange(start, end, dtype=np.int32)
            return Written(trajectory.tokens[start:end], kind[start:end], source)

        pieces: list[Written] = []
        joins: list[int] = []
        start = 0
        for block in trajectory.blocks:
            threads_start = block.threads[0].start if block.threads else block.join_end
            pieces.append(span(start, threads_start))
            for thread in block.threads:
                pieces.append(self._returned(trajectory.tokens, thread))
            threads_end = block.threads[-1].end if block.threads else block.join_end
            pieces.append(span(threads_end, block.join_end))
            joins.append(sum(len(piece.tokens) for piece in pieces))
            start = block.join_end
        return join_written(*pieces, span(start, len(trajectory.tokens))), joins

    def _returned(self, tokens: Int32[np.ndarray, "len"], thread: ThreadSpan) -> Written:
        """What the parent gets of a thread: its answer between tags."""
        closer = thread.end - 1
        openers = np.flatnonzero(tokens[thread.body : closer] == self.fork_join.return_open)
        opener = thread.body + int(openers[-1]) if len(openers) else closer
        answer = np.arange(opener + 1, closer)
        source = np.concatenate([[opener], answer, [closer]]).astype(np.int32)
        written = tokens[source]
        written[0] = self.fork_join.return_open  # a thread without it stands at its closing tag
        kind = np.full(len(source), TokenKind.JOINED, np.int8)
        kind[[0, -1]] = TokenKind.FORCED
        return Written(written, kind, source)


def _threads(block: ParallelBlock) -> list[tuple[ThreadSpan, OutlineSpan]]:
    """Threads with their messages; a rollout that was cut short has fewer threads than messages."""
    return list(zip(block.threads, block.outlines, strict=False))
