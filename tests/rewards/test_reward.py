"""Rewards: the published formulas, terms by name, groups, schedules, presets."""

import dataclasses
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.config import load_config
from tw_jax.rewards.facts import GroupFacts, RolloutFacts, group_facts
from tw_jax.rewards.reward import (
    PRESETS,
    PresetName,
    RewardConfig,
    group_reward_terms,
    reward,
    reward_terms,
)
from tw_jax.rewards.schedule import Schedule, share_at
from tw_jax.rewards.terms import (
    TERMS,
    AccelerationTerm,
    AccuracyTerm,
    FormatTerm,
    GroupLengthTerm,
    LatencyTerm,
    LengthTerm,
    OverlongTerm,
    ParallelTerm,
)

PAPER, CODE = RewardConfig(), RewardConfig("code")


def facts(eta=0.0, correct=True, format_valid=True, total=1000, **more):
    return RolloutFacts(correct, format_valid, total, round(total * (1 - eta)), **more)


def term(name, settings, rollout, group=None):
    """The value of one term."""
    group = group_facts([rollout]) if group is None else group
    return TERMS[name](settings, rollout, group)


@pytest.mark.parametrize(
    ("eta", "paper", "code"), [(0.0, 1.0, 1.0), (0.1, 1.05, 1.05), (0.2, 1.1, 1.1), (0.5, 1.2, 1.1)]
)
def test_correct_answers_earn_acceleration_up_to_the_clip(eta, paper, code):
    assert reward(PAPER, facts(eta)) == pytest.approx(paper)
    assert reward(CODE, facts(eta)) == pytest.approx(code)


@given(st.floats(0, 1))
def test_the_code_variant_is_what_the_published_code_computes(eta):
    rollout = facts(eta, total=10_000)
    published = 1.0 + 0.5 * min(rollout.acceleration_ratio, 0.2)
    assert reward(CODE, rollout) == pytest.approx(published)


def test_wrong_answers_earn_nothing_however_fast():
    assert reward(PAPER, facts(0.5, correct=False)) == 0
    assert reward(CODE, facts(0.5, correct=False)) == -1


def test_an_empty_response_has_no_acceleration():
    assert reward(PAPER, RolloutFacts(True, True, 0, 0)) == 1.0


def test_every_term_that_counts_is_reported_for_every_rollout():
    config = RewardConfig(
        format=FormatTerm(0.25), length=LengthTerm(0.5), acceleration=AccelerationTerm(0.0)
    )
    group = group_facts([facts()])
    assert reward_terms(config, facts(0.5, correct=False), group) == {
        "accuracy": 0.0,
        "format": 0.0,
        "length": 0.0,
    }
    broken = facts(0.5, format_valid=False)
    assert reward_terms(config, broken, group) == {
        "accuracy": 1.0,
        "format": -0.25,
        "length": pytest.approx(-0.25),
    }


def test_a_score_earns_its_share():
    settings = AccuracyTerm(weight=2.0, incorrect=-1.0)
    assert term("accuracy", settings, facts(correct=False, score=0.5)) == pytest.approx(0.5)
    assert term("accuracy", settings, facts(correct=True, score=1.0)) == 2.0
    assert term("accuracy", settings, facts(correct=False, score=0.0)) == -1.0


def test_what_could_not_be_graded_is_wrong_or_what_is_said():
    failed = facts(correct=False, grading_failure="grading_raised", score=0.0)
    assert term("accuracy", AccuracyTerm(incorrect=-1.0), failed) == -1.0
    assert term("accuracy", AccuracyTerm(incorrect=-1.0, ungraded=0.0), failed) == 0.0


