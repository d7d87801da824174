"""Pieces of a trajectory as the contexts of its units hold them: tokens, kinds and sources."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int8, Int32

from tw_jax.trajectory.trajectory import ThreadSpan, Trajectory
from tw_jax.trajectory.trie import TokenKind


class Written(NamedTuple):
    """A run of tokens with what a trie says of each.

    Attributes:
      tokens: `[n]` ids.
      kind: `[n]` a `TokenKind` each.
      source: `[n]` see `Trie.source`.
    """

    tokens: Int32[np.ndarray, "n"]
    kind: Int8[np.ndarray, "n"]
    source: Int32[np.ndarray, "n"]


def join_written(*pieces: Written) -> Written:
    """One piece behind the other."""
    return Written(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))


def text_kinds(trajectory: Trajectory, later_threads: TokenKind) -> Int8[np.ndarray, "len"]:
    """Kind of every token of the trajectory's text.

    Args:
      trajectory: the text.
      later_threads: what the bodies of threads 2, 3, ... are where they stand in the text.
    """
    kind = np.full(len(trajectory.tokens), TokenKind.SAMPLED, np.int8)
    kind[: trajectory.response_start] = TokenKind.FORCED
    kind[: trajectory.prompt_len] = TokenKind.PROMPT
    for block in trajectory.blocks:
        kind[block.outlines_end : block.join_end] = TokenKind.FORCED
        for ordinal, thread in enumerate(block.threads):
            kind[thread.body : thread.sampled_end] = (
                TokenKind.SAMPLED if ordinal == 0 else later_threads
            )
    return kind


def isolated_thread(tokens: Int32[np.ndarray, "len"], thread: ThreadSpan) -> Written:
    """Header and sampled tokens of a thread as it ran, replaced ones not included."""
    source = np.arange(thread.start, thread.sampled_end, dtype=np.int32)
    kind = np.full(len(source), TokenKind.SAMPLED, np.int8)
    kind[: thread.body - thread.start] = TokenKind.FORCED
    return Written(tokens[thread.start : thread.sampled_end], kind, source)


def replaced_tokens(thread: ThreadSpan, source: int) -> Written:
    """The sampled tokens that the join replaced; their sources count from `source`."""
    n = len(thread.replaced)
    return Written(
        np.array(thread.replaced, np.int32),
        np.full(n, TokenKind.SAMPLED, np.int8),
        np.arange(source, source + n, dtype=np.int32),
    )
