"""The contract between data and training: rows of packed tries as a few integers per token."""

import dataclasses
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Tries in fixed-length rows, padding between and behind them; rows are independent.

    Every field has shape `[rows, row_len]`, except the hidden intervals
    `[depth, rows, row_len]` (`depth` is the static nesting depth; 0 where a schema hides nothing).
    Integer fields are int32, the rest float32.

    Attributes:
      tokens: token ids.
      positions: RoPE positions.
      parent: index in the row of the token whose hidden state predicts this one; roots and padding
        point to themselves.
      visible_end: exclusive; key j is visible to queries i with `j <= i < visible_end[j]`.
        Padding holds its own index + 1, so that every token sees itself.
      hidden_start: key j is not visible to `hidden_start[j] <= i < hidden_end[j]`.
      hidden_end: see `hidden_start`; both 0 where unused.
      loss_weight: weight of the token's negative log-probability; 0 for prompts, padding and
        forced tokens.
      kl_weight: RL only; weight of the token's KL term; None: `loss_weight`.
      denominator: RL only; the token's share in what sums are divided by; None: `loss_weight`.
      advantage: RL only; the advantage of the token's rollout.
      old_logprob: RL only; log-probability under the policy that starts the update.
      sampler_logprob: RL only; log-probability that the rollout engine recorded.
      reference_logprob: RL with a KL term only; log-probability under the reference.
      start_logprob: RL only, if measured; log-probability under the model that the run started
        from.
      rollout_id: RL only; index of the rollout in the step, -1 for tokens without loss.
      region: RL only; a `tw_jax.train.token_regions.TokenRegion`, -1 for tokens without loss.
      policy_version: RL only; training steps behind the parameters that sampled the token, -1 where
        nobody knows.
    """

    tokens: Any
    positions: Any
    parent: Any
    visible_end: Any
    hidden_start: Any
    hidden_end: Any
    loss_weight: Any
    kl_weight: Any = None
    denominator: Any = None
    advantage: Any = None
    old_logprob: Any = None
    sampler_logprob: Any = None
    reference_logprob: Any = None
    start_logprob: Any = None
    rollout_id: Any = None
    region: Any = None
    policy_version: Any = None

    @property
    def row_len(self) -> int:
        """Tokens per row, padding included."""
        return np.shape(self.tokens)[-1]
