"""Advantages and filters against numbers worked out by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.train.advantages import (
    group_advantages,
    kept_rollouts,
    teaching_groups,
    usable_rollouts,
    varies,
)
from tw_jax.train.objective import ObjectiveConfig

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


@pytest.mark.parametrize("normalizer", ["none", "group_std", "batch_std"])
def test_equal_rewards_give_zeros_whatever_their_mean_rounds_to(normalizer):
    rewards = np.array([[0.1] * 3, [1.2 / 7] * 3])
    assert rewards[0].mean() != 0.1, "the test would show nothing"
    assert (group_advantages(rewards, normalizer) == 0).all()
    assert not varies(rewards).any()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),
        ({"drop_zero_variance": True}, [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]),
        ({"positive_only": True}, [[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]]),
        ({"min_abs_advantage": 0.3}, [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
        ({"positive_only": True, "min_abs_advantage": 0.3}, [[0, 0, 1, 0], [0] * 4, [0] * 4]),
    ],
)
def test_filters(settings, expected):
    objective = dataclasses.replace(ObjectiveConfig(), **settings)
    kept = kept_rollouts(objective, REWARDS, group_advantages(REWARDS, "none"))
    np.testing.assert_array_equal(kept, np.array(expected, bool))


def test_dynamic_sampling_keeps_a_rollout_of_average_reward():
    """Its group teaches something; its own advantage of 0 counts in the mean over tokens."""
    rewards = np.array([[0.0, 0.5, 1.0]])
    objective = ObjectiveConfig(drop_zero_variance=True)
    assert kept_rollouts(objective, rewards, group_advantages(rewards, "none")).all()


def test_dropping_the_malformed_by_hand():
    """Survivors 1 and 0; 1 alone; none; 1.2 and 1.1 and 1.1."""
    rewards = np.array([[1.0, 0.0, 9.0], [1.0, 9.0, 9.0], [9.0] * 3, [1.2, 1.1, 1.1]])
    valid = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], bool)
    assert usable_rollouts(ObjectiveConfig(), valid).all()
    objective = ObjectiveConfig(drop_malformed=True)
    usable = usable_rollouts(objective, valid)
    np.testing.assert_array_equal(usable, valid)
    third = 0.1 / 3
    expected = np.array([[0.5, -0.5, 0], [0] * 3, [0] * 3, [2 * third, -third, -third]])
    deviation = np.array([[0.5]] * 3 + [[0.1 * 2**0.5 / 3]])
    survivors = np.std([1.0, 0.0, 1.0, 1.2, 1.1, 1.1])
    for normalizer, divisor in (("none", 1), ("group_std", deviation), ("batch_std", survivors)):
        advantages = group_advantages(rewards, normalizer, usable)
        np.testing.assert_allclose(advantages, expected / divisor, rtol=1e-5)
        kept = kept_rollouts(objective, rewards, advantages, usable)
        # A sole survivor teaches nothing, but it was sampled: it counts in means over tokens.
        np.testing.assert_array_equal(kept, valid)
        assert teaching_groups(advantages, kept).tolist() == [True, False, False, True]
    dynamic = dataclasses.replace(objective, drop_zero_variance=True)
    kept = kept_rollouts(dynamic, rewards, advantages, usable)
    np.testing.assert_array_equal(kept, valid & [[True], [False], [False], [True]])


@st.composite
def some_groups(draw):
    """Rewards and which rollouts are usable."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    count = shape[0] * shape[1]
    rewards = draw(
        st.lists(st.sampled_from([-1.0, 0.0, 0.3, 1.0, 1.2]), min_size=count, max_size=count)
    )
    usable = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return np.reshape(rewards, shape), np.reshape(usable, shape)


@given(
    some_groups(),
    st.sampled_from(["none", "group_std", "batch_std"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.4]),
)
def test_dropped_rollouts_are_as_if_never_sampled(
    groups, normalizer, positive_only, drop_zero_variance, min_abs_advantage
):
    """Against plain lists of survivors, group by group."""
    rewards, usable = groups
    objective = ObjectiveConfig(
        normalizer=normalizer,
        drop_malformed=True,
        positive_only=positive_only,
        drop_zero_variance=drop_zero_variance,
        min_abs_advantage=min_abs_advantage,
    )
    advantages = group_advantages(rewards, normalizer, usable)
    kept = kept_rollouts(objective, rewards, advantages, usable)
    assert not advantages[~usable].any() and not kept[~usable].any()
    everyone = [r for group, there in zip(rewards, usable, strict=True) for r in group[there]]
    for group, there, got, taken in zip(rewards, usable, advantages, kept, strict=True):
        left = group[there]
        if len(set(left)) < 2:
            assert not got.any()
            assert not (drop_zero_variance and taken.any())
            continue
        std = {"none": 1.0, "group_std": np.std(left), "batch_std": np.std(everyone)}[normalizer]
        expected = (left - np.mean(left)) / std
        np.testing.assert_allclose(got[there], expected, rtol=1e-5, atol=1e-6)
        enough = np.abs(got[there]) >= min_abs_advantage
        np.testing.assert_array_equal(
            taken[there], enough & (got[there] > 0) if positive_only else enough
        )


@given(some_groups(), st.sampled_from(["none", "group_std", "batch_std"]))
def test_what_is_dropped_is_worth_nothing_whatever_it_was_worth(groups, normalizer):
    rewards, usable = groups
    other = np.where(usable, rewards, 1e9)
    np.testing.assert_array_equal(
        group_advantages(rewards, normalizer, usable), group_advantages(other, normalizer, usable)
    )


def test_groups_that_teach():
    advantages = np.array([[0.5, -0.5], [0.0, 0.0], [0.5, -0.5], [0.5, -0.5]], np.float32)
    kept = np.array([[1, 1], [1, 1], [0, 0], [0, 1]], bool)
    assert teaching_groups(advantages, kept).tolist() == [True, False, False, True]
