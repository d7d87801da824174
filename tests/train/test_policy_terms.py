"""The terms of an objective on single tokens, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax.train import policy_terms as terms
from tw_jax.train.objective import ObjectiveConfig


def loss_and_slope(config, logprob, old, advantage):
    value, slope = jax.value_and_grad(
        lambda lp: terms.policy_term(config, lp, lp - old, jnp.float32(advantage)).loss
    )(jnp.float32(logprob))
    return float(value), float(slope)


def test_on_policy_is_reinforce():
    assert loss_and_slope(ObjectiveConfig(), -2.0, -5.0, 0.3) == pytest.approx((-0.3, -0.3))


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope", "clipped"),
    [
        (1.5, 1.0, -1.28, 0.0, "high"),  # clipped from above: no gradient
        (1.5, -1.0, 1.5, 1.5, None),  # pessimistic branch keeps the gradient
        (0.5, 1.0, -0.5, -0.5, None),
        (0.5, -1.0, 0.8, 0.0, "low"),
        (1.1, 2.0, -2.2, -2.2, None),
        (1.5, 0.0, 0.0, 0.0, None),
        (4.0, -1.0, 3.0, 0.0, "dual"),
        (4.0, 1.0, -1.28, 0.0, "high"),
    ],
)
def test_ppo_clip(ratio, advantage, value, slope, clipped):
    config = ObjectiveConfig(ratio="ppo_clip", clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    got = loss_and_slope(config, float(np.log(ratio)), 0.0, advantage)
    assert got == pytest.approx((value, slope), abs=1e-5)
    log_ratio = jnp.log(jnp.float32(ratio))
    term = terms.policy_term(config, log_ratio, log_ratio, jnp.float32(advantage))
    found = {name for name in ("low", "high", "dual") if getattr(term, f"clipped_{name}")}
    assert found == ({clipped} if clipped else set())


def test_without_a_dual_clip_a_negative_advantage_is_not_bounded():
    config = ObjectiveConfig(ratio="ppo_clip")
    assert loss_and_slope(config, float(np.log(4)), 0.0, -1.0) == pytest.approx((4, 4), rel=1e-5)


def test_detached_ratio_weighs_the_gradient_only():
    config = ObjectiveConfig(ratio="detached")
    value, slope = loss_and_slope(config, -1.0, -1.5, 2.0)
    assert value == pytest.approx(2 * np.exp(0.5), rel=1e-5)
    assert slope == pytest.approx(-2 * np.exp(0.5), rel=1e-5)


@pytest.mark.parametrize(
    ("estimate", "value", "slope"),
    [
        ("k1", 0.5, 1.0),
        ("k2", 0.125, 0.5),
        ("k3", np.exp(-0.5) + 0.5 - 1, 1 - np.exp(-0.5)),
    ],
)
def test_kl_estimates(estimate, value, slope):
    got = jax.value_and_grad(lambda lp: terms.kl_term(estimate, lp, jnp.float32(-1.5)))(-1.0)
    assert got == (pytest.approx(value, rel=1e-5), pytest.approx(slope, rel=1e-5))


def test_kl_estimates_agree_on_average():
    """k1 and k3 are unbiased: over all tokens, weighed by the policy, they give the KL."""
    rng = np.random.default_rng(0)
    policy, reference = np.log(rng.dirichlet(np.ones(9), 2)).astype(np.float32)
    exact = np.sum(np.exp(policy) * (policy - reference))
    for estimate in ("k1", "k3"):
        mean = jnp.sum(jnp.exp(policy) * terms.kl_term(estimate, policy, reference))
        assert float(mean) == pytest.approx(exact, rel=1e-5)


def test_importance_weights_are_truncated_and_carry_no_gradient():
    def weight(old):
        return terms.importance_weight(old, jnp.float32(-1.0), 2.0)

    assert float(weight(jnp.float32(-1.5))) == pytest.approx(np.exp(-0.5), rel=1e-6)
    assert float(weight(jnp.float32(0.0))) == pytest.approx(2.0, rel=1e-6)
    assert float(weight(jnp.float32(1e9))) == pytest.approx(2.0, rel=1e-6)
    assert jax.grad(weight)(-1.5) == 0


def test_mean_per_rollout_leaves_out_what_belongs_to_none():
    ids = np.array([[0, 2, -1, 0], [2, 2, -1, 1]], np.int32)
    values = np.array([[1.0, 2.0, 99.0, 3.0], [4.0, 6.0, 99.0, 5.0]], np.float32)
    expected = [[2.0, 4.0, 0.0, 2.0], [4.0, 4.0, 0.0, 5.0]]
    np.testing.assert_allclose(terms.mean_per_rollout(values, ids, 4), expected)
