"""Selection: every rule at its boundary, duplicates, preferences, balance."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.data.statistics import TrajectoryStatistics
from tw_jax.rewards.graders import Grade
from tw_jax.selftrain.candidate import Candidate, FormatBreak
from tw_jax.selftrain.near_duplicates import jaccard, shingles
from tw_jax.selftrain.selection import (
    ALL_RULES,
    RULES,
    SHAPE_RULES,
    Kept,
    SelectionConfig,
    balance,
    broken_rules,
    pass_rate_bin,
    select_of_problem,
    shares_reached,
)

GOOD = Candidate(
    problem=0,
    sample=0,
    grade=Grade(True, "7", "correct"),
    finish_reason="eos",
    cut_threads=0,
    format_break=None,
    statistics=TrajectoryStatistics(5, 100, 60, (70, 10), ((20, 40), (3, 3, 3)), True),
    response="x",
    tokens=(1,),
)
SEQUENTIAL = dataclasses.replace(GOOD, statistics=TrajectoryStatistics(5, 100, 100, (), (), True))


def test_a_good_sample_breaks_no_rule():
    assert broken_rules(SelectionConfig(), GOOD) == {}
    assert broken_rules(SelectionConfig(), SEQUENTIAL) == {}


@pytest.mark.parametrize(
    ("rule", "changes", "message"),
    [
        ("correct", {"grade": Grade(False, "8", "wrong")}, "wrong: '8'"),
        ("correct", {"grade": Grade(False, None, "no_answer")}, "no_answer"),
        ("finished", {"finish_reason": "length"}, "ended by length"),
        ("threads_finished", {"cut_threads": 2}, "2 threads were ended"),
        ("well_formed", {"format_break": FormatBreak("stray_text", "here")}, "stray_text: here"),
    ],
)
def test_rules_without_settings(rule, changes, message):
    broken = broken_rules(SelectionConfig(), dataclasses.replace(GOOD, **changes))
    assert list(broken) == [rule] and broken[rule].startswith(message)


@pytest.mark.parametrize(
    ("rule", "setting", "admitted", "refused"),
    [
        ("total_tokens", "min_total_tokens", 100, 101),
        ("total_tokens", "max_total_tokens", 100, 99),
        ("critical_path", "max_critical_path", 60, 59),
        ("acceleration_ratio", "min_acceleration_ratio", 0.4, 0.41),
        ("threads", "min_threads", 2, 3),
        ("threads", "max_threads", 3, 2),
        ("blocks", "min_blocks", 2, 3),
        ("blocks", "max_blocks", 2, 1),
    ],
)
def test_limits_are_inclusive(rule, setting, admitted, refused):
    assert broken_rules(SelectionConfig(**{setting: admitted}), GOOD) == {}
    assert list(broken_rules(SelectionConfig(**{setting: refused}), GOOD)) == [rule]


def test_limits_of_blocks_leave_sequential_samples_alone():
    config = SelectionConfig(min_acceleration_ratio=0.2, min_blocks=2, min_threads=2)
    assert broken_rules(config, SEQUENTIAL) == {}
    assert list(broken_rules(SelectionConfig(require_block=True), SEQUENTIAL)) == ["has_block"]
    assert broken_rules(SelectionConfig(require_block=True), GOOD) == {}


def test_cut_threads_can_be_allowed():
    cut = dataclasses.replace(GOOD, cut_threads=1)
    assert broken_rules(SelectionConfig(allow_cut_threads=True), cut) == {}


def test_a_sample_that_does_not_parse_is_held_to_the_other_rules_alone():
    broken = dataclasses.replace(
        GOOD, statistics=None, format_break=FormatBreak("stray_text", ""), finish_reason="length"
    )
    assert list(broken_rules(SelectionConfig(max_blocks=0), broken)) == ["finished", "well_formed"]


@pytest.mark.parametrize(
    "settings",
    [
        {"min_threads": 3, "max_threads": 2},
        {"require_block": True, "max_blocks": 0},
        {"near_duplicate_jaccard": 1.5},
        {"parallel_share": -0.1},
        {"keep_per_problem": 0},
    ],
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SelectionConfig(**settings)


def samples(*texts, critical=None):
    """One candidate per text; characters are tokens."""
    found = []
    for number, text in enumerate(texts):
        path = critical[number] if critical else 60
        statistics = dataclasses.replace(GOOD.counted, critical_path=path)
        tokens = tuple(map(ord, text))
        found.append(
            dataclasses.replace(
                GOOD, sample=number, response=text, tokens=tokens, statistics=statistics
            )
        )
    return found


def outcome(config, candidates, seed=0):
    kept, drops = select_of_problem(config, seed, candidates)
    return [c.sample for c in kept], {d.sample: d.rule for d in drops}


def test_equal_texts_stay_once_whatever_their_white_space():
    config = SelectionConfig(keep_per_problem=None, near_duplicate_jaccard=None)
    assert outcome(config, samples("a  b\n", "c", "a b", "A b")) == ([0, 1, 3], {2: "duplicate"})


def test_near_duplicates_stay_once_and_the_better_one_stays():
    text = "".join(chr(97 + i) for i in range(26)) * 2
    # One changed last character changes one run of eight of the 26 different ones.
    assert jaccard(shingles(tuple(map(ord, text))), shingles(tuple(map(ord, text[:-1] + "!")))) == (
        pytest.approx(26 / 27)
    )
    candidates = samples(text, text[:-1] + "!", "other words", critical=(50, 40, 60))
    config = SelectionConfig(keep_per_problem=None, near_duplicate_jaccard=26 / 27)
    assert outcome(config, candidates) == ([1, 2], {0: "near_duplicate"})
    config = dataclasses.replace(config, near_duplicate_jaccard=0.99)
    assert outcome(config, candidates)[0] == [0, 1, 2]


def test_short_texts_are_one_run():
    assert jaccard(shingles((1, 2)), shingles((1, 2))) == 1
    assert jaccard(shingles((1, 2)), shingles((1, 3))) == 0
    assert jaccard(shingles(()), shingles(())) == 1


def test_the_preferred_samples_stay():
    candidates = samples("a", "b", "c", critical=(50, 40, 60))
    config = SelectionConfig(keep_per_problem=2)
    assert outcome(config, candidates) == ([0, 1], {2: "keep_per_problem"})
    # With equal totals both preferences agree; this one has a longer total.
    longer = dataclasses.replace(
        candidates[2], statistics=dataclasses.replace(candidates[2].counted, total_tokens=900)
    )
    config = SelectionConfig(keep_per_problem=1, prefer="highest_acceleration")
    assert outcome(config, [*candidates[:2], longer])[0] == [2]
    drawn = SelectionConfig(keep_per_problem=1, prefer="random")
    assert {outcome(drawn, candidates, seed)[0][0] for seed in range(40)} == {0, 1, 2}


@given(seed=st.integers(0, 99), order=st.randoms())
def test_the_order_of_samples_changes_nothing(seed, order):
    candidates = samples(*"abcaabde", critical=(5, 4, 3, 5, 4, 4, 2, 3))
    shuffled = list(candidates)
    order.shuffle(shuffled)
    for prefer in ("shortest_critical_path", "highest_acceleration", "random"):
        config = SelectionConfig(keep_per_problem=2, prefer=prefer)
        kept, drops = outcome(config, candidates, seed)
        assert outcome(config, shuffled, seed) == (kept, drops)
        assert sorted([*kept, *drops]) == list(range(8))


def kept_items(*flags, rate=1.0):
    return [Kept(i, 0, rate, flag) for i, flag in enumerate(flags)]


@pytest.mark.parametrize(
    ("parallel", "sequential", "share", "reached"),
    [
        (10, 10, 0.5, (10, 10)),
        (30, 10, 0.5, (10, 10)),
        (10, 30, 0.5, (10, 10)),
        (80, 20, 0.6, (30, 20)),
        (0, 5, 0.5, (0, 0)),
        (5, 5, 1.0, (5, 0)),
        (5, 5, 0.0, (0, 5)),
    ],
)
def test_shares(parallel, sequential, share, reached):
    assert shares_reached(parallel, sequential, share) == reached


@given(
    flags=st.lists(st.booleans(), max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
    most=st.one_of(st.none(), st.integers(1, 20)),
)
def test_a_balanced_set_has_the_share_and_loses_no_sample_unseen(flags, share, seed, most):
    rates = [0.1, 0.5, 1.0]
    items = [Kept(i, 0, rates[i % 3], flag) for i, flag in enumerate(flags)]
    config = SelectionConfig(parallel_share=share, max_per_pass_rate_bin=most)
    kept, drops = balance(config, seed, items)
    assert sorted([*(k.problem for k in kept), *(d.problem for d in drops)]) == list(
        range(len(flags))
    )
    if kept:
        parallel = sum(item.has_block for item in kept)
        assert abs(parallel - share * len(kept)) <= 1
    if most is not None:
        for rate in rates:
            assert sum(item.pass_rate == rate for item in kept) <= most
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    assert balance(config, seed, shuffled) == (kept, drops)


def test_without_targets_everything_stays():
    items = kept_items(True, True, False)
    assert balance(SelectionConfig(), 0, items) == (items, [])


def test_pass_rates_at_the_edges_of_bins():
    assert [pass_rate_bin(rate, 10) for rate in (0, 0.05, 0.1, 0.11, 0.3, 0.7, 1)] == [
        0, 0, 0, 1, 2, 6, 9,
    ]  # fmt: skip


def test_every_rule_is_named_once():
    assert len(set(ALL_RULES)) == len(ALL_RULES)
    assert set(RULES) | set(SHAPE_RULES) < set(ALL_RULES)
