"""Advantages, token weights and losses against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax.errors import UserError
from tw_jax.train.objective import (
    PRESETS,
    ObjectiveConfig,
    group_advantages,
    objective_preset,
    policy_loss,
    token_weights,
)

REWARDS = np.array([[1.0, 0.0, 1.2, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.1, 1.2, 1.1]])


def test_pgrpo_advantage_is_centred_and_keeps_its_scale():
    advantages = group_advantages(REWARDS, "none")
    np.testing.assert_allclose(advantages[0], [0.2, -0.8, 0.4, 0.2], atol=1e-6)
    np.testing.assert_allclose(advantages[1], 0)
    # All correct: only the acceleration bonus varies, and its scale rho survives.
    np.testing.assert_allclose(advantages[2], [-0.1, 0.0, 0.1, 0.0], atol=1e-6)


def test_standard_deviations():
    by_group = group_advantages(REWARDS, "group_std")
    np.testing.assert_allclose(by_group[2], np.array([-0.1, 0, 0.1, 0]) / np.sqrt(0.005), rtol=1e-5)
    np.testing.assert_allclose(by_group[1], 0)
    by_batch = group_advantages(REWARDS, "batch_std")
    np.testing.assert_allclose(by_batch[2], np.array([-0.1, 0, 0.1, 0]) / REWARDS.std(), rtol=1e-5)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1.0, 1.0, 1.0]),
        ("sequence_mean", [1 / 6, 1 / 6, 1 / 6]),
        ("rollout_mean", [1 / 4, 0.0, 1 / 8]),
    ],
)
def test_token_weights_of_a_rollout_with_units_of_2_0_and_4_tokens(aggregation, expected):
    assert token_weights([2, 0, 4], aggregation) == pytest.approx(expected)


def loss_and_slope(config, logprob, old, advantage, reference=None):
    value, slope = jax.value_and_grad(
        lambda lp: policy_loss(config, lp, jnp.float32(old), jnp.float32(advantage), reference)
    )(jnp.float32(logprob))
    return float(value), float(slope)


def test_on_policy_is_reinforce():
    assert loss_and_slope(ObjectiveConfig(), -2.0, -5.0, 0.3) == pytest.approx((-0.3, -0.3))


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.5, 1.0, -1.28, 0.0),  # clipped from above: no gradient
        (1.5, -1.0, 1.5, 1.5),  # pessimistic branch keeps the gradient
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_ppo_clip(ratio, advantage, value, slope):
    config = ObjectiveConfig(ratio="ppo_clip", clip_low=0.2, clip_high=0.28)
    got = loss_and_slope(config, float(np.log(ratio)), 0.0, advantage)
    assert got == pytest.approx((value, slope), abs=1e-5)


def test_detached_ratio_weighs_the_gradient_only():
    config = ObjectiveConfig(ratio="detached")
    value, slope = loss_and_slope(config, -1.0, -1.5, 2.0)
    assert value == pytest.approx(2 * np.exp(0.5), rel=1e-5)
    assert slope == pytest.approx(-2 * np.exp(0.5), rel=1e-5)


def test_kl_is_the_k3_estimate():
    config = ObjectiveConfig(kl_coefficient=0.1)
    value, slope = loss_and_slope(config, -1.0, 0.0, 0.0, jnp.float32(-1.5))
    assert value == pytest.approx(0.1 * (np.exp(-0.5) + 0.5 - 1), rel=1e-5)
    assert slope == pytest.approx(0.1 * (1 - np.exp(-0.5)), rel=1e-5)
    with pytest.raises(ValueError, match="reference"):
        loss_and_slope(config, -1.0, 0.0, 0.0)


def test_presets_by_name():
    assert objective_preset("pgrpo") == ObjectiveConfig()
    assert set(PRESETS) == {"pgrpo", "grpo", "dapo", "dr_grpo", "papo", "apr_grpo"}
    with pytest.raises(UserError, match="pgrpo"):
        objective_preset("ppo")
