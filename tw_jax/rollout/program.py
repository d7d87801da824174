"""What the jitted loop is compiled for."""

import dataclasses
from typing import Any

from tw_jax.kernels.column_cache import CacheLayout
from tw_jax.rollout.controller import RowController
from tw_jax.rollout.outlines import OutlineAlphabet
from tw_jax.trajectory.schema import ForkJoinTokens


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Everything about the jitted loop that is known before it is traced.

    Attributes:
      layout: shape of the key/value cache; its lines behind the rows hold kept prefixes.
      rows: rows of the decoding batch.
      kv_heads: key/value heads of the model.
      head_dim: width of one head.
      dtype: dtype of the cache.
      vocab: rows of the model's head.
      requests: request slots.
      context_len: positions a unit's context may reach, exclusive.
      max_threads: threads per block.
      max_digits: tokens of an outline number.
      max_blocks: parallel blocks per rollout.
      max_logit_bias: biased tokens per request.
      prefill_rows: rows that the prefill lane feeds at once.
      prefill_chunk: tokens it feeds per row.
      prefill_min: pending tokens below which the lane rests and rows feed them one by one.
      deterministic: see `EngineConfig.deterministic`.
      scripts: see `EngineConfig.scripts`.
      gathers: the schema joins by keeping the threads' keys and values (`gather_kv`).
      messages: its threads exchange messages (`message`).
      tokens: the schema's forced tokens and triggers.
      eos_id: end of text.
      alphabet: token classes for outline numbers.
      controller: may stop units and swap tokens; None for no such thing.
    """

    layout: CacheLayout
    rows: int
    kv_heads: int
    head_dim: int
    dtype: Any
    vocab: int
    requests: int
    context_len: int
    max_threads: int
    max_digits: int
    max_blocks: int
    max_logit_bias: int
    prefill_rows: int
    prefill_chunk: int
    prefill_min: int
    deterministic: bool
    scripts: bool
    gathers: bool
    messages: bool
    tokens: ForkJoinTokens
    eos_id: int
    alphabet: OutlineAlphabet
    controller: RowController | None = None

    @property
    def areas(self) -> int:
        """Lines of the token store per request."""
        return self.max_threads + self.messages

    @property
    def archive_len(self) -> int:
        """Tokens of joined threads that a request may keep beside the store."""
        return self.max_threads * self.store_len

    @property
    def shared_len(self) -> int:
        """Forced tokens behind the fork that all threads of a block have in common."""
        return len(self.tokens.fork) + len(self.tokens.header_prefix)

    @property
    def fixed_header_len(self) -> int:
        """Tokens of a thread's header, the fork's and the number's not counted."""
        return len(self.tokens.header_prefix) + len(self.tokens.header_suffix)

    @property
    def close_len(self) -> int:
        """Tokens that close a thread by force."""
        return len(self.tokens.thread_close)

    @property
    def tail_len(self) -> int:
        """Tokens behind a thread's closing tag that belong to it."""
        return len(self.tokens.thread_tail)

    @property
    def closing_len(self) -> int:
        """Most tokens behind the sampled ones of a thread."""
        return self.close_len + self.tail_len

    @property
    def store_len(self) -> int:
        """Length of an area: slack lets forced text be written as one padded piece."""
        header_len = len(self.tokens.fork) + self.fixed_header_len + self.max_digits
        return self.context_len + max(header_len, self.closing_len, len(self.tokens.join))
