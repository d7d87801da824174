"""From rewards to advantages, and which rollouts an update takes."""

import numpy as np
from jaxtyping import Bool, Float, Float32

from tw_jax.train.objective import Normalizer, ObjectiveConfig


def usable_rollouts(
    objective: ObjectiveConfig, format_valid: Bool[np.ndarray, "groups rollouts"]
) -> Bool[np.ndarray, "groups rollouts"]:
    """Which rollouts count as sampled at all: not the malformed ones, if those are dropped."""
    return format_valid if objective.drop_malformed else np.ones_like(format_valid)


def group_advantages(
    rewards: Float[np.ndarray, "groups rollouts"],
    normalizer: Normalizer,
    usable: Bool[np.ndarray, "groups rollouts"] | None = None,
) -> Float32[np.ndarray, "groups rollouts"]:
    """`(r - mean(group))`, divided as the normaliser says; one vote per rollout.

    Groups without variance get zeros under every normaliser.

    Args:
      rewards: of all rollouts.
      normalizer: what is divided by.
      usable: the others are as if they had never been sampled: they are in no mean and in no
        deviation, and get zeros; None takes all.
    """
    rewards = np.asarray(rewards, np.float64)
    usable = np.ones(rewards.shape, bool) if usable is None else usable
    # The mean of equal numbers may differ from them in the last bit, which a division by their
    # equally small deviation would blow up. A sole survivor is its own mean and gets 0 here; NPR's
    # code takes 0 for its mean, so that it would be pushed by R / std for no comparison at all.
    centred = np.where(
        usable & varies(rewards, usable)[:, None], rewards - _means(rewards, usable), 0.0
    )
    if normalizer == "group_std":
        std = np.sqrt(_means(centred**2, usable))
    elif normalizer == "batch_std":
        std = rewards[usable].std() if usable.any() else np.zeros(())
    else:
        std = np.ones(())
    scaled = np.divide(
        centred, std, out=np.zeros_like(centred), where=np.broadcast_to(std > 0, centred.shape)
    )
    return scaled.astype(np.float32)


def _means(
    values: Float[np.ndarray, "groups rollouts"], usable: Bool[np.ndarray, "groups rollouts"]
) -> Float[np.ndarray, "groups 1"]:
    """Mean of every group's usable values; 0 where there is none."""
    counts = np.maximum(usable.sum(axis=1, keepdims=True), 1)
    return values.sum(axis=1, keepdims=True, where=usable) / counts


def varies(
    rewards: Float[np.ndarray, "groups rollouts"],
    usable: Bool[np.ndarray, "groups rollouts"] | None = None,
) -> Bool[np.ndarray, " groups"]:
    """Which groups hold different rewards, among usable rollouts: the others teach nothing."""
    where = True if usable is None else usable
    highest = np.max(rewards, axis=1, where=where, initial=-np.inf)
    return highest > np.min(rewards, axis=1, where=where, initial=np.inf)


def kept_rollouts(
    objective: ObjectiveConfig,
    rewards: Float[np.ndarray, "groups rollouts"],
    advantages: Float[np.ndarray, "groups rollouts"],
    usable: Bool[np.ndarray, "groups rollouts"] | None = None,
) -> Bool[np.ndarray, "groups rollouts"]:
    """Which rollouts the update takes.

    The others are as if they had never been sampled: they count neither in the sum of losses nor in
    what it is divided by. Advantages are those of whole groups, or of what is usable of them.

    Args:
      objective: whose filters apply.
      rewards: of all rollouts.
      advantages: of all rollouts (`group_advantages`).
      usable: what advantages were computed over; None is all.
    """
    kept = np.abs(advantages) >= objective.min_abs_advantage
    if usable is not None:
        kept &= usable
    if objective.positive_only:
        kept &= advantages > 0
    if objective.drop_zero_variance:
        kept &= varies(rewards, usable)[:, None]
    return kept


def teaching_groups(
    advantages: Float[np.ndarray, "groups rollouts"], kept: Bool[np.ndarray, "groups rollouts"]
) -> Bool[np.ndarray, " groups"]:
    """Which groups move the policy: the update takes a rollout with an advantage from them."""
    return np.any(kept & (advantages != 0), axis=1)
