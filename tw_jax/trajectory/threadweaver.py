"""The ThreadWeaver schema (arXiv 2512.07843): threads see the prefix, joins re-encode."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from tw_jax.trajectory import metrics, threadweaver_parser
from tw_jax.trajectory.chains import ForestBuilder, Node
from tw_jax.trajectory.schema import (
    ForkJoinTokens,
    JoinRule,
    ParseError,
    PositionRule,
    TokenClasses,
)
from tw_jax.trajectory.thread_text import (
    isolated_thread,
    join_written,
    replaced_tokens,
    text_kinds,
)
from tw_jax.trajectory.trajectory import Trajectory, shared_prompt
from tw_jax.trajectory.trie import TokenKind, Trie
from tw_jax.trajectory.units import Unit, units_of_whole_prefix
from tw_jax.trajectory.vocabulary import bind_tags, forced_ids

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
        bound = bind_tags(tokenizer, THREADWEAVER_TAGS)
        tags, line_break = bound.by_name, forced_ids(tokenizer, "\n")
        return cls(
            tag_ids=bound.ids,
            eos_id=bound.eos_id,
            classes=bound.classes,
            fork_join=ForkJoinTokens(
                spawn_trigger=tags["</Outlines>"],
                plans_open=tags["<Outlines>"],
                plan_open=tags["<Outline>"],
                thread_stop=tags["</Thread>"],
                fork=line_break,
                header_prefix=(tags["<Thread>"], *line_break),
                header_suffix=forced_ids(tokenizer, ":"),
                thread_close=(*line_break, tags["</Thread>"]),
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
        return units_of_whole_prefix(trajectory)

    def forest(self, trajectories: Sequence[Trajectory]) -> Trie:
        """See `Schema.forest`.

        Raises:
          ValueError: the trajectories do not share one non-empty prompt.
        """
        prompt = shared_prompt(trajectories)
        builder = ForestBuilder()
        prompt_end = builder.add_prompt(prompt)
        for rollout, trajectory in enumerate(trajectories):
            if len(trajectory.tokens) > trajectory.prompt_len:
                _add_response(builder, prompt_end, trajectory, rollout)
        return builder.flatten()


def _add_response(
    builder: ForestBuilder, prompt_end: Node, trajectory: Trajectory, rollout: int
) -> None:
    """Hangs the joined response on the prompt, then every later thread on its fork."""
    start = trajectory.prompt_len
    tokens = trajectory.tokens[start:]
    kind = text_kinds(trajectory, later_threads=TokenKind.JOINED)[start:]
    source = np.arange(start, len(trajectory.tokens), dtype=np.int32)
    # Responses hang side by side: nothing is shared between rollouts, not even forced prefixes.
    main = builder.add_chain(prompt_end, tokens, kind, source, rollout)
    replaced_source = len(trajectory.tokens)
    for block in trajectory.blocks:
        for ordinal, thread in enumerate(block.threads):
            replaced = replaced_tokens(thread, replaced_source)
            replaced_source += len(thread.replaced)
            if ordinal == 0:
                written = replaced
                anchor = Node(main.chain, thread.sampled_end - 1 - start)
            else:
                written = join_written(isolated_thread(trajectory.tokens, thread), replaced)
                anchor = Node(main.chain, block.threads[0].start - 1 - start)
            if len(written.tokens):
                builder.add_chain(anchor, written.tokens, written.kind, written.source, rollout)
