"""The published objectives by name.

| name | of | differs from P-GRPO in |
|---|---|---|
| pgrpo | ThreadWeaver, arXiv 2512.07843, eq. 4 | |
| grpo | DeepSeekMath, 2402.03300, eq. 3 | group std, clipped ratio, mean of sequence means, k3 KL |
| dr_grpo | Dr. GRPO, 2503.20783 | clipped ratio, sum over a rollout's tokens |
| dapo | DAPO, 2503.14476, eq. 8 | group std, clipped ratio with a higher roof, dynamic sampling |
| gspo | GSPO, 2507.18071, eq. 5 | group std, clipped ratio of whole sequences, sequence means |
| papo | NPR, 2512.07461 | malformed rollouts dropped, batch std |
| apr_grpo | APR, 2504.15466 | group std, clipped ratio, means of calls over calls, k3 KL |
| parallel_r1 | Parallel-R1, 2509.07980, stage 2 | group std, clipped ratio with a higher roof |

Rewards are not part of an objective: DAPO's overlong shaping, for one, is a term of the reward. Nor
are updates: APR makes two passes over a step's rollouts (`passes_per_step=2`).
"""

from typing import Literal, get_args

from tw_jax.errors import UserError
from tw_jax.train.objective import ObjectiveConfig

ObjectiveName = Literal[
    "pgrpo", "grpo", "dr_grpo", "dapo", "gspo", "papo", "apr_grpo", "parallel_r1"
]

PRESETS: dict[ObjectiveName, ObjectiveConfig] = {
    "pgrpo": ObjectiveConfig(),
    "grpo": ObjectiveConfig(
        normalizer="group_std",
        ratio="ppo_clip",
        aggregation="sequence_mean",
        kl_coefficient=0.04,
    ),
    "dr_grpo": ObjectiveConfig(ratio="ppo_clip", aggregation="token_sum"),
    "dapo": ObjectiveConfig(
        normalizer="group_std", ratio="ppo_clip", clip_high=0.28, drop_zero_variance=True
    ),
    "gspo": ObjectiveConfig(
        normalizer="group_std",
        ratio="ppo_clip",
        ratio_level="sequence",
        clip_low=3e-4,
        clip_high=4e-4,
        aggregation="sequence_mean",
    ),
    "papo": ObjectiveConfig(normalizer="batch_std", drop_malformed=True),
    "apr_grpo": ObjectiveConfig(
        normalizer="group_std",
        ratio="ppo_clip",
        aggregation="rollout_mean",
        kl_coefficient=0.001,
    ),
    "parallel_r1": ObjectiveConfig(normalizer="group_std", ratio="ppo_clip", clip_high=0.28),
}
assert set(PRESETS) == set(get_args(ObjectiveName))


def objective_preset(name: str) -> ObjectiveConfig:
    """The named objective.

    Raises:
      UserError: no such preset.
    """
    for known, objective in PRESETS.items():
        if name == known:
            return objective
    raise UserError(f"unknown objective {name!r}; known: {', '.join(PRESETS)}")
