"""RL: the weighted sum of an objective's terms over a batch, and what is logged about it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float32

from tw_jax.data.packed_batch import PackedBatch
from tw_jax.models.qwen3 import Params
from tw_jax.parallel.layout import Layout
from tw_jax.train import policy_terms as terms
from tw_jax.train.lm_head import EntropyUse
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.scoring import Scores
from tw_jax.train.update import MemoryConfig, SumLoss, scorer
from tw_jax.train.update_sums import token_sums


def policy_sum(
    graphdef: nnx.GraphDef,
    objective: ObjectiveConfig,
    memory: MemoryConfig,
    layout: Layout | None = None,
    *,
    rollouts: int | None = None,
    measure_entropy: bool = False,
) -> SumLoss:
    """The loss of RL (see `SumLoss`), with the sums of `update_sums`.

    Args:
      graphdef: static half of the model.
      objective: what is minimised.
      memory: how the model runs.
      layout: how batch and activations lie on a mesh; None on one device.
      rollouts: above every `rollout_id`; needed by ratios of whole sequences alone, whose rollouts
        must each lie within one batch.
      measure_entropy: the policy's entropy is logged even where the objective has no use for it.

    Raises:
      ValueError: the objective needs `rollouts`.
    """
    if objective.ratio_level == "sequence" and rollouts is None:
        raise ValueError("ratio_level=sequence needs the number of rollouts")
    entropy_use: EntropyUse = "none"
    if objective.entropy_coefficient:
        entropy_use = "gradient"
    elif measure_entropy:
        entropy_use = "value"
    score = scorer(graphdef, memory, layout, entropy_use)

    def loss(params: Params, batch: PackedBatch):
        scores = score(params, batch)
        summed, sums = objective_sums(objective, scores, batch, rollouts)
        summed += sums["weight"] * scores.router_loss
        return summed, sums | {"loss": summed}

    return loss


def objective_sums(
    objective: ObjectiveConfig, scores: Scores, batch: PackedBatch, rollouts: int | None
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """The objective's sum over a batch that the policy has scored, and the sums to log.

    Args:
      objective: what is minimised.
      scores: of the policy.
      batch: what was scored.
      rollouts: see `policy_sum`.

    Returns:
      The sum of all terms, to be divided by the sum "weight" over the global batch; and the sums.

    Raises:
      ValueError: the batch lacks log-probabilities that the objective needs.
    """
    logprob = scores.logprobs
    sampled = batch.loss_weight > 0

    def total(weight: Array | None, values: Array) -> Float32[Array, ""]:
        weights: Array = batch.loss_weight if weight is None else weight
        return jnp.sum(jnp.where(sampled, weights * values, 0.0))

    old = _old_logprob(objective, logprob, batch)
    log_ratio = _log_ratio(objective, logprob, old, batch, sampled, rollouts)
    policy = terms.policy_term(objective, logprob, log_ratio, batch.advantage)
    per_token, importance = policy.loss, None
    if objective.importance_cap is not None:
        capped = terms.importance_weight(old, batch.sampler_logprob, objective.importance_cap)
        per_token, importance = capped * per_token, capped
    if objective.entropy_coefficient:
        if scores.entropy is None:
            raise ValueError("entropy_coefficient needs entropies")
        per_token = per_token - objective.entropy_coefficient * scores.entropy
    summed = total(None, per_token)
    if objective.kl_coefficient:
        if batch.reference_logprob is None:
            raise ValueError("kl_coefficient needs reference log-probabilities")
        kl = terms.kl_term(objective.kl_estimate, logprob, batch.reference_logprob)
        summed += objective.kl_coefficient * total(batch.kl_weight, kl)
    sums = {"weight": total(batch.denominator, jnp.ones_like(logprob)), "loss": summed}
    return summed, sums | token_sums(objective, scores, policy, importance, old, batch)


def _old_logprob(
    objective: ObjectiveConfig, logprob: Float32[Array, "rows row_len"], batch: PackedBatch
) -> Float32[Array, "rows row_len"]:
    if objective.ratio == "on_policy":
        return jax.lax.stop_gradient(logprob)
    if batch.old_logprob is None:
        raise ValueError(f"ratio={objective.ratio} needs log-probabilities of the old policy")
    return batch.old_logprob


def _log_ratio(
    objective: ObjectiveConfig,
    logprob: Float32[Array, "rows row_len"],
    old: Float32[Array, "rows row_len"],
    batch: PackedBatch,
    sampled: Bool[Array, "rows row_len"],
    rollouts: int | None,
) -> Float32[Array, "rows row_len"]:
    log_ratio = jnp.where(sampled, logprob - old, 0.0)
    if objective.ratio_level == "token" or rollouts is None:
        return log_ratio
    ids = jnp.where(sampled, batch.rollout_id, -1)
    return terms.sequence_log_ratio(logprob, log_ratio, ids, rollouts)