@pytest.mark.parametrize(
    ("needs", "format_valid", "blocks", "value"),
    [
        ("nothing", False, 0, 1.0),
        ("format", True, 0, 1.0),
        ("format", False, 1, -0.5),
        ("block", True, 0, -0.5),
        ("block", False, 1, -0.5),
        ("block", True, 1, 1.0),
    ],
)
def test_an_answer_may_need_strict_format_or_a_block(needs, format_valid, blocks, value):
    settings = AccuracyTerm(needs=needs, unmet=-0.5)
    assert term("accuracy", settings, facts(format_valid=format_valid, blocks=blocks)) == value


def test_latency_is_measured_against_the_correct_rollouts_of_the_group():
    fast, slow, wrong = (
        RolloutFacts(True, True, 400, 300),
        RolloutFacts(True, True, 500, 500),
        RolloutFacts(False, True, 90, 10),
    )
    group = group_facts([fast, slow, wrong])
    assert group == GroupFacts(2 / 3, 400.0, 300)
    settings = LatencyTerm(0.5, clip=0.2)
    assert term("latency", settings, fast, group) == pytest.approx(0.125)
    assert term("latency", settings, slow, group) == pytest.approx(-0.125)
    assert term("latency", settings, wrong, group) == 0
    assert term("latency", LatencyTerm(5.0, clip=0.2), fast, group) == 0.2
    assert term("latency", LatencyTerm(5.0, clip=0.2), slow, group) == -0.2
    assert term("latency", settings, wrong, group_facts([wrong])) == 0


@pytest.mark.parametrize(
    ("breaks", "blocks", "total", "fault"),
    [
        ((), 0, 1, 2.0),
        ((), 0, 50, 1.5),
        (("unclosed_thread", "white_space"), 0, 50, 1.0),
        (("thread_numbering", "empty_thread"), 2, 50, 1.0),
        (("empty_outline", "white_space"), 1, 50, 0.4),
        (("white_space",), 1, 50, 0.2),
        ((), 1, 50, 0.0),
    ],
)
def test_the_ladder_of_npr(breaks, blocks, total, fault):
    rollout = facts(total=total, format_valid=not breaks, format_breaks=breaks, blocks=blocks)
    assert term("format", FormatTerm(1.0, "npr"), rollout) == -fault
    assert term("format", FormatTerm(0.5, "npr"), rollout) == -fault / 2


def test_the_group_length_penalty_of_the_published_code():
    settings = GroupLengthTerm(0.2, from_accuracy=0.5, span_tokens=100)
    group = [RolloutFacts(True, True, n, n) for n in (100, 150, 900)]
    group.append(RolloutFacts(False, True, 140, 140))
    summed = group_facts(group)  # accuracy 0.75: half the strength
    values = [term("group_length", settings, rollout, summed) for rollout in group]
    assert values == pytest.approx([0, -0.05, -0.1, -0.04], abs=1e-6)
    hard = dataclasses.replace(settings, from_accuracy=0.8)
    assert term("group_length", hard, group[2], summed) == 0
    wrong = [RolloutFacts(False, True, 9, 9)]
    assert term("group_length", dataclasses.replace(settings, from_accuracy=0.0), wrong[0]) == 0


@pytest.mark.parametrize(
    ("total", "value"), [(0, 0), (16384, 0), (18432, -0.5), (20480, -1), (30000, -1)]
)
def test_overlong_responses_are_punished_softly(total, value):
    assert term("overlong", OverlongTerm(1.0, 4096, 20480), facts(total=total)) == value
    assert term("overlong", OverlongTerm(1.0), facts(total=total, token_budget=20480)) == value


def test_no_limit_no_punishment():
    assert term("overlong", OverlongTerm(1.0), facts(total=10**6)) == 0


def test_blocks_earn_their_bonus_when_right_and_well_formed():
    settings = ParallelTerm(0.2)
    assert term("parallel", settings, facts(blocks=1)) == 0.2
    for other in (
        facts(),
        facts(blocks=1, correct=False),
        facts(blocks=1, format_valid=False),
    ):
        assert term("parallel", settings, other) == 0


