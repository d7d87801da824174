r"""The native schema (NPR, arXiv 2512.07461; Multiverse, 2506.09991): joins keep the threads' KV.

The text is NPR's, with flat blocks:

    <guideline>\n<plan>1: plan</plan>\n<plan>2: plan</plan>\n</guideline>\n
    <step>\n1: body\n</step>\n<step>\n2: body\n</step>\n<takeaway>\ntext\n</takeaway>

(no line break where this page wraps). The takeaway's text is sequential text behind the join.

Positions (NPR section 3, its training code): with g the position of `</guideline>`, the line break
behind it stands at g+1, and so does every `<step>`; a thread's tokens count on from there. With m
the largest position of a `</step>`, `<takeaway>` stands at m+1. So a line break shares its position
with the tag behind it in two places, as in the released weights' training.

Visibility: causal, minus all between threads of one block. A thread owns the line break behind
its `</step>`: the released code gives it to nobody, and through it threads 2, 3, ... read the ones
before.

What the engine does (join rule `gather_kv`, DESIGN section 6):

1. The parent samples `</guideline>` at position g. It ends the segment's unit, and spawns one
   thread per distinct number of the list.
2. `fork` ("\n") is fed once behind it, at g+1. A thread's cache is the parent's cache up to here,
   shared.
3. Thread k is fed its header `<step> \n n :` at g+1, g+2, ...: every thread's first token at g+1,
   whatever the length of `fork`. Sampling begins behind the header; the unit's context is prefix,
   fork and header. Neither siblings nor later threads are ever seen.
4. It ends by sampling `</step>`. If its budget ends, or it samples the end of text (which is not
   fed: `ThreadSpan.replaced`), `thread_close` ("\n</step>") is fed instead. Then, in every case,
   `thread_tail` ("\n") is fed, in the thread's own context and at its next position.
5. The parent's cache becomes: prefix, fork, then the cache of thread 1, 2, ..., each from its
   header to its tail, as it is. Nothing is computed again.
6. `join` ("<takeaway>\n") is fed at m+1, m+2; tails do not count towards m. The parent samples on
   at m+3; its unit's context is the whole text.

In the text all this stands in one line: prefix, fork, header, body, closing tag and tail of each
thread, join. Budgets count tokens of the text, not positions.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from tw_jax.trajectory import metrics, native_parser
from tw_jax.trajectory.native_layout import lay_out, native_positions
from tw_jax.trajectory.schema import (
    ForkJoinTokens,
    JoinRule,
    ParseError,
    PositionRule,
    TokenClasses,
)
from tw_jax.trajectory.trajectory import ParallelBlock, Trajectory
from tw_jax.trajectory.trie import Trie
from tw_jax.trajectory.units import Unit, units_of_whole_prefix
from tw_jax.trajectory.vocabulary import bind_tags, forced_ids

NATIVE_TAGS = (
    "<guideline>",
    "</guideline>",
    "<plan>",
    "</plan>",
    "<step>",
    "</step>",
    "<takeaway>",
    "</takeaway>",
)


@dataclasses.dataclass(frozen=True, eq=False)
class NativeSchema:
    """`Schema` for native parallel reasoning, bound to one tokenizer; see `from_tokenizer`."""

    tag_ids: Int32[np.ndarray, "tags"]
    eos_id: int
    classes: TokenClasses
    fork_join: ForkJoinTokens

    name: str = "native"
    tags: tuple[str, ...] = NATIVE_TAGS
    join_rule: JoinRule = "gather_kv"
    position_rule: PositionRule = "shared_start"

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "NativeSchema":
        """Looks up the tags and the pieces of the forced text.

        Raises:
          UserError: the tokenizer lacks a control tag or an end-of-text token.
        """
        bound = bind_tags(tokenizer, NATIVE_TAGS)
        tags, line_break = bound.by_name, forced_ids(tokenizer, "\n")
        return cls(
            tag_ids=bound.ids,
            eos_id=bound.eos_id,
            classes=bound.classes,
            fork_join=ForkJoinTokens(
                spawn_trigger=tags["</guideline>"],
                plans_open=tags["<guideline>"],
                plan_open=tags["<plan>"],
                thread_stop=tags["</step>"],
                fork=line_break,
                header_prefix=(tags["<step>"], *line_break),
                header_suffix=forced_ids(tokenizer, ":"),
                thread_close=(*line_break, tags["</step>"]),
                join=(tags["<takeaway>"], *line_break),
                thread_tail=line_break,
            ),
        )

    def parse(self, tokens: Any, prompt_len: int = 0) -> Trajectory | tuple[ParseError, ...]:
        """See `Schema.parse`; error kinds in `tw_jax.trajectory.native_parser`."""
        parsed = native_parser.parse(tokens, self.classes, self.tags, prompt_len)
        if isinstance(parsed, tuple):
            return parsed
        return dataclasses.replace(
            parsed, blocks=tuple(self._with_join(parsed, block) for block in parsed.blocks)
        )

    def _with_join(self, parsed: Trajectory, block: ParallelBlock) -> ParallelBlock:
        """The block, ending behind what the engine forces at the join as far as the text has it."""
        join, start = self.fork_join.join, block.join_end - 1
        found = tuple(parsed.tokens[start : start + len(join)].tolist())
        end = start + (len(join) if found == join else 1)
        return dataclasses.replace(block, join_end=end, end=end)

    def validate(self, trajectory: Trajectory) -> tuple[ParseError, ...]:
        """See `Schema.validate`."""
        return native_parser.validate(trajectory, self.classes)

    def critical_path(self, trajectory: Trajectory) -> int:
        """See `Schema.critical_path`."""
        return metrics.critical_path(trajectory)

    def units(self, trajectory: Trajectory) -> tuple[Unit, ...]:
        """See `Schema.units`."""
        return units_of_whole_prefix(trajectory)

    def positions(self, trajectory: Trajectory) -> Int32[np.ndarray, "len"]:
        """RoPE position of every token of the text, by the rule at the top of this file."""
        return native_positions(trajectory, self.fork_join.join[0])

    def forest(self, trajectories: Sequence[Trajectory]) -> Trie:
        """See `Schema.forest`.

        One sequence per trajectory behind the shared prompt; threads are hidden from their later
        siblings by one interval per token, so the depth of the hidden intervals is 1.

        Raises:
          ValueError: the trajectories do not share one non-empty prompt.
        """
        return lay_out(trajectories, self.fork_join.join[0])
