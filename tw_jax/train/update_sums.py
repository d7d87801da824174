"""Sums over the sampled tokens of an update that say how far it can be trusted.

They add up over rows, micro-batches, updates and devices; `rl_metrics` lists them and divides.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from tw_jax.data.packed_batch import PackedBatch
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.policy_terms import PolicyTerm, kl_term
from tw_jax.train.scoring import Scores
from tw_jax.train.token_regions import TokenRegion


def token_sums(
    objective: ObjectiveConfig,
    scores: Scores,
    policy: PolicyTerm,
    importance: Float32[Array, "rows row_len"] | None,
    old: Float32[Array, "rows row_len"],
    batch: PackedBatch,
) -> dict[str, Float32[Array, ""]]:
    """The sums of one batch, by the names of `rl_metrics`.

    Args:
      objective: decides what there is to measure.
      scores: of the policy.
      policy: its loss.
      importance: weights of engine mismatch, if any.
      old: log-probabilities under the policy that sampled.
      batch: what was scored.
    """
    sampled = batch.loss_weight > 0
    logprob, sampler = jax.lax.stop_gradient(scores.logprobs), batch.sampler_logprob

    def total(values: Array) -> Float32[Array, ""]:
        return jnp.sum(jnp.where(sampled, values, 0).astype(jnp.float32))

    apart = logprob - sampler
    sums = {
        "tokens": total(sampled),
        "nll": -total(logprob),
        "logprob_sq": total(logprob**2),
        "sampler_logprob": total(sampler),
        "sampler_logprob_sq": total(sampler**2),
        "logprob_product": total(logprob * sampler),
        "logprob_abs_diff": total(jnp.abs(apart)),
        "max_logprob_abs_diff": jnp.max(jnp.where(sampled, jnp.abs(apart), 0.0)),
    }
    if batch.start_logprob is not None:
        sums["kl_start"] = total(kl_term("k3", logprob, batch.start_logprob))
    if objective.kl_coefficient:
        sums["kl_reference"] = total(
            kl_term(objective.kl_estimate, logprob, batch.reference_logprob)
        )
    if objective.ratio != "on_policy":
        sums["kl_old"] = total(kl_term("k3", logprob, old))
    if objective.ratio == "ppo_clip":
        sums["clipped_low"] = total(policy.clipped_low)
        sums["clipped_high"] = total(policy.clipped_high)
        sums["clipped_dual"] = total(policy.clipped_dual)
        sums["clipped_tokens"] = sums["clipped_low"] + sums["clipped_high"] + sums["clipped_dual"]
    if importance is not None and objective.importance_cap is not None:
        sums["importance_weight"] = total(importance)
        sums["importance_capped"] = total(old - sampler >= jnp.log(objective.importance_cap))
    if scores.entropy is not None and batch.region is not None:
        entropy = jax.lax.stop_gradient(scores.entropy)
        for region in TokenRegion:
            there = batch.region == region
            sums[f"entropy/{region.name.lower()}"] = total(jnp.where(there, entropy, 0.0))
            sums[f"tokens/{region.name.lower()}"] = total(there)
    return sums
