"""When a run stops by itself: every rule fires on its fault, and none on what chance does."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.config import describe
from tw_jax.train.advantages import varies
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.rl_health import (
    LEAST_GROUPS_WITHOUT_SIGNAL,
    Health,
    HealthConfig,
    StepFacts,
    checked,
)

CONFIG = HealthConfig()
FINE = StepFacts(
    groups=16,
    teaching_groups=9,
    accuracy=0.5,
    format_valid_rate=0.9,
    packed=128,
    too_long_tokens=0,
    updates=2,
    skipped_updates=0,
)


def stop(steps, config=CONFIG):
    """`(step, message)` of the first stop, steps from 1; None if there is none."""
    health = Health()
    for number, facts in enumerate(steps, start=1):
        health, message = checked(config, health, facts, row_len=2048)
        if message is not None:
            return number, message
    return None


def with_accuracies(accuracies, groups=16):
    return [dataclasses.replace(FINE, accuracy=a, groups=groups) for a in accuracies]


FAULTS = {
    "skipped": ({"updates": 2, "skipped_updates": 2}, ["not finite", "learning_rate"]),
    "too long": (
        {"packed": 0, "too_long_tokens": 3000, "updates": 0, "teaching_groups": 9},
        ["row_len=2048", "3000 trie tokens", "max_response_tokens"],
    ),
    "malformed": ({"format_valid_rate": 0.01}, ["fewer than 2%", "format_valid_rate"]),
    "solved": ({"teaching_groups": 0, "accuracy": 1.0}, ["Everything is solved", "160 groups"]),
    "unsolved": ({"teaching_groups": 0, "accuracy": 0.0}, ["too hard", "160 groups"]),
    "silent": ({"teaching_groups": 0}, ["50.0% of the answers", "temperature"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_run_when_it_has_lasted(fault):
    changes, parts = FAULTS[fault]
    bad = dataclasses.replace(FINE, **changes)
    fine = dataclasses.replace(FINE, accuracy=bad.accuracy)
    assert stop([fine] * 3 + [bad] * 9 + [fine] + [bad] * 9) is None
    step, message = stop([fine] * 3 + [bad] * 30)
    assert step == 13
    for part in parts:
        assert part in message
    step, message = stop([bad] * 30, HealthConfig(patience_steps=12))
    assert step == 12
    assert stop([bad] * 100, HealthConfig(patience_steps=0)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"updates": 2, "skipped_updates": 1},
        {"updates": 0, "skipped_updates": 0},
        {"packed": 1, "too_long_tokens": 3000},
        {"packed": 0, "too_long_tokens": 0},
        {"format_valid_rate": 0.02},
        {"teaching_groups": 1, "accuracy": 0.0},
    ],
)
def test_less_than_everything_is_no_fault(changes):
    assert stop([dataclasses.replace(FINE, **changes)] * 50) is None


def test_a_small_run_without_signal_gets_more_steps():
    """One group of a fairly solved problem is often unanimous ten times in a row."""
    silent = dataclasses.replace(FINE, teaching_groups=0, groups=4)
    step, _ = stop([silent] * 100)
    assert step == LEAST_GROUPS_WITHOUT_SIGNAL / 4 > CONFIG.patience_steps


def test_limits_are_settings():
    half = dataclasses.replace(FINE, format_valid_rate=0.4)
    assert stop([half] * 10) is None
    assert stop([half] * 10, HealthConfig(min_format_valid_rate=0.5))[0] == 10
    fall = with_accuracies([0.9] * 10 + [0.4] * 10)
    assert stop(fall) is None
    assert stop(fall, HealthConfig(collapse_share=0.5))[0] == 20
    assert stop(with_accuracies([0.9] * 10 + [0.0] * 10), HealthConfig(collapse_share=0)) is None
    for changes in ({"patience_steps": -1}, {"collapse_share": 1.5}, {"min_format_valid_rate": -1}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            HealthConfig(**changes)
    assert RLConfig().health == CONFIG


def test_a_collapse_by_hand():
    """From 0.5 to 0: after n steps of it the mean of ten is 0.05 (10 - n), below 0.1 at n = 9."""
    step, message = stop(with_accuracies([0.5] * 20 + [0.0] * 20))
    assert step == 29
    assert "0.050 over the last 10 steps" in message and "0.500" in message
    # The standard error of the difference of two shares around 0.09 of 160 draws is 0.032, and
    # 0.18 is less than six of them; around 0.11 it is 0.035, and 0.22 is more.
    assert stop(with_accuracies([0.18] * 20 + [0.0] * 20)) is None
    assert stop(with_accuracies([0.22] * 20 + [0.0] * 20))[0] == 30
    assert stop(with_accuracies([0.5] * 20 + [0.0] * 20, groups=1)) is None
    # The best is of ten steps too: one good step at the beginning is none.
    assert stop(with_accuracies([1.0] + [0.1] * 40)) is None


@given(st.floats(0, 1), st.integers(1, 64))
def test_level_accuracy_is_no_collapse(accuracy, groups):
    assert stop(with_accuracies([accuracy] * 40, groups)) is None


@given(st.lists(st.floats(0, 1), max_size=60), st.integers(1, 64))
def test_rising_accuracy_is_no_collapse(accuracies, groups):
    assert stop(with_accuracies(sorted(accuracies), groups)) is None


@given(st.floats(0, 1), st.integers(1, 32), st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_noise_around_a_level_is_no_collapse(level, groups, patience, seed):
    """Rollouts of a group all go the same way here, which is the most noise that there can be."""
    rng = np.random.default_rng(seed)
    accuracies = rng.binomial(groups, level, 300) / groups
    assert stop(with_accuracies(accuracies, groups), HealthConfig(patience_steps=patience)) is None


@given(st.floats(0.5, 1), st.floats(0, 0.02), st.integers(8, 32), st.integers(0, 2**32 - 1))
def test_a_fall_to_almost_nothing_is_a_collapse(high, low, groups, seed):
    rng = np.random.default_rng(seed)
    accuracies = [rng.binomial(groups, p, 20) / groups for p in (high, low)]
    step, message = stop(with_accuracies(np.concatenate(accuracies), groups))
    assert 20 < step <= 32 and "collapsed" in message


@given(
    st.lists(st.floats(0.02, 0.98), min_size=2, max_size=2).map(sorted),
    st.integers(0, 2**32 - 1),
)
def test_a_run_of_the_quickstarts_size_is_not_stopped_by_chance(accuracies, seed):
    """60 steps of 16 problems, 8 rollouts each, whose only reward is a right answer."""
    rng = np.random.default_rng(seed)
    steps = []
    for accuracy in np.linspace(*accuracies, 60):
        right = rng.random((16, 8)) < accuracy
        teaching = int(varies(right.astype(float)).sum())
        steps.append(
            dataclasses.replace(FINE, accuracy=float(right.mean()), teaching_groups=teaching)
        )
    assert stop(steps) is None


def test_docs_and_help_say_how_many_groups_it_takes():
    docs = pathlib.Path(__file__).parents[2] / "docs/rl.md"
    said = re.compile(rf"at least\s+{LEAST_GROUPS_WITHOUT_SIGNAL}\b")
    assert said.search(docs.read_text(encoding="utf-8"))
    assert said.search(str(HealthConfig.__doc__))


def test_messages_name_settings_that_exist():
    faults = [dataclasses.replace(FINE, **changes) for changes, _ in FAULTS.values()]
    runs = [[fault] * 10 for fault in faults] + [with_accuracies([0.5] * 20 + [0.0] * 20)]
    named = set()
    for steps in runs:
        found = stop(steps)
        assert found is not None
        named.update(re.findall(r"[a-z]+\.[a-z_]+", found[1]))
    assert len(named) >= 7
    settings = {row.key for row in describe(RLConfig)}
    assert named <= settings, named - settings


some_facts = st.builds(
    StepFacts,
    groups=st.just(60),
    teaching_groups=st.integers(0, 1),
    accuracy=st.sampled_from([0.0, 0.1, 0.9]),
    format_valid_rate=st.sampled_from([0.0, 1.0]),
    packed=st.integers(0, 1),
    too_long_tokens=st.sampled_from([0, 5000]),
    updates=st.just(1),
    skipped_updates=st.integers(0, 1),
)


@given(st.lists(some_facts, max_size=12), st.integers(0, 12))
def test_a_resumed_run_stops_where_an_uninterrupted_one_does(steps, saved_after):
    config = HealthConfig(patience_steps=2)

    def messages(resumed: bool):
        health, found = Health(), []
        for number, facts in enumerate(steps):
            if resumed and number == saved_after:
                health = Health.from_json(json.loads(json.dumps(health.to_json())))
            health, message = checked(config, health, facts, row_len=64)
            found.append(message)
        return found, health

    assert messages(True) == messages(False)


def test_whoever_goes_on_after_a_stop_has_patience_anew():
    bad = dataclasses.replace(FINE, format_valid_rate=0.0)
    health, found = Health(), []
    for _ in range(25):
        health, message = checked(CONFIG, health, bad, row_len=2048)
        found.append(message is not None)
    assert [step for step, stopped in enumerate(found, start=1) if stopped] == [10, 20]
    # A patience that is shortened meanwhile drops the oldest steps.
    after = checked(HealthConfig(patience_steps=2), health, FINE, row_len=2048)[0]
    assert after.accuracies == (0.5, 0.5)
