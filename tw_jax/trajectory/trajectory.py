"""A trajectory: a prompt, everything appended after it, and where its parallel blocks lie.

The parser builds trajectories from token ids; the rollout engine builds them from what it did.
Everything downstream (tries, metrics, viewers) reads only this structure, so a trajectory read
from a file and one just sampled go through the same code.

All indices are positions in `Trajectory.tokens`; spans are half-open `[start, end)`.
"""

import dataclasses

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
      end: one past the closing tag.
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
      join_end: one past the last token that the join forces; the model writes on from here.
      end: one past the block's closing tag, or `join_end` where the model never closed it.
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
