"""A trajectory: a prompt, everything appended after it, and where its parallel blocks lie.

The parser builds trajectories from token ids; the rollout engine builds them from what it did.
Everything downstream (tries, metrics, viewers) reads only this structure, so a trajectory read
from a file and one just sampled go through the same code.

All indices are positions in `Trajectory.tokens`; spans are half-open `[start, end)`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32


@dataclasses.dataclass(frozen=True)
class OutlineSpan:
    """One numbered plan: `start` is its opening tag, `end` one past its closing tag."""

    number: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class ThreadSpan:
    """One branch of execution inside a parallel block.

    Attributes:
      number: the outline number that the header repeats, as text ("2", or "1.2" where a schema
        admits it).
      start: index of the opening tag.
      body: first token after the header that the engine forces.
      sampled_end: one past the last token that the model wrote itself. Smaller than `end` when the
        engine closed the thread (a budget was hit, or the model ended its text).
      end: one past the closing tag. What a schema forces behind that tag in the thread's own
        context (`ForkJoinTokens.thread_tail`) lies between here and the next thread, or the join.
      replaced: tokens the model sampled at `sampled_end` that the join replaced by the thread stop
        (an end-of-text token). They carry loss in training but are not part of the joined text.
    """

    number: str
    start: int
    body: int
    sampled_end: int
    end: int
    replaced: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class ParallelBlock:
    """One parallel block.

    Attributes:
      start: index of the opening tag (of the outlines' opener where a rollout never opened one).
      outlines_end: one past the closing tag of the outlines, the spawn trigger.
      outlines: the numbered plans, in text order.
      threads: the branches, in join order.
      join_end: one past the last token that the join forces; the model writes on from here. Where
        the rollout ended before its join: one past all that was forced behind the last thread.
      end: one past the block's closing tag, or `join_end` where the model never closed it or the
        schema has no such tag.
    """

    start: int
    outlines_end: int
    outlines: tuple[OutlineSpan, ...]
    threads: tuple[ThreadSpan, ...]
    join_end: int
    end: int


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Token ids with their parallel blocks in text order.

    Attributes:
      tokens: prompt, then everything appended after it, threads joined in order.
      prompt_len: number of leading prompt tokens.
      blocks: the top-level parallel blocks.
      sampled_start: first token the model wrote itself; larger than `prompt_len` when a prefix of
        the response was forced (an evaluation that forces a style).
    """

    tokens: Int32[np.ndarray, "len"]
    prompt_len: int
    blocks: tuple[ParallelBlock, ...] = ()
    sampled_start: int | None = None

    @property
    def response_start(self) -> int:
        """Index of the first token the model wrote itself."""
        return self.prompt_len if self.sampled_start is None else self.sampled_start


def shared_prompt(trajectories: Sequence[Trajectory]) -> Int32[np.ndarray, "prompt"]:
    """The prompt of trajectories that share one.

    Raises:
      ValueError: they do not, or it is empty: nothing could predict the response's first token.
    """
    prompt = trajectories[0].tokens[: trajectories[0].prompt_len]
    if not len(prompt):
        raise ValueError("a trie needs at least one prompt token to predict the response from")
    for rollout, trajectory in enumerate(trajectories):
        if not np.array_equal(trajectory.tokens[: trajectory.prompt_len], prompt):
            raise ValueError(f"trajectory {rollout} has another prompt than trajectory 0")
    return prompt
