"""What each sampled token of a rollout weighs: aggregations as three numbers per token.

Every aggregation is `(sum policy * l + kl_coefficient * sum kl * k) / sum denominator` over all
sampled tokens of the global batch, with the policy loss `l` and the KL estimate `k` of each. Both
sums add up over rows, micro-batches and devices.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tw_jax.train.objective import ObjectiveConfig


class TokenWeights(NamedTuple):
    """Weights of every token of one unit.

    Attributes:
      policy: of its policy loss and entropy.
      kl: of its KL estimate.
      denominator: its share in what the sums are divided by.
    """

    policy: float
    kl: float
    denominator: float


def token_weights(unit_lens: Sequence[int], objective: ObjectiveConfig) -> list[TokenWeights]:
    """Weights of the sampled tokens of a rollout, per unit.

    Args:
      unit_lens: sampled tokens of each unit of one rollout; empty units are allowed.
      objective: whose aggregation is meant.
    """
    total = max(sum(unit_lens), 1)
    if objective.aggregation == "token_mean":
        return [TokenWeights(1.0, 1.0, 1.0)] * len(unit_lens)
    if objective.aggregation == "sequence_mean":
        return [TokenWeights(1 / total, 1 / total, 1 / total)] * len(unit_lens)
    if objective.aggregation == "token_sum":
        each = 1 / objective.token_budget
        return [TokenWeights(each, each, 1 / total)] * len(unit_lens)
    units = sum(n > 0 for n in unit_lens)
    return [
        TokenWeights(1 / (units * n), 1 / n, 1 / n) if n else TokenWeights(0.0, 0.0, 0.0)
        for n in unit_lens
    ]
