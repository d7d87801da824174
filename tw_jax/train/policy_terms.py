"""The terms of a policy-gradient objective, token by token.

Everything here is elementwise, but for `mean_per_rollout`. Aggregation is done by
`policy_sum`, with the weights that `token_weights` gives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from tw_jax.train.objective import KLEstimate, ObjectiveConfig


class PolicyTerm(NamedTuple):
    """The policy loss of each token, and where something bounded it.

    Attributes:
      loss: what is minimised, before weighting.
      clipped_low: the ratio fell below its range under a negative advantage: no gradient.
      clipped_high: the ratio rose above its range under a positive advantage: no gradient.
      clipped_dual: the dual clip bounds the loss of a negative advantage: no gradient.
    """

    loss: Float[Array, "*b"]
    clipped_low: Bool[Array, "*b"]
    clipped_high: Bool[Array, "*b"]
    clipped_dual: Bool[Array, "*b"]


def policy_term(
    config: ObjectiveConfig,
    logprob: Float[Array, "*b"],
    log_ratio: Float[Array, "*b"],
    advantage: Float[Array, "*b"],
) -> PolicyTerm:
    """Loss of each token's ratio and advantage.

    Args:
      config: the objective.
      logprob: under the policy that is trained.
      log_ratio: log pi / pi_old of the token, or `sequence_log_ratio`; unused by "on_policy".
      advantage: of the token's rollout.
    """
    nowhere = jnp.zeros(jnp.shape(logprob), bool)
    if config.ratio == "on_policy":
        # exp(lp - stop_gradient(lp)) is 1 with gradient d lp: the value reads as a surrogate.
        loss = -advantage * jnp.exp(logprob - jax.lax.stop_gradient(logprob))
        return PolicyTerm(loss, nowhere, nowhere, nowhere)
    ratio = jnp.exp(log_ratio)
    if config.ratio == "detached":
        loss = -jax.lax.stop_gradient(ratio) * advantage * logprob
        return PolicyTerm(loss, nowhere, nowhere, nowhere)
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    loss = -jnp.minimum(ratio * advantage, clipped * advantage)
    low = (ratio < 1 - config.clip_low) & (advantage < 0)
    high = (ratio > 1 + config.clip_high) & (advantage > 0)
    dual = nowhere
    if config.dual_clip is not None:
        roof = -config.dual_clip * advantage
        dual = (advantage < 0) & (loss > roof)
        loss = jnp.where(advantage < 0, jnp.minimum(loss, roof), loss)
    return PolicyTerm(loss, low, high, dual)


def sequence_log_ratio(
    logprob: Float[Array, "rows row_len"],
    log_ratio: Float[Array, "rows row_len"],
    rollout_id: Int32[Array, "rows row_len"],
    rollouts: int,
) -> Float[Array, "rows row_len"]:
    """The rollout's mean log-ratio at each of its tokens (GSPO, arXiv 2507.18071, eq. 7).

    The gradient of each is that of the token's own log-probability (eq. 14 there): averaged over a
    rollout's tokens, whose advantage is the same, that is the gradient of the sequence's ratio, and
    no gradient has to pass through the sum over its tokens.

    Args:
      logprob: under the policy that is trained.
      log_ratio: of each token.
      rollout_id: -1 for tokens that do not count. All tokens of a rollout must be here.
      rollouts: above every `rollout_id`.
    """
    mean = mean_per_rollout(jax.lax.stop_gradient(log_ratio), rollout_id, rollouts)
    return mean + logprob - jax.lax.stop_gradient(logprob)


def mean_per_rollout(
    values: Float[Array, "*b"], rollout_id: Int32[Array, "*b"], rollouts: int
) -> Float[Array, "*b"]:
    """At each token the mean over its rollout's tokens; 0 where `rollout_id` is -1."""
    place = jnp.where(rollout_id < 0, rollouts, rollout_id)  # out of range: dropped
    counted = jnp.ones_like(values)
    total, count = (
        jnp.zeros(rollouts, values.dtype).at[place].add(x, mode="drop") for x in (values, counted)
    )
    mean = total / jnp.maximum(count, 1)
    return mean.at[place].get(mode="fill", fill_value=0)


def kl_term(
    estimate: KLEstimate, logprob: Float[Array, "*b"], reference_logprob: Float[Array, "*b"]
) -> Float[Array, "*b"]:
    """An estimate of KL(policy, reference) at each sampled token; see `ObjectiveConfig`."""
    apart = logprob - reference_logprob
    if estimate == "k1":
        return apart
    if estimate == "k2":
        return apart**2 / 2
    return jnp.exp(-apart) + apart - 1


def importance_weight(
    old_logprob: Float32[Array, "*b"], sampler_logprob: Float32[Array, "*b"], cap: float
) -> Float32[Array, "*b"]:
    """`min(pi_old / pi_sampler, cap)`, without a gradient (truncated importance sampling)."""
    log_weight = jax.lax.stop_gradient(old_logprob - sampler_logprob)
    return jnp.exp(jnp.minimum(log_weight, jnp.log(cap)))
