"""Axes begin and end on round numbers and hold their data."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.view.scales import Scale, linear_scale, log_scale, log_ticks, nice_ticks

finite = st.floats(-1e9, 1e9, allow_nan=False)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (97, 183, [100, 120, 140, 160, 180]),
        (0, 3, [0, 1, 2, 3]),
    ],
)
def test_ticks_known_answers(low, high, expected):
    assert nice_ticks(low, high) == expected


def test_log_ticks_are_decades_or_parts_of_them():
    assert log_ticks(0.004, 6) == [0.01, 0.1, 1.0]
    assert log_ticks(900, 20_000) == [1000, 3000, 10_000]


@given(st.lists(finite, min_size=1, max_size=8))
def test_a_linear_scale_holds_its_data(values):
    scale = linear_scale(values, 0, 100)
    slack = 1e-6 * max(map(abs, values))
    assert scale.low <= min(values) + slack
    assert scale.high >= max(values) - slack
    assert all(-1e-6 <= scale(v) <= 100 + 1e-6 for v in values)
    assert 2 <= len(scale.ticks()) <= 12


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_a_log_scale_holds_its_data(values):
    scale = log_scale(values, 0, 100)
    assert all(0 <= scale(v) <= 100 for v in values)
    assert all(scale.low <= t <= scale.high for t in scale.ticks())


def test_scales_survive_nothing_and_nonsense():
    assert linear_scale([], 0, 1).low < linear_scale([], 0, 1).high
    assert linear_scale([math.nan, 3.0, math.inf], 0, 1)(3.0) == pytest.approx(0.5)
    assert log_scale([-1.0, 0.0], 0, 1).low > 0


def test_values_outside_stay_inside_the_chart():
    scale = Scale(0, 1, 100, 0)
    assert (scale(-5), scale(0.25), scale(5)) == (100, 75, 0)
