"""Tries flattened in depth-first preorder: a few integers per token."""

import dataclasses
import enum

import numpy as np
from jaxtyping import Int8, Int32


class TokenKind(enum.IntEnum):
    """Where a token came from; losses weigh kinds, tries carry them."""

    PROMPT = 0
    SAMPLED = 1  # the model wrote it in this very context
    JOINED = 2  # copy of a thread's text in the context that goes on behind the join
    FORCED = 3  # headers, closers and joins that the engine writes


@dataclasses.dataclass(frozen=True)
class Trie:
    """One trie (or forest) in preorder; every array is `[len]`, indices are relative to the trie.

    Attributes:
      tokens: token ids.
      positions: RoPE positions.
      parent: index of the predicting token; a root points to itself.
      visible_end: exclusive end of the queries that see the token.
      hidden_start: see `PackedBatch`; `[depth, len]`.
      hidden_end: see `PackedBatch`; `[depth, len]`.
      kind: a `TokenKind` per token.
      source: position in its trajectory's joined tokens that the token was copied from; tokens that
        the join replaced count on from there, in block and thread order.
      rollout: index of the trajectory that the token belongs to; -1 for the shared prompt.
    """

    tokens: Int32[np.ndarray, "len"]
    positions: Int32[np.ndarray, "len"]
    parent: Int32[np.ndarray, "len"]
    visible_end: Int32[np.ndarray, "len"]
    hidden_start: Int32[np.ndarray, "depth len"]
    hidden_end: Int32[np.ndarray, "depth len"]
    kind: Int8[np.ndarray, "len"]
    source: Int32[np.ndarray, "len"]
    rollout: Int32[np.ndarray, "len"]

    def __len__(self) -> int:
        return len(self.tokens)
