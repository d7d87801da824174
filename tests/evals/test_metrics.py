"""Known answers and laws of the evaluation metrics."""

import dataclasses
import itertools
import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tw_jax.evals.metrics import (
    RolloutRecord,
    bootstrap_interval,
    difference_interval,
    pass_at_k,
    rate_interval,
    summarize,
    token_latency_speedup,
    wall_clock_speedup,
)


def record(problem: int, critical: int = 50, total: int = 100, **changes) -> RolloutRecord:
    base = RolloutRecord(
        problem=problem,
        style="free",
        answer="wrong" if changes.get("correct") is False else "right",
        correct=True,
        total_tokens=total,
        critical_path=critical,
        acceleration_ratio=1 - critical / total,
        has_block=True,
        format_valid=True,
        finish_reason="eos",
    )
    return dataclasses.replace(base, **changes)


records_strategy = st.lists(
    st.builds(
        lambda problem, critical, extra, correct, block: record(
            problem, critical, critical + extra, correct=correct, has_block=block
        ),
        st.integers(0, 6),
        st.integers(1, 400),
        st.integers(0, 400),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=30,
)


def test_summary_of_known_records() -> None:
    summary = summarize(
        [
            record(0, 40, 100, correct=True),
            record(0, 60, 100, correct=False, has_block=False),
            record(1, 100, 100, correct=False, has_block=False, format_valid=False),
            record(1, 100, 100, correct=False),
        ]
    )
    assert (summary.n, summary.problems) == (4, 2)
    assert summary.accuracy == 0.25
    assert summary.pass_at_k == {1: 0.25, 2: 0.5}
    assert summary.critical_path == 75.0
    assert summary.total_tokens == 100.0
    assert summary.acceleration_ratio == pytest.approx(0.25)
    assert summary.activation_ratio == 0.5
    assert summary.format_valid_rate == 0.75


def test_problems_weigh_the_same_whatever_their_number_of_samples() -> None:
    summary = summarize([record(0, correct=False), *[record(1)] * 9])
    assert summary.accuracy == 0.5


def answered(problem: int, right: str, answers: Sequence[str | None]) -> list[RolloutRecord]:
    return [record(problem, answer=a, correct=a == right) for a in answers]


def test_majority_vote_by_hand() -> None:
    records = [
        *answered(0, "12", ["12", "13", "12", "14"]),  # 12 wins, right with avg@4 = 1/2
        *answered(1, "20", ["21", "21", "20", None]),  # 21 wins, wrong with avg@4 = 1/4
        *answered(2, "30", ["30", "31", "31", "30"]),  # a tie that goes to 30, right
        *answered(3, "40", [None, None, "40", None]),  # the only vote is right
        *answered(4, "50", [None] * 4),
    ]
    summary = summarize(records)
    assert summary.majority_accuracy == pytest.approx(3 / 5)
    assert summary.majority_accuracy_interval == rate_interval([1.0, 0.0, 1.0, 1.0, 0.0])
    assert summary.accuracy == pytest.approx((2 + 1 + 2 + 1 + 0) / 20)
    assert summary.pass_at_k[4] == pytest.approx(4 / 5)
    fields = json.loads(json.dumps(summary.to_json()))
    assert fields["majority_accuracy"] == summary.majority_accuracy
    assert fields["majority_accuracy_interval"] == list(summary.majority_accuracy_interval)


def test_one_sample_holds_no_vote() -> None:
    summary = summarize([record(0), record(0), record(1)])
    assert summary.majority_accuracy is None
    assert summary.majority_accuracy_interval is None


def test_a_unanimous_vote_does_not_claim_certainty() -> None:
    summary = summarize([record(problem) for problem in range(8) for _ in range(2)])
    assert summary.majority_accuracy == 1.0
    assert summary.majority_accuracy_interval == pytest.approx((0.025 ** (1 / 8), 1.0))


def test_summary_refuses_mixed_styles_and_nothing() -> None:
    with pytest.raises(ValueError, match="mix the styles"):
        summarize([record(0), record(1, style="parallel")])
    with pytest.raises(ValueError, match="no rollout records"):
        summarize([])


def test_summary_is_json() -> None:
    fields = json.loads(json.dumps(summarize([record(0), record(1)]).to_json()))
    assert fields["pass_at_k"] == {"1": 1.0}
    assert len(fields["accuracy_interval"]) == 2


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected"),
    [(4, 0, 2, 0.0), (4, 4, 1, 1.0), (4, 1, 4, 1.0), (4, 1, 1, 0.25), (4, 2, 2, 1 - 1 / 6)],
)
def test_pass_at_k_known_answers(samples: int, correct: int, k: int, expected: float) -> None:
    assert pass_at_k(samples, correct, k) == pytest.approx(expected)


