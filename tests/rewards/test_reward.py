"""The reward table of the paper and of the published code."""

import pytest

from tw_jax.rewards.reward import RewardConfig, RolloutFacts, reward, reward_terms

PAPER = RewardConfig()
CODE = RewardConfig(acceleration=0.5, acceleration_clip=0.1)


def facts(eta, correct=True, format_valid=True):
    return RolloutFacts(correct, format_valid, 1000, round(1000 * (1 - eta)))


@pytest.mark.parametrize(
    ("eta", "paper", "code"), [(0.0, 1.0, 1.0), (0.1, 1.05, 1.05), (0.2, 1.1, 1.1), (0.5, 1.2, 1.1)]
)
def test_correct_answers_earn_acceleration_up_to_the_clip(eta, paper, code):
    assert reward(PAPER, facts(eta)) == pytest.approx(paper)
    assert reward(CODE, facts(eta)) == pytest.approx(code)


def test_wrong_answers_earn_nothing_however_fast():
    assert reward(PAPER, facts(0.5, correct=False)) == 0
    assert reward(RewardConfig(incorrect=-1.0), facts(0.5, correct=False)) == -1


def test_optional_terms():
    config = RewardConfig(format=0.25, length=0.5, acceleration_from_step=10)
    broken = facts(0.5, format_valid=False)
    assert reward_terms(config, broken, step=9) == {
        "accuracy": 1.0,
        "format": -0.25,
        "length": pytest.approx(-0.25),
    }
    assert reward_terms(config, broken, step=10)["acceleration"] == pytest.approx(0.2)


def test_an_empty_response_has_no_acceleration():
    assert reward(PAPER, RolloutFacts(True, True, 0, 0)) == 1.0
