"""Policy-gradient objectives as values of one config (DESIGN section 10).

P-GRPO (arXiv 2512.07843, eq. 4): `A = r - mean(group)`, broadcast to every sampled token of every
unit; loss `-sum_t A_t log pi_t / sum_t 1` over the whole batch, on-policy. The other published
objectives (`objective_presets`) differ in the values of these fields; nothing else.

Where the parts are worked out: advantages and which rollouts are kept in `advantages`, weights of
tokens in `token_weights`, ratio, clipping, KL and the rest per token in `policy_terms`, the sums
over a batch in `policy_sum`, references that move in `reference`.
"""

import dataclasses
from typing import Literal

from tw_jax.config_checks import require_at_least
from tw_jax.train.reference import ReferenceConfig

Normalizer = Literal["none", "group_std", "batch_std"]
Ratio = Literal["on_policy", "ppo_clip", "detached"]
RatioLevel = Literal["token", "sequence"]
Aggregation = Literal["token_mean", "sequence_mean", "rollout_mean", "token_sum"]
KLEstimate = Literal["k1", "k2", "k3"]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """One policy-gradient objective.

    Attributes:
      normalizer: what group-centred rewards are divided by: nothing, the group's or the batch's
        standard deviation.
      ratio: "on_policy" differentiates log pi; "ppo_clip" clips pi / pi_old; "detached" weighs
        log pi by the detached ratio pi / pi_old.
      ratio_level: "token", or "sequence": every token of a rollout has the same ratio, the
        geometric mean over the rollout's sampled tokens (GSPO).
      clip_low: ppo_clip keeps the ratio above 1 - clip_low where that is pessimistic.
      clip_high: ppo_clip keeps the ratio below 1 + clip_high likewise.
      dual_clip: ppo_clip bounds the loss of a negative advantage by this many times its size, above
        1; null does not.
      aggregation: "token_mean": every token alike; "sequence_mean": the mean over rollouts of their
        token means; "rollout_mean": the mean over units of their token means, each divided by
        the number of its rollout's units, but not in the KL term (APR); "token_sum": the mean over
        rollouts of their token sums, divided by `token_budget` (Dr. GRPO).
      token_budget: token_sum divides by it, often the most tokens that a rollout may have. Clipping
        of gradients sees it, Adam does not.
      kl_coefficient: weight of the KL term that holds the policy near the reference; 0 needs no
        reference pass.
      kl_estimate: of KL(pi, reference) from one sampled token, with d = log pi - log reference:
        "k1" is d, whose gradient is zero on average; "k2" is d^2 / 2; "k3" is exp(-d) + d - 1.
      reference: what the KL term compares with.
      entropy_coefficient: weight of the bonus on the entropy of what the policy predicts.
      importance_cap: weighs each token's policy term by min(pi_old / pi_sampler, cap), where engine
        and trainer differ (truncated importance sampling); null does not.
      drop_malformed: leaves out rollouts whose blocks do not parse, before advantages are computed:
        as if they had never been sampled. A group that one rollout or none is left of teaches
        nothing.
      drop_zero_variance: leaves out groups whose rollouts all have the same reward (DAPO's dynamic
        sampling).
      positive_only: leaves out rollouts whose advantage is not positive.
      min_abs_advantage: leaves out rollouts whose advantage is smaller than this.
    """

    normalizer: Normalizer = "none"
    ratio: Ratio = "on_policy"
    ratio_level: RatioLevel = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregation: Aggregation = "token_mean"
    token_budget: int = 1
    kl_coefficient: float = 0.0
    kl_estimate: KLEstimate = "k3"
    reference: ReferenceConfig = ReferenceConfig()
    entropy_coefficient: float = 0.0
    importance_cap: float | None = None
    drop_malformed: bool = False
    drop_zero_variance: bool = False
    positive_only: bool = False
    min_abs_advantage: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(self, clip_low=0, clip_high=0, token_budget=1)
        require_at_least(self, kl_coefficient=0, min_abs_advantage=0)
        if self.clip_low > 1:
            raise ValueError(f"clip_low={self.clip_low}: a ratio is never below 0; at most 1")
        if self.dual_clip is not None:
            if self.ratio != "ppo_clip":
                raise ValueError(f"dual_clip={self.dual_clip} needs ratio=ppo_clip")
            if self.dual_clip <= 1:
                raise ValueError(f"dual_clip={self.dual_clip}: must be above 1")
        if self.ratio_level == "sequence" and self.ratio == "on_policy":
            raise ValueError("ratio_level=sequence needs ratio=ppo_clip or detached")
        if self.importance_cap is not None and self.importance_cap <= 0:
            raise ValueError(f"importance_cap={self.importance_cap}: must be positive")
        if self.token_budget > 1 and self.aggregation != "token_sum":
            raise ValueError(f"token_budget={self.token_budget} needs aggregation=token_sum")
        if self.reference.moves and not self.kl_coefficient:
            raise ValueError(f"reference.kind={self.reference.kind} needs a kl_coefficient")