@given(st.integers(1, 12), st.data())
def test_pass_at_k_grows_with_k(samples: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, samples))
    values = [pass_at_k(samples, correct, k) for k in range(1, samples + 1)]
    assert values[0] == pytest.approx(correct / samples)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))


def test_pass_at_k_refuses_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="pass@5 of 4"):
        pass_at_k(4, 1, 5)


def test_speedup_is_the_mean_of_ratios_of_means() -> None:
    baseline = [record(0, 90), record(0, 110), record(1, 100), record(2, 70)]
    parallel = [record(0, 50), record(1, 20), record(1, 30), record(7, 1)]
    speedup = token_latency_speedup(baseline, parallel)
    assert speedup.per_problem == {0: 2.0, 1: 4.0}
    assert speedup.mean == 3.0
    assert speedup.max == 4.0
    assert json.loads(json.dumps(speedup.to_json()))["per_problem"] == {"0": 2.0, "1": 4.0}


def test_correct_only_speedup_drops_wrong_rollouts_on_both_sides() -> None:
    baseline = [record(0, 100), record(0, 999, correct=False), record(1, 80, correct=False)]
    parallel = [record(0, 50), record(0, 10, correct=False), record(1, 20)]
    assert token_latency_speedup(baseline, parallel).correct_only == 2.0
    nothing_right = [dataclasses.replace(r, correct=False) for r in parallel]
    assert token_latency_speedup(baseline, nothing_right).correct_only is None


def test_speedup_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="no problem was attempted by both"):
        token_latency_speedup([record(0)], [record(1)])
    with pytest.raises(ValueError, match="problem 0"):
        token_latency_speedup([record(0)], [record(0, 0)])
    with pytest.raises(ValueError, match="no wall-clock time"):
        wall_clock_speedup([record(0)], [record(0)])


def test_wall_clock_speedup_reads_seconds() -> None:
    baseline = [record(0, seconds=3.0), record(1, seconds=1.0)]
    parallel = [record(0, seconds=1.5), record(1, seconds=2.0)]
    assert wall_clock_speedup(baseline, parallel).per_problem == {0: 2.0, 1: 0.5}


@settings(max_examples=25, deadline=None)
@given(records_strategy)
def test_summary_laws(records: list[RolloutRecord]) -> None:
    summary = summarize(records)
    assert summary == summarize(records)
    for mean, (low, high) in (
        (summary.accuracy, summary.accuracy_interval),
        (summary.activation_ratio, summary.activation_ratio_interval),
    ):
        assert 0 <= low <= high <= 1
        assert low - 1e-9 <= mean <= high + 1e-9
    if summary.majority_accuracy is not None:
        # Not pass@k: its k ends at the smallest group, while every rollout has a vote.
        solved = {r.problem for r in records if r.correct}
        assert summary.majority_accuracy <= len(solved) / summary.problems + 1e-9
    assert summary.critical_path <= summary.total_tokens
    assert 0 <= summary.acceleration_ratio < 1
    assert summary.pass_at_k[1] == pytest.approx(summary.accuracy)
    ordered = summarize(sorted(records, key=lambda r: (r.problem, r.critical_path)))
    assert ordered.accuracy_interval == pytest.approx(summary.accuracy_interval)


@settings(max_examples=25, deadline=None)
@given(records_strategy, st.integers(2, 5))
def test_speedup_scales_with_the_baseline(records: list[RolloutRecord], factor: int) -> None:
    slower = [dataclasses.replace(r, critical_path=factor * r.critical_path) for r in records]
    speedup = token_latency_speedup(slower, records)
    assert speedup.mean == pytest.approx(factor)
    assert speedup.max == pytest.approx(factor)
    assert speedup.interval == pytest.approx((factor, factor))


def test_bootstrap_is_seeded_and_about_as_wide_as_theory_says() -> None:
    values = [0.0, 1.0] * 200
    low, high = bootstrap_interval(values, seed=3)
    assert (low, high) == bootstrap_interval(values, seed=3)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)


def test_unanimous_scores_do_not_claim_certainty() -> None:
    low, high = rate_interval([1.0] * 64)
    assert high == 1.0
    assert low == pytest.approx(0.025 ** (1 / 64))
    assert rate_interval([0.0] * 64) == pytest.approx((0.0, 1 - low))


def test_difference_interval_matches_newcombe() -> None:
    # Newcombe 1998, method 10, example (a): 56/70 against 48/80.
    wilson_before, wilson_after = (0.4904, 0.7004), (0.6921, 0.8773)
    low, high = difference_interval(0.6, wilson_before, 0.8, wilson_after)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=0.002)
