"""Weights of the tokens of one rollout, per unit."""

import pytest

from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.token_weights import token_weights


@pytest.mark.parametrize(
    ("aggregation", "policy", "kl", "denominator"),
    [
        ("token_mean", [1, 1, 1], [1, 1, 1], [1, 1, 1]),
        ("sequence_mean", [1 / 6] * 3, [1 / 6] * 3, [1 / 6] * 3),
        ("rollout_mean", [1 / 4, 0, 1 / 8], [1 / 2, 0, 1 / 4], [1 / 2, 0, 1 / 4]),
        ("token_sum", [1, 1, 1], [1, 1, 1], [1 / 6] * 3),
    ],
)
def test_a_rollout_with_units_of_2_0_and_4_tokens(aggregation, policy, kl, denominator):
    weights = token_weights([2, 0, 4], ObjectiveConfig(aggregation=aggregation))
    assert [w.policy for w in weights] == pytest.approx(policy)
    assert [w.kl for w in weights] == pytest.approx(kl)
    assert [w.denominator for w in weights] == pytest.approx(denominator)
