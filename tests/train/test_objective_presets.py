"""Every preset against numbers worked out by hand from its paper's equation.

Two prompts with two rollouts each. In brackets the tokens of each unit, as ratios pi / pi_old:

    rollout 0, reward 1: [1.5, 1.1], [0.5]        rollout 2, reward 1: [1]
    rollout 1, reward 0: [0.5, 1.5]               rollout 3, reward 1: [1.2, 1]

The reference agrees with the policy everywhere but at the third and the seventh token, where it
gives half the policy's probability: k3 = 1/2 + ln 2 - 1, with the slope 1 - 1/2.

Advantages of rollouts 0 and 1: +-1/2 centred, +-1 over the group's deviation, +-2/sqrt(3) over the
batch's; of rollouts 2 and 3: 0.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax.data.packed_batch import PackedBatch
from tw_jax.train.advantages import group_advantages, kept_rollouts, usable_rollouts
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.objective_presets import PRESETS
from tw_jax.train.policy_sum import objective_sums
from tw_jax.train.scoring import Scores
from tw_jax.train.token_weights import token_weights

UNITS = ([2, 1], [2], [1], [2])
ROLLOUT = np.array([0, 0, 0, 1, 1, 2, 3, 3])
RATIO = np.array([1.5, 1.1, 0.5, 0.5, 1.5, 1.0, 1.2, 1.0])
REWARDS = np.array([[1.0, 0.0], [1.0, 1.0]])
ALL_VALID = np.ones((2, 2), bool)
LOGPROB = -np.arange(1, 9) / 4
ABOVE_REFERENCE = np.where(np.isin(np.arange(8), (2, 6)), np.log(2), 0.0)
K3 = np.log(2) - 0.5

S0, S1 = 0.825 ** (1 / 3), 0.75**0.5  # geometric means of the ratios of rollouts 0 and 1

# preset: loss, and its slope in each token's log-probability.
EXPECTED = {
    # -sum A / tokens
    "pgrpo": (-(3 / 2 - 2 / 2) / 8, np.array([-1, -1, -1, 1, 1, 0, 0, 0]) / 2 / 8),
    # the same with A = +-2/sqrt(3)
    "papo": (-2 / 3**0.5 / 8, np.array([-1, -1, -1, 1, 1, 0, 0, 0]) * 2 / 3**0.5 / 8),
    # mean over 4 rollouts of token means of -min(rA, clip(r)A) + 0.04 k3
    "grpo": (
        -((1.2 + 1.1 + 0.5) / 3 - (0.8 + 1.5) / 2) / 4 + 0.04 * (K3 / 3 + K3 / 2) / 4,
        np.array([0, -1.1 / 3, -0.5 / 3 + 0.02 / 3, 0, 1.5 / 2, 0, 0.02 / 2, 0]) / 4,
    ),
    # mean over 4 rollouts of token sums
    "dr_grpo": (
        -((1.2 + 1.1 + 0.5) / 2 - (0.8 + 1.5) / 2) / 4,
        np.array([0, -1.1, -0.5, 0, 1.5, 0, 0, 0]) / 2 / 4,
    ),
    # the second group has no variance: 5 tokens are left; the roof is 1.28
    "dapo": (
        -((1.28 + 1.1 + 0.5) - (0.8 + 1.5)) / 5,
        np.array([0, -1.1, -0.5, 0, 1.5, 0, 0, 0]) / 5,
    ),
    # the same without dynamic sampling
    "parallel_r1": (
        -((1.28 + 1.1 + 0.5) - (0.8 + 1.5)) / 8,
        np.array([0, -1.1, -0.5, 0, 1.5, 0, 0, 0]) / 8,
    ),
    # mean over 4 rollouts of -min(sA, clip(s)A): rollout 0 is not clipped, rollout 1 is
    "gspo": (
        -(S0 - (1 - 3e-4)) / 4,
        np.array([-S0 / 3, -S0 / 3, -S0 / 3, 0, 0, 0, 0, 0]) / 4,
    ),
    # (1 / 5 calls) sum over calls of (1 / calls of the rollout) mean_t(...) + 0.001 mean_t k3
    "apr_grpo": (
        -((1.2 + 1.1) / 2 / 2 + 0.5 / 2 - (0.8 + 1.5) / 2) / 5 + 0.001 * (K3 + K3 / 2) / 5,
        np.array([0, -1.1 / 4, -0.5 / 2 + 5e-4, 0, 1.5 / 2, 0, 2.5e-4, 0]) / 5,
    ),
}


def batch_of(objective: ObjectiveConfig, format_valid=ALL_VALID) -> PackedBatch:
    """The tokens in one row; rollouts that the objective leaves out weigh nothing."""
    usable = usable_rollouts(objective, format_valid)
    advantages = group_advantages(REWARDS, objective.normalizer, usable)
    kept = kept_rollouts(objective, REWARDS, advantages, usable).reshape(-1)[ROLLOUT]
    weights = np.array(
        [
            weight
            for lengths in UNITS
            for n, weight in zip(lengths, token_weights(lengths, objective), strict=True)
            for _ in range(n)
        ]
    )
    weights = (weights * kept[:, None]).astype(np.float32)

    def row(values) -> np.ndarray:
        return np.asarray(values)[None].astype(np.float32)

    nothing = np.zeros((1, 8), np.int32)
    return PackedBatch(
        *[nothing] * 6,
        loss_weight=row(weights[:, 0]),
        kl_weight=row(weights[:, 1]),
        denominator=row(weights[:, 2]),
        advantage=row(advantages.reshape(-1)[ROLLOUT]),
        old_logprob=row(LOGPROB - np.log(RATIO)),
        sampler_logprob=row(LOGPROB),
        reference_logprob=row(LOGPROB - ABOVE_REFERENCE),
        rollout_id=np.where(kept, ROLLOUT, -1)[None].astype(np.int32),
    )


def loss_and_slopes(objective: ObjectiveConfig, batch: PackedBatch, entropy=None):
    def loss(logprobs):
        scores = Scores(logprobs, jnp.zeros(()), entropy)
        summed, sums = objective_sums(objective, scores, batch, 4)
        return summed, sums

    logprobs = jnp.asarray(LOGPROB, jnp.float32)[None]
    (summed, sums), slopes = jax.value_and_grad(loss, has_aux=True)(logprobs)
    weight = float(sums["weight"])
    return float(summed) / weight, slopes[0] / weight, sums


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_its_papers_equation(name):
    objective = PRESETS[name]
    loss, slopes, _ = loss_and_slopes(objective, batch_of(objective))
    expected_loss, expected_slopes = EXPECTED[name]
    assert loss == pytest.approx(expected_loss, rel=2e-5)
    np.testing.assert_allclose(slopes, expected_slopes, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", PRESETS)
def test_only_papo_drops_malformed_rollouts(name):
    """Rollout 3 is malformed: 6 tokens are left, and the batch's deviation is sqrt(2)/3.

    The rewards left are 1, 0 and 1; the advantages of rollouts 0 and 1 are +-(1/2) / (sqrt(2)/3).
    """
    objective = PRESETS[name]
    batch = batch_of(objective, np.array([[True, True], [True, False]]))
    if name != "papo":
        jax.tree.map(np.testing.assert_array_equal, batch, batch_of(objective))
        return
    a = 3 / 2 / 2**0.5
    loss, slopes, sums = loss_and_slopes(objective, batch)
    assert float(sums["tokens"]) == 6
    assert loss == pytest.approx(-(3 * a - 2 * a) / 6, rel=2e-5)
    expected = np.array([-1, -1, -1, 1, 1, 0, 0, 0]) * a / 6
    np.testing.assert_allclose(slopes, expected, rtol=2e-5, atol=1e-7)


def test_a_token_budget_scales_the_sum():
    objective = dataclasses.replace(PRESETS["dr_grpo"], token_budget=100)
    loss, slopes, _ = loss_and_slopes(objective, batch_of(objective))
    assert loss == pytest.approx(EXPECTED["dr_grpo"][0] / 100, rel=2e-5)
    np.testing.assert_allclose(slopes, EXPECTED["dr_grpo"][1] / 100, rtol=2e-5, atol=1e-9)


def test_entropy_bonus_and_importance_weights():
    """Loss = -(1/8) sum_t (w_t A + 0.1 H_t), w = min(pi_old / pi_sampler, 2)."""
    objective = ObjectiveConfig(entropy_coefficient=0.1, importance_cap=2.0)
    batch = batch_of(objective)
    mismatch = np.array([0.5, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    batch = dataclasses.replace(
        batch, sampler_logprob=(LOGPROB - np.log(mismatch))[None].astype(np.float32)
    )
    entropy = jnp.arange(8, dtype=jnp.float32)[None]
    loss, slopes, sums = loss_and_slopes(objective, batch, entropy)
    assert loss == pytest.approx(-((0.5 + 1 + 2) / 2 - 2 / 2 + 0.1 * 28) / 8, rel=1e-5)
    np.testing.assert_allclose(slopes[:5], np.array([-0.5, -1, -2, 1, 1]) / 2 / 8, rtol=1e-5)
    assert float(sums["importance_weight"]) == pytest.approx(0.5 + 1 + 2 + 5, rel=1e-5)
    assert float(sums["importance_capped"]) == 1


def test_what_an_objective_needs_must_be_there():
    for objective, field in (
        (PRESETS["grpo"], "reference_logprob"),
        (PRESETS["dapo"], "old_logprob"),
    ):
        batch = dataclasses.replace(batch_of(objective), **{field: None})
        with pytest.raises(ValueError, match="log-probabilities"):
            loss_and_slopes(objective, batch)
    with pytest.raises(ValueError, match="entropies"):
        objective = ObjectiveConfig(entropy_coefficient=0.1)
        loss_and_slopes(objective, batch_of(objective))


def test_sums_that_are_logged():
    objective = PRESETS["grpo"]
    batch = batch_of(objective)
    apart = np.array([0.25, 0, 0, -0.5, 0, 0, 0, 0])
    batch = dataclasses.replace(
        batch,
        sampler_logprob=(LOGPROB - apart)[None].astype(np.float32),
        start_logprob=batch.reference_logprob,
        region=np.array([[0, 0, 1, 2, 2, 3, 3, 3]], np.int32),
    )
    entropy = jnp.arange(8, dtype=jnp.float32)[None]
    _, _, sums = loss_and_slopes(objective, batch, entropy)
    sums = {name: float(value) for name, value in sums.items()}
    assert sums["tokens"] == 8
    assert sums["nll"] == pytest.approx(9)
    assert sums["logprob_abs_diff"] == pytest.approx(0.75)
    assert sums["max_logprob_abs_diff"] == pytest.approx(0.5)
    assert sums["kl_start"] == sums["kl_reference"] == pytest.approx(2 * K3, rel=1e-5)
    assert (sums["clipped_low"], sums["clipped_high"], sums["clipped_tokens"]) == (1, 1, 2)
    inverse = 1 / RATIO
    assert sums["kl_old"] == pytest.approx(np.sum(inverse - np.log(inverse) - 1), rel=1e-5)
    for kind, total, count in (
        ("sequential", 1, 2),
        ("outline", 2, 1),
        ("thread", 7, 2),
        ("tags", 18, 3),
    ):
        assert (sums[f"entropy/{kind}"], sums[f"tokens/{kind}"]) == (total, count)
    sampler = LOGPROB - apart
    product = sums["logprob_product"] / 8 - np.mean(LOGPROB) * np.mean(sampler)
    spread = np.std(LOGPROB) * np.std(sampler)
    assert product / spread == pytest.approx(np.corrcoef(LOGPROB, sampler)[0, 1], rel=1e-5)
    assert sums["logprob_sq"] == pytest.approx(np.sum(LOGPROB**2), rel=1e-5)
    assert sums["sampler_logprob_sq"] == pytest.approx(np.sum(sampler**2), rel=1e-5)
