"""Policy-gradient objectives as values of one config (DESIGN section 10).

P-GRPO (arXiv 2512.07843, eq. 4): `A = r - mean(group)`, broadcast to every sampled token of every
unit; loss `-sum_t A_t log pi_t / sum_t 1` over the whole batch, on-policy. The other published
objectives differ in how advantages are normalised, in the probability ratio, in how tokens are
averaged and in a KL term; nothing else.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from tw_jax.errors import UserError

Normalizer = Literal["none", "group_std", "batch_std"]
Ratio = Literal["on_policy", "ppo_clip", "detached"]
Aggregation = Literal["token_mean", "sequence_mean", "rollout_mean"]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """One policy-gradient objective.

    Attributes:
      normalizer: what group-centred rewards are divided by: nothing, the group's or the batch's
        standard deviation.
      ratio: "on_policy" differentiates log pi; "ppo_clip" clips pi / pi_old; "detached" weighs
        log pi by the detached ratio pi / pi_old.
      clip_low: ppo_clip keeps the ratio above 1 - clip_low where that is pessimistic.
      clip_high: ppo_clip keeps the ratio below 1 + clip_high likewise.
      aggregation: every token alike; the mean over rollouts of their token means; or the mean over
        rollouts of their units' token means (APR).
      kl_coefficient: weight of the k3 estimate of KL(pi, reference); 0 needs no reference pass.
    """

    normalizer: Normalizer = "none"
    ratio: Ratio = "on_policy"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: Aggregation = "token_mean"
    kl_coefficient: float = 0.0


PRESETS: dict[str, ObjectiveConfig] = {
    "pgrpo": ObjectiveConfig(),
    "grpo": ObjectiveConfig(
        "group_std", "ppo_clip", aggregation="sequence_mean", kl_coefficient=0.04
    ),
    "dr_grpo": ObjectiveConfig("none", "ppo_clip"),
    "dapo": ObjectiveConfig("group_std", "ppo_clip", clip_high=0.28),
    "papo": ObjectiveConfig("batch_std", "on_policy"),
    "apr_grpo": ObjectiveConfig(
        "group_std", "ppo_clip", aggregation="rollout_mean", kl_coefficient=0.001
    ),
}


def objective_preset(name: str) -> ObjectiveConfig:
    """The named objective.

    Raises:
      UserError: no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"unknown objective {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def group_advantages(
    rewards: Float[np.ndarray, "groups rollouts"], normalizer: Normalizer
) -> Float32[np.ndarray, "groups rollouts"]:
    """`(r - mean(group))`, divided as the normaliser says; one vote per rollout.

    Groups without variance get zeros under every normaliser.
    """
    centred = np.asarray(rewards, np.float64)
    centred = centred - centred.mean(axis=1, keepdims=True)
    if normalizer == "group_std":
        std = centred.std(axis=1, keepdims=True)
    elif normalizer == "batch_std":
        std = np.asarray(rewards, np.float64).std()
    else:
        std = np.ones(())
    scaled = np.divide(
        centred, std, out=np.zeros_like(centred), where=np.broadcast_to(std > 0, centred.shape)
    )
    return scaled.astype(np.float32)


def token_weights(unit_lens: Sequence[int], aggregation: Aggregation) -> list[float]:
    """Loss weight of each sampled token of a rollout, per unit.

    Dividing the weighted sum by the sum of all weights gives the aggregation over the batch.

    Args:
      unit_lens: sampled tokens of each unit of one rollout; empty units are allowed.
      aggregation: see `ObjectiveConfig`.
    """
    total = sum(unit_lens)
    non_empty = sum(n > 0 for n in unit_lens)
    if aggregation == "token_mean":
        return [1.0] * len(unit_lens)
    if aggregation == "sequence_mean":
        return [1.0 / max(total, 1)] * len(unit_lens)
    return [1.0 / (non_empty * n) if n else 0.0 for n in unit_lens]


def policy_loss(
    config: ObjectiveConfig,
    logprob: Float[Array, "*b"],
    old_logprob: Float[Array, "*b"],
    advantage: Float[Array, "*b"],
    reference_logprob: Float[Array, "*b"] | None = None,
) -> Float[Array, "*b"]:
    """Loss of each token before weighting.

    Args:
      config: the objective.
      logprob: under the policy being trained.
      old_logprob: under the policy that starts the update; unused by "on_policy".
      advantage: of the token's rollout.
      reference_logprob: under the frozen reference; needed where `kl_coefficient` is not 0.
    """
    if config.ratio == "on_policy":
        # exp(lp - stop_gradient(lp)) is 1 with gradient d lp: the value reads as a surrogate.
        loss = -advantage * jnp.exp(logprob - jax.lax.stop_gradient(logprob))
    else:
        ratio = jnp.exp(logprob - old_logprob)
        if config.ratio == "ppo_clip":
            clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
            loss = -jnp.minimum(ratio * advantage, clipped * advantage)
        else:
            loss = -jax.lax.stop_gradient(ratio) * advantage * logprob
    if config.kl_coefficient:
        if reference_logprob is None:
            raise ValueError("kl_coefficient needs reference log-probabilities")
        difference = reference_logprob - logprob
        loss = loss + config.kl_coefficient * (jnp.exp(difference) - difference - 1)
    return loss
