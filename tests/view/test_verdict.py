"""The verdict tells a change of style from a change of skill."""

import pytest

from tw_jax.view.verdict import rl_verdict


def side(accuracy: float, activation: float, half_width: float = 0.05) -> dict:
    return {
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - half_width, accuracy + half_width],
        "activation_ratio": activation,
        "activation_ratio_interval": [activation - half_width, activation + half_width],
    }


def rl(activation=(0.5, 0.5), parallel=(0.7, 0.7), sequential=(0.4, 0.4)) -> dict:
    entry = {}
    for i, when in enumerate(("before", "after")):
        share = activation[i]
        free = share * parallel[i] + (1 - share) * sequential[i]
        entry[when] = side(free, share)
        entry[f"{when}_parallel"] = side(parallel[i], 1.0)
        entry[f"{when}_sequential"] = side(sequential[i], 0.0)
    return entry


@pytest.mark.parametrize(
    ("changes", "style", "skill", "words"),
    [
        ({}, 0, (0, 0), "neither the style nor the skill"),
        ({"activation": (0.5, 0.9)}, 1, (0, 0), "more often parallel), not the skill"),
        ({"activation": (0.9, 0.5)}, -1, (0, 0), "less often parallel), not the skill"),
        ({"parallel": (0.5, 0.8)}, 0, (1, 0), "left the style as it was but improved"),
        ({"sequential": (0.5, 0.2)}, 0, (0, -1), "but made the skill within a style worse"),
        (
            {"activation": (0.4, 0.9), "parallel": (0.5, 0.8), "sequential": (0.2, 0.5)},
            1,
            (1, 1),
            "and improved the skill within a style (parallel and sequential)",
        ),
        (
            {"activation": (0.4, 0.9), "parallel": (0.5, 0.8), "sequential": (0.5, 0.2)},
            1,
            (1, -1),
            "traded skill: better when parallel, worse when sequential",
        ),
    ],
)
def test_verdicts(changes, style, skill, words):
    verdict = rl_verdict(rl(**changes))
    assert verdict is not None
    assert verdict.style == style
    assert (verdict.skill["parallel"], verdict.skill["sequential"]) == skill
    assert words in verdict.headline


def test_a_small_change_is_not_claimed():
    verdict = rl_verdict(rl(parallel=(0.70, 0.75)))
    assert verdict is not None
    assert verdict.skill["parallel"] == 0
    assert "which includes no change" in " ".join(verdict.sentences)


def test_the_shift_of_style_is_priced():
    verdict = rl_verdict(rl(activation=(0.5, 0.9)))
    assert verdict is not None
    assert "by +12.0 points; it moved by +12.0 points" in verdict.sentences[-1]


@pytest.mark.parametrize("missing", ["before", "after_parallel", "before_sequential"])
def test_missing_numbers_give_no_verdict(missing):
    entry = rl()
    del entry[missing]
    assert rl_verdict(entry) is None
    assert rl_verdict({}) is None


def test_missing_intervals_give_no_verdict():
    entry = rl()
    del entry["after_parallel"]["accuracy_interval"]
    assert rl_verdict(entry) is None
