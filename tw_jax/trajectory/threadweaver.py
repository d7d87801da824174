"""The ThreadWeaver schema (arXiv 2512.07843): threads see the prefix, joins re-encode."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int8, Int32

from tw_jax.errors import UserError
from tw_jax.trajectory import metrics, threadweaver_parser
from tw_jax.trajectory.chains import ForestBuilder, Node
from tw_jax.trajectory.schema import (
    ForkJoinTokens,
    JoinRule,
    ParseError,
    PositionRule,
    TokenClasses,
)
from tw_jax.trajectory.trajectory import ThreadSpan, Trajectory
from tw_jax.trajectory.trie import TokenKind, Trie
from tw_jax.trajectory.units import Unit
from tw_jax.trajectory.vocabulary import control_token_ids, token_classes

THREADWEAVER_TAGS = (
    "<Parallel>",
    "</Parallel>",
    "<Outlines>",
    "</Outlines>",
    "<Outline>",
    "</Outline>",
    "<Thread>",
    "</Thread>",
)


@dataclasses.dataclass(frozen=True, eq=False)
class ThreadWeaverSchema:
    """`Schema` for ThreadWeaver, bound to one tokenizer; make it with `from_tokenizer`."""

    tag_ids: Int32[np.ndarray, "tags"]
    eos_id: int
    classes: TokenClasses
    fork_join: ForkJoinTokens

    name: str = "threadweaver"
    tags: tuple[str, ...] = THREADWEAVER_TAGS
    join_rule: JoinRule = "reencode"
    position_rule: PositionRule = "contiguous"

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "ThreadWeaverSchema":
        """Looks up the tags and the pieces of the forced text.

        Raises:
          UserError: the tokenizer lacks a control tag or an end-of-text token.
        """
        tag_ids = control_token_ids(tokenizer, THREADWEAVER_TAGS)
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token (eos_token)")

        def piece(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False).input_ids)

        by_name = dict(zip(THREADWEAVER_TAGS, tag_ids.tolist(), strict=True))
        line_break = piece("\n")
        return cls(
            tag_ids=tag_ids,
            eos_id=int(tokenizer.eos_token_id),
            classes=token_classes(tokenizer, tag_ids),
            fork_join=ForkJoinTokens(
                spawn_trigger=by_name["</Outlines>"],
                plans_open=by_name["<Outlines>"],
                plan_open=by_name["<Outline>"],
                thread_stop=by_name["</Thread>"],
                fork=line_break,
                header_prefix=(by_name["<Thread>"], *line_break),
                header_suffix=piece(":"),
                thread_close=(*line_break, by_name["</Thread>"]),
                join=line_break,
            ),
        )

    def parse(self, tokens: Any, prompt_len: int = 0) -> Trajectory | tuple[ParseError, ...]:
        """See `Schema.parse`; error kinds in `tw_jax.trajectory.threadweaver_parser`."""
        parsed = threadweaver_parser.parse(tokens, self.classes, self.tags, prompt_len)
        if isinstance(parsed, tuple):
            return parsed
        # The engine forces the join's line break, which the text holds right behind the threads.
        blocks = tuple(
            dataclasses.replace(
                block, join_end=min(block.threads[-1].end + len(self.fork_join.join), block.end - 1)
            )
            for block in parsed.blocks
        )
        return dataclasses.replace(parsed, blocks=blocks)

    def validate(self, trajectory: Trajectory) -> tuple[ParseError, ...]:
        """See `Schema.validate`."""
        return threadweaver_parser.validate(trajectory, self.classes)

    def critical_path(self, trajectory: Trajectory) -> int:
        """See `Schema.critical_path`."""
        return metrics.critical_path(trajectory)

    def units(self, trajectory: Trajectory) -> tuple[Unit, ...]:
        """See `Schema.units`."""
        tokens, units = trajectory.tokens, []
        start = trajectory.response_start
        for index, block in enumerate(trajectory.blocks):
            units.append(
                Unit("segment", index, 0, tokens[:start], tokens[start : block.outlines_end])
            )
            shared = tokens[: block.threads[0].start] if block.threads else tokens[:0]
            for ordinal, thread in enumerate(block.threads, start=1):
                context = np.concatenate([shared, tokens[thread.start : thread.body]])
                completion = np.concatenate(
                    [tokens[thread.body : thread.sampled_end], np.array(thread.replaced, np.int32)]
                )
                units.append(Unit("thread", index, ordinal, context, completion))
            start = block.join_end
        if start < len(tokens):
            units.append(Unit("segment", len(trajectory.blocks), 0, tokens[:start], tokens[start:]))
        return tuple(units)

    def forest(self, trajectories: Sequence[Trajectory]) -> Trie:
        """See `Schema.forest`.

        Raises:
          ValueError: the trajectories do not share one non-empty prompt.
        """
        first = trajectories[0]
        prompt = first.tokens[: first.prompt_len]
        if not len(prompt):
            raise ValueError("a trie needs at least one prompt token to predict the response from")
        builder = ForestBuilder()
        root = builder.add_chain(
            None,
            prompt,
            np.full(len(prompt), TokenKind.PROMPT, np.int8),
            np.arange(len(prompt), dtype=np.int32),
            rollout=-1,
        )
        prompt_end = Node(root.chain, len(prompt) - 1)
        for rollout, trajectory in enumerate(trajectories):
            if not np.array_equal(trajectory.tokens[: trajectory.prompt_len], prompt):
                raise ValueError(f"trajectory {rollout} has another prompt than trajectory 0")
            if len(trajectory.tokens) > trajectory.prompt_len:
                _add_response(builder, prompt_end, trajectory, rollout)
        return builder.flatten()


def _add_response(
    builder: ForestBuilder, prompt_end: Node, trajectory: Trajectory, rollout: int
) -> None:
    """Hangs the joined response on the prompt, then every later thread on its fork."""
    start = trajectory.prompt_len
    tokens, kind = trajectory.tokens[start:], _joined_kinds(trajectory)[start:]
    source = np.arange(start, len(trajectory.tokens), dtype=np.int32)
    # Responses hang side by side: nothing is shared between rollouts, not even forced prefixes.
    main = builder.add_chain(prompt_end, tokens, kind, source, rollout)
    replaced_source = len(trajectory.tokens)
    for block in trajectory.blocks:
        for ordinal, thread in enumerate(block.threads):
            replaced = _replaced(thread, replaced_source)
            replaced_source += len(thread.replaced)
            if ordinal == 0:
                written = replaced
                anchor = Node(main.chain, thread.sampled_end - 1 - start)
            else:
                written = _isolated_thread(trajectory.tokens, thread, replaced)
                anchor = Node(main.chain, block.threads[0].start - 1 - start)
            if len(written[0]):
                builder.add_chain(anchor, *written, rollout)


def _joined_kinds(trajectory: Trajectory) -> Int8[np.ndarray, "len"]:
    """Kind of every token of the joined text."""
    kind = np.full(len(trajectory.tokens), TokenKind.SAMPLED, np.int8)
    kind[: trajectory.response_start] = TokenKind.FORCED
    kind[: trajectory.prompt_len] = TokenKind.PROMPT
    for block in trajectory.blocks:
        kind[block.outlines_end : block.join_end] = TokenKind.FORCED
        for ordinal, thread in enumerate(block.threads):
            kind[thread.body : thread.sampled_end] = (
                TokenKind.SAMPLED if ordinal == 0 else TokenKind.JOINED
            )
    return kind


_Written = tuple[Int32[np.ndarray, "n"], Int8[np.ndarray, "n"], Int32[np.ndarray, "n"]]


def _isolated_thread(
    tokens: Int32[np.ndarray, "len"], thread: ThreadSpan, replaced: _Written
) -> _Written:
    """Header and sampled tokens of a thread as it ran: (tokens, kind, source)."""
    source = np.arange(thread.start, thread.sampled_end, dtype=np.int32)
    kind = np.full(len(source), TokenKind.SAMPLED, np.int8)
    kind[: thread.body - thread.start] = TokenKind.FORCED
    return (
        np.concatenate([tokens[thread.start : thread.sampled_end], replaced[0]]),
        np.concatenate([kind, replaced[1]]),
        np.concatenate([source, replaced[2]]),
    )


def _replaced(thread: ThreadSpan, source: int) -> _Written:
    """The sampled tokens that the join replaced: (tokens, kind, source)."""
    n = len(thread.replaced)
    return (
        np.array(thread.replaced, np.int32),
        np.full(n, TokenKind.SAMPLED, np.int8),
        np.arange(source, source + n, dtype=np.int32),
    )