def test_parallel_r1_rewards_blocks_in_two_of_ten_steps():
    config = RewardConfig("parallel_r1")
    group = group_facts([facts()])

    def rewards(rollout):
        return [reward(config, rollout, group, step) for step in range(20)]

    assert rewards(facts(blocks=1)) == 2 * ([1.0] * 8 + [1.2] * 2)
    assert rewards(facts()) == [1.0] * 20
    assert rewards(facts(blocks=1, correct=False)) == [-1.0] * 20


@pytest.mark.parametrize(
    ("preset", "rollout", "value"),
    [
        ("apr", facts(0.5), 1.0),
        ("apr", facts(correct=False), 0.0),
        ("papo", facts(blocks=1), 1.0),
        ("papo", facts(), 1.0),
        ("papo", facts(blocks=1, format_valid=False), -1.0),
        ("papo", facts(correct=False), -1.0),
        ("npr_zero", facts(blocks=1), 1.0),
        ("npr_zero", facts(blocks=1, correct=False), -1.0),
        ("npr_zero", facts(), -1.5),
        ("npr_zero", facts(blocks=1, format_valid=False, format_breaks=("white_space",)), -0.2),
        ("dapo", facts(token_budget=1000), 0.0),
        ("dapo", facts(token_budget=10_000), 1.0),
        ("dapo", facts(token_budget=1000, correct=False), -2.0),
    ],
)
def test_presets(preset, rollout, value):
    assert reward(RewardConfig(preset), rollout) == pytest.approx(value)


def test_the_names_of_presets_terms_and_fields_are_the_same():
    assert set(PRESETS) == set(typing.get_args(PresetName))
    fields = {field.name for field in dataclasses.fields(RewardConfig)} - {"preset"}
    assert fields == set(TERMS)
    every = RewardConfig(
        accuracy=AccuracyTerm(),
        acceleration=AccelerationTerm(1.0),
        latency=LatencyTerm(1.0),
        format=FormatTerm(1.0),
        parallel=ParallelTerm(1.0),
        length=LengthTerm(1.0),
        group_length=GroupLengthTerm(1.0),
        overlong=OverlongTerm(1.0),
    )
    assert set(every.terms) == set(TERMS)


def test_given_terms_take_the_place_of_the_presets():
    config = load_config(
        RewardConfig,
        None,
        ["preset=code", "acceleration=0", "format=0.5", "accuracy.incorrect=-0.5"],
    )
    assert dict(config.terms) == {
        "accuracy": AccuracyTerm(incorrect=-0.5),
        "format": FormatTerm(0.5),
    }


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        (Schedule(), [1, 1, 1, 1, 1, 1]),
        (Schedule("from_step", start=2), [0, 0, 1, 1, 1, 1]),
        (Schedule("until_step", start=2), [1, 1, 0, 0, 0, 0]),
        (Schedule("ramp", start=1, ramp_steps=4), [0, 0, 0.25, 0.5, 0.75, 1]),
        (Schedule("alternate", off_steps=2, on_steps=1), [0, 0, 1, 0, 0, 1]),
        (Schedule("alternate", off_steps=0, on_steps=1), [1, 1, 1, 1, 1, 1]),
    ],
)
def test_schedules(schedule, shares):
    assert [share_at(schedule, step) for step in range(6)] == shares
    config = RewardConfig(length=LengthTerm(1.0, schedule))
    values = [group_reward_terms(config, [facts()], step)[0]["length"] for step in range(6)]
    assert values == [-share for share in shares]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["accuracy=.nan"], "weight=nan"),
        (["acceleration.clip=.inf"], "clip=inf"),
        (["overlong.buffer_tokens=0"], "buffer_tokens=0"),
        (["group_length.from_accuracy=2"], "from_accuracy=2"),
        (["length.schedule.ramp_steps=0"], "ramp_steps=0"),
        (["preset=papoo"], "preset"),
    ],
)
def test_unusable_settings_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        load_config(RewardConfig, None, words)
