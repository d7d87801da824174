"""Stacked areas: parts lie on top of each other and reach the whole."""

import re

import pytest

from tw_jax.view.charts import SMALL, Series
from tw_jax.view.stacked import stacked_chart
from tw_jax.view.svg import Labels

LABELS = Labels("k", "Title", "Words", "step", "seconds")


def areas(svg: str) -> list[list[tuple[float, float]]]:
    """Corners of every area."""
    paths = re.findall(r'<path class="area [^"]*" d="M([^"]*)z">', svg)
    corners = [[p.split() for p in path.split("L")] for path in paths]
    return [[(float(x), float(y)) for x, y in path] for path in corners]


def series(*parts, steps=None) -> list[Series]:
    return [
        Series(f"part {i}", f"c-hue-{i}", steps or list(range(len(ys))), ys)
        for i, ys in enumerate(parts)
    ]


def test_shares_that_add_up_fill_the_axis_and_lie_on_each_other():
    low, high = areas(stacked_chart(LABELS, series([0.25, 0.5], [0.75, 0.5]), share=True))
    top, bottom = SMALL.top, SMALL.height - SMALL.bottom
    assert [y for _, y in high[:2]] == pytest.approx([top, top])
    assert [y for _, y in low[2:]] == pytest.approx([bottom, bottom])
    assert low[:2] == list(reversed(high[2:])), "the upper part begins where the lower one ends"
    assert low[0][1] == pytest.approx(bottom - 0.25 * (bottom - top), abs=0.1)


def test_missing_numbers_count_as_nothing_and_empty_parts_are_not_drawn():
    svg = stacked_chart(LABELS, series([1.0, None, float("nan")], [0.0, 0.0, 0.0]))
    assert len(areas(svg)) == 1
    assert "nan" not in svg


def test_a_single_step_and_none_at_all():
    (area,) = areas(stacked_chart(LABELS, series([2.0], steps=[7.0])))
    assert area[0][0] < area[1][0]
    assert "no data" in stacked_chart(LABELS, [])
    assert "no data" in stacked_chart(LABELS, series([]))


def test_long_runs_stay_small_and_keep_their_mean():
    svg = stacked_chart(LABELS, series([1.0, 3.0] * 30_000))
    (area,) = areas(svg)
    assert len(svg) < 20_000
    assert len({y for _, y in area[: len(area) // 2]}) == 1, "neighbours are averaged"
