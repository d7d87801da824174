"""The interface behind which ThreadWeaver, Native (NPR, Multiverse) and APR differ.

A schema is bound to one tokenizer's ids when it is made. Parser, packing, filters, the rollout
engine, metrics and viewers take it as an argument and never look at tag names themselves.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Bool, Int8, Int32

from tw_jax.trajectory.trajectory import Trajectory
from tw_jax.trajectory.trie import Trie
from tw_jax.trajectory.units import Unit

JoinRule = Literal["reencode", "gather_kv", "message"]
PositionRule = Literal["contiguous", "shared_start", "fresh"]


@dataclasses.dataclass(frozen=True)
class ParseError:
    """One place where text breaks the schema's grammar.

    Attributes:
      kind: a stable identifier such as "unclosed_thread"; see the schema for the list.
      index: position in the token ids.
      message: what was found, what was expected, what to do.
    """

    kind: str
    index: int
    message: str


@dataclasses.dataclass(frozen=True)
class TokenClasses:
    """Per-id facts about the vocabulary that reading outline numbers needs; each array is [vocab].

    Attributes:
      digit: 0..9 where the piece is that one digit, -1 elsewhere.
      dot: the piece is exactly ".".
      colon: the piece begins with ":" (pieces that merge ":" with a line break included).
      space: the piece is white space only.
      line_break: the piece is exactly one line break.
      line_end: the piece ends with a line break.
      space_start: the piece begins with a space.
      tag: index into the schema's tags, -1 elsewhere.
    """

    digit: Int8[np.ndarray, "vocab"]
    dot: Bool[np.ndarray, "vocab"]
    colon: Bool[np.ndarray, "vocab"]
    space: Bool[np.ndarray, "vocab"]
    line_break: Bool[np.ndarray, "vocab"]
    line_end: Bool[np.ndarray, "vocab"]
    space_start: Bool[np.ndarray, "vocab"]
    tag: Int8[np.ndarray, "vocab"]


@dataclasses.dataclass(frozen=True)
class ForkJoinTokens:
    """What the rollout engine must know of a schema, as token ids.

    What happens token by token under each join rule stands in the schemas' own modules.

    Attributes:
      spawn_trigger: a sequential segment that samples this id spawns.
      plans_open: the id that opens the list of plans; what was captured of a list restarts here.
      plan_open: a plan's number follows this id; under the join rule `message`, its message.
      thread_stop: a thread that samples this id is finished.
      fork: forced once behind the spawn trigger, before the first thread's header. Part of every
        thread's context, except under `message`, where only the parent has it.
      header_prefix: forced before a thread's number.
      header_suffix: forced after it; sampling of the thread's body begins behind it.
      thread_close: forced in place of a missing thread stop (budget hit, or text ended).
      join: forced after the last thread; the parent samples on behind it.
      thread_tail: forced behind every thread's closing tag, in the thread's own context; hidden
        from its siblings like the rest of the thread.
      numbered: plans and thread headers carry a number. If not, every plan that is closed by
        `plan_close` spawns a thread, in order, and the header is `header_prefix`, `header_suffix`.
      plan_close: the id that closes a plan; -1 where reading the number is enough.
      context_prefix: under `message`, what a thread's context begins with. Behind it comes the
        message, from `plan_open` to `plan_close` with both, and then the header.
      return_open: under `message`, the id behind which a thread's returned message begins; the
        last one in the thread counts, and the message ends before the thread's closing tag. -1
        under the other rules. A thread without it returns an empty message. At the join the
        parent's context gets, per thread, `return_open`, the message, `thread_stop`, all forced.
    """

    spawn_trigger: int
    plans_open: int
    plan_open: int
    thread_stop: int
    fork: tuple[int, ...]
    header_prefix: tuple[int, ...]
    header_suffix: tuple[int, ...]
    thread_close: tuple[int, ...]
    join: tuple[int, ...]
    thread_tail: tuple[int, ...] = ()
    numbered: bool = True
    plan_close: int = -1
    context_prefix: tuple[int, ...] = ()
    return_open: int = -1


class Schema(Protocol):
    """One language of parallel thought, bound to a tokenizer."""

    @property
    def name(self) -> str:
        """Names the schema in configs and checkpoints."""
        ...

    @property
    def tags(self) -> tuple[str, ...]:
        """The control tags as text."""
        ...

    @property
    def tag_ids(self) -> Int32[np.ndarray, "tags"]:
        """Their ids."""
        ...

    @property
    def eos_id(self) -> int:
        """The end-of-text token."""
        ...

    @property
    def classes(self) -> TokenClasses:
        """Per-id facts about the vocabulary."""
        ...

    @property
    def fork_join(self) -> ForkJoinTokens:
        """What the rollout engine must know."""
        ...

    @property
    def join_rule(self) -> JoinRule:
        """What a join does with the threads' tokens and KV."""
        ...

    @property
    def position_rule(self) -> PositionRule:
        """How positions run through threads and joins."""
        ...

    def parse(
        self, tokens: Int32[np.ndarray, "len"], prompt_len: int = 0
    ) -> Trajectory | tuple[ParseError, ...]:
        """Reads token ids into a trajectory, or says where they break the grammar. Never raises."""
        ...

    def validate(self, trajectory: Trajectory) -> tuple[ParseError, ...]:
        """The strict format check: canonical white space, numbering, non-empty threads."""
        ...

    def units(self, trajectory: Trajectory) -> tuple[Unit, ...]:
        """The (context, completion) pairs that inference meets, in order."""
        ...

    def forest(self, trajectories: Sequence[Trajectory]) -> Trie:
        """The trie of several trajectories that share their prompt, in depth-first preorder.

        One trajectory gives its own trie. Sampled tokens of different trajectories never merge.
        """
        ...

    def critical_path(self, trajectory: Trajectory) -> int:
        """Tokens on the longest chain of dependent tokens after the prompt (DESIGN section 11)."""
        ...
