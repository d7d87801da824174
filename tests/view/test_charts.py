"""Charts are well-formed SVG whatever the numbers and texts."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tw_jax.view import charts
from tw_jax.view.histogram import Mark, histogram
from tw_jax.view.numbers import times
from tw_jax.view.svg import Labels

HOSTILE = "<script>alert(\"x\")</script> & 'quotes'"
LABELS = Labels("k", HOSTILE, HOSTILE, "x axis", "y axis")

value = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True, width=32))


def parse(markup) -> ET.Element:
    """The chart as XML; attributes hold no number that is not finite."""
    root = ET.fromstring(str(markup))
    for element in root.iter():
        assert element.tag != "script"
        for name, text in element.attrib.items():
            if name in ("d", "x", "y", "width", "height", "x1", "x2", "y1", "y2"):
                assert not re.search("nan|inf", text)
    return root


def texts(root: ET.Element) -> list[str]:
    return [e.text or "" for e in root.iter() if e.tag == "text"]


@settings(max_examples=40, deadline=None)
@given(st.lists(value, max_size=60), st.sampled_from(["linear", "share", "log"]), st.booleans())
def test_line_charts_take_any_values(values, axis, smooth):
    line = charts.Series(HOSTILE, "c-after", range(len(values)), values, smooth)
    other = charts.Series("other", "c-before", range(len(values)), values)
    parse(charts.line_chart(LABELS, [line, other], axis=axis))


def test_a_chart_names_itself_and_its_axes():
    root = parse(charts.line_chart(LABELS, [charts.Series("a", "c", [0, 1], [0.0, 2.0])]))
    assert root.attrib["role"] == "img"
    named = root.attrib["aria-labelledby"].split()
    assert [e.attrib["id"] for e in root if "id" in e.attrib] == named
    assert root[0].text == HOSTILE
    assert {"x axis", "y axis"} <= set(texts(root))


def test_long_lines_are_thinned():
    steps = range(100_000)
    line = charts.Series("loss", "c", steps, [float(s) for s in steps])
    assert len(charts.line_chart(LABELS, [line])) < 30_000


def test_without_data_the_chart_says_so():
    assert texts(parse(charts.line_chart(LABELS, []))) == ["no data"]


def test_scatter_draws_every_point_and_label():
    points = [
        charts.Point("sequential", "c-sequential", "square", 160, 0.95, (158, 163), (0.9, 1.0)),
        charts.Point("parallel", "c-parallel", "circle", 118, 0.96, None, (0.91, 1.0)),
        charts.Point(HOSTILE, "c-before", "ring", 139, 0.55),
        charts.Point("after", "c-after", "diamond", 118, 0.95),
    ]
    root = parse(charts.scatter_chart(LABELS, points, (2, 3)))
    markers = [e for e in root.iter() if "marker" in e.attrib.get("class", "")]
    assert len(markers) == 4
    assert {p.label for p in points} <= set(texts(root))


def test_histogram_counts_every_value_once():
    values = [1.0, 1.2, 1.2, 1.3, 2.0, math.nan]
    marks = [Mark(1.0, "no gain", "rule faint"), Mark(1.34, "mean 1.34×")]
    root = parse(histogram(LABELS, values, marks, tick=times))
    bars = [e for e in root.iter() if e.attrib.get("class", "").startswith("bar")]
    counts = [int(bar[0].text.rpartition(": ")[2]) for bar in bars]
    assert sum(counts) == 5
    assert {"no gain", "mean 1.34×"} <= set(texts(root))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40))
def test_histograms_take_any_ratios(values):
    mean = Mark(sum(values) / len(values), "mean")
    parse(histogram(LABELS, values, [mean], low=0.95))


def test_timeline_has_a_lane_per_row_and_one_end_to_end():
    units = [
        {"row": 3, "start": 10, "end": 19, "kind": "segment", "thread": 0, "tokens": 10},
        {"row": 3, "start": 20, "end": 49, "kind": "thread", "thread": 1, "tokens": 30},
        {"row": 7, "start": 20, "end": 39, "kind": "thread", "thread": 2, "tokens": 20},
    ]
    root = parse(charts.timeline(LABELS, units))
    assert {"row 3", "row 7", "end to end", "thread 1", "thread 2"} <= set(texts(root))
    bars = [e for e in root.iter() if e.attrib.get("class", "").startswith("bar")]
    assert len(bars) == 2 * len(units)
    widths = [float(b.attrib["width"]) for b in bars if "pale" in b.attrib["class"]]
    assert widths[1] / widths[2] == pytest.approx(1.5, rel=0.02)
    parse(charts.timeline(LABELS, []))


def test_the_critical_fork_is_drawn_on_top():
    root = parse(charts.fork_lines(3, 1, join=False))
    assert [e.attrib["class"] for e in root] == ["fork", "fork", "fork critical"]
