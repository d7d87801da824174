"""Tiles and table say what the summary says, and leave out what it lacks."""

import pytest

from tw_jax.view.numbers import duration, number, percent_range, signed, value_of
from tw_jax.view.story import before_after_rows, headline_tiles, run_facts

SUMMARY = {
    "sft": {
        "sequential": {"accuracy": 0.98, "critical_path": 158.0},
        "parallel": {"accuracy": 0.97, "accuracy_interval": [0.95, 0.985], "critical_path": 110.0,
                     "n": 512},
        "token_latency_speedup": 1.4364,
        "token_latency_speedup_details": {"interval": [1.43, 1.44]},
    },
    "rl": {
        "before": {"accuracy": 0.43, "critical_path": 134.0, "activation_ratio": 0.5},
        "after": {"accuracy": 0.69, "accuracy_interval": [0.65, 0.73], "critical_path": 111.0,
                  "activation_ratio": 0.96},
    },
    "minutes": 8.04,
    "seed": 0,
    "logprob_max_abs_diff": 2e-6,
}  # fmt: skip


def test_tiles():
    tiles = {tile.name: tile for tile in headline_tiles(SUMMARY)}
    latency = tiles["Token-latency speedup"]
    assert (latency.value, latency.interval) == ("1.44×", "1.43\N{EN DASH}1.44×")
    assert latency.context == "critical path 158 sequential, 110 parallel tokens"
    assert tiles["Accuracy, thinking in parallel"].interval == "95.0\N{EN DASH}98.5%"
    assert tiles["Critical path through RL"].value == "\N{MINUS SIGN}17%"
    accuracy = tiles["Accuracy before and after RL"].value
    assert accuracy.replace("\N{THIN SPACE}", " ") == "43 → 69%"
    assert "Wall-clock speedup" not in tiles
    assert headline_tiles({}) == []


def test_rows():
    rows = {(row.name, row.note): row for row in before_after_rows(SUMMARY["rl"])}
    accuracy = rows["Accuracy", "style free"]
    assert (accuracy.before.value, accuracy.before.interval) == ("43.0%", "")
    assert accuracy.after.interval == "65.0\N{EN DASH}73.0%"
    assert accuracy.change == "+26.0 points"
    assert rows["Critical path", "tokens"].change == "\N{MINUS SIGN}17.2%"
    assert ("Accuracy", "forced parallel") not in rows
    assert ("Accuracy", "majority vote") not in rows
    assert before_after_rows({}) == []


def test_majority_votes_have_a_row_below_accuracy():
    side = {"accuracy": 0.4, "majority_accuracy": 0.5, "majority_accuracy_interval": [0.4, 0.6]}
    one_sample = {"accuracy": 0.4, "majority_accuracy": None, "majority_accuracy_interval": None}
    rows = before_after_rows({"before": side, "after": side | {"majority_accuracy": 0.55}})
    assert [row.note for row in rows[:2]] == ["style free", "majority vote"]
    assert (rows[1].before.value, rows[1].before.interval) == ("50.0%", "40.0\N{EN DASH}60.0%")
    assert rows[1].change == "+5.0 points"
    assert len(before_after_rows({"before": one_sample, "after": one_sample})) == 1


def test_facts():
    assert run_facts(SUMMARY) == [
        ("rollouts per style", "512"),
        ("run time", "8.0 minutes"),
        ("seed", "0"),
        ("largest log-probability gap, sampler to trainer", "2.0e\N{MINUS SIGN}06"),
    ]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number(12345.6), "12,346"),
        (number(-0.25), "\N{MINUS SIGN}0.25"),
        (signed(0.004, 1), "0.0"),
        (signed(-3, 0), "\N{MINUS SIGN}3"),
        (signed(1234.5, 1), "+1,234.5"),
        (percent_range(None), ""),
        (duration(200), "3.3 hours"),
    ],
)
def test_numbers_are_written_as_people_write_them(written, expected):
    assert written == expected


def test_lookups_survive_missing_and_odd_values():
    tree = {"a": {"b": float("nan"), "c": None, "d": [1]}}
    assert [value_of(tree, path) for path in ("a.b", "a.c", "a.d", "a.x", "x.y")] == [None] * 5
