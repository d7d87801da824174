"""Charts as inline SVG: from numbers to markup, without script or library.

Each function takes data and labels and returns one self-contained `<svg>`, safe to embed.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from markupsafe import Markup

from tw_jax.view import svg
from tw_jax.view.numbers import Formatter, number, percent
from tw_jax.view.scales import Scale, linear_scale, log_scale

MAX_LINE_POINTS = 400
_MAX_MARKERS = 24

Axis = Literal["linear", "share", "log"]
Box = tuple[float, float, float, float]  # left, top, right, bottom

# Estimates for placing labels: the style sheet's largest chart type is this wide and high.
_CHARACTER_WIDTH, _LINE_HEIGHT = 8.0, 17.0
_LANE = 27.0


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a line chart.

    Attributes:
      name: shown in the legend.
      css: class that carries its colour.
      x: ascending.
      y: same length; None and non-finite values leave gaps.
      smooth: measured at every step: many values are drawn faintly, with a moving average on top.
        Otherwise measured now and then: few values are drawn as dots.
    """

    name: str
    css: str
    x: Sequence[float]
    y: Sequence[float | None]
    smooth: bool = True


@dataclasses.dataclass(frozen=True)
class Point:
    """One marker of a scatter plot with its 95% intervals.

    Attributes:
      label: written beside it.
      css: class that carries its colour.
      shape: "circle", "square", "diamond" or "ring".
      x: value.
      y: value.
      x_interval: (low, high); None draws no bar.
      y_interval: (low, high); None draws no bar.
    """

    label: str
    css: str
    shape: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


SMALL = svg.Size(340, 224, left=50)
LARGE = svg.Size(500, 340, left=56)


def line_chart(
    labels: svg.Labels,
    series: Sequence[Series],
    *,
    tick: Formatter = number,
    axis: Axis = "linear",
    legend: bool = True,
) -> Markup:
    """Lines over training steps.

    Args:
      labels: see `svg.Labels`.
      series: at least one with a finite value, or the chart says that there are no data.
      tick: writes the values of the vertical axis.
      axis: "share" fixes the vertical axis to 0..1; "log" makes it logarithmic where the values
        are positive and span a factor above 20.
      legend: name several lines in the chart; without it, the page does.
    """
    drawn = [_thin(s) for s in series]
    values = [y for s in drawn for y in s.y if y is not None]
    if not values:
        return svg.figure(
            labels, SMALL, svg.text(SMALL.width / 2, SMALL.height / 2, "no data", "tick mid")
        )
    size = SMALL
    y_range = (size.height - size.bottom, size.top)
    if axis == "share":
        y_scale = Scale(0, 1, *y_range)
    elif axis == "log" and min(values) > 0 and max(values) / min(values) > 20:
        y_scale = log_scale(values, *y_range)
    else:
        y_scale = linear_scale(values, *y_range, floor=0 if min(values) >= 0 else None)
    steps = [x for s in drawn for x in s.x]
    first, last = min(steps), max(steps)
    x_scale = Scale(first, last if last > first else first + 1, size.left, size.width - size.right)
    body = svg.axes(labels, size, x_scale, y_scale, number, tick)
    for line in drawn:
        if line.smooth and len(line.x) > _MAX_MARKERS:
            body += _polyline(line, line.y, x_scale, y_scale, "line raw")
            body += _polyline(line, _moving_average(line.y), x_scale, y_scale, "line")
            continue
        if line.smooth or len(line.x) > _MAX_MARKERS:
            body += _polyline(line, line.y, x_scale, y_scale, "line")
        if len(line.x) <= _MAX_MARKERS:
            for x, y in zip(line.x, line.y, strict=True):
                if y is not None:
                    tip = f"{line.name}, step {number(x)}: {tick(y)}"
                    body += svg.marker("circle", x_scale(x), y_scale(y), line.css, tip, 3.5)
    if legend and len(drawn) > 1:
        body += _legend(size, [(s.name, s.css) for s in drawn])
    return svg.figure(labels, size, body)


def scatter_chart(
    labels: svg.Labels, points: Sequence[Point], arrow: tuple[int, int] | None
) -> Markup:
    """Accuracy (a share) against a cost, with bars for the 95% intervals.

    Args:
      labels: see `svg.Labels`.
      points: drawn in order.
      arrow: indices of two points to join by an arrow.
    """
    size = LARGE
    xs = [v for p in points for v in (p.x, *(p.x_interval or ()))]
    ys = [v for p in points for v in (p.y, *(p.y_interval or ()))]
    x_scale = linear_scale(xs, size.left + 10, size.width - size.right - 10, floor=0, target=4)
    lowest = linear_scale(ys, 0, 1, include=(0.8, 1.0), floor=0, target=4).low
    y_scale = Scale(lowest, 1.0, size.height - size.bottom, size.top + 6)
    body = svg.axes(labels, size, x_scale, y_scale, number, percent)
    drawn: list[Box] = []
    if arrow:
        tail, head = ((x_scale(points[i].x), y_scale(points[i].y)) for i in arrow)
        body += svg.arrow(tail, head)
        for share in (0.1 * i for i in range(11)):
            x, y = (a + share * (b - a) for a, b in zip(tail, head, strict=True))
            drawn.append((x - 4, y - 4, x + 4, y + 4))
    for p in points:
        x, y = x_scale(p.x), y_scale(p.y)
        if p.y_interval:
            low, high = map(y_scale, p.y_interval)
            body += svg.bar_with_caps(x, x, low, high, p.css)
        if p.x_interval:
            left, right = map(x_scale, p.x_interval)
            body += svg.bar_with_caps(left, right, y, y, p.css)
        tip = f"{p.label}: accuracy {percent(p.y)}, {number(round(p.x, 1))} tokens"
        body += svg.marker(p.shape, x, y, p.css, tip, 6)
    return svg.figure(labels, size, body + _point_labels(size, points, x_scale, y_scale, drawn))


def timeline(labels: svg.Labels, units: Sequence[Mapping[str, Any]]) -> Markup:
    """Which batch row decoded which unit, and when; below, the same units one after another.

    Args:
      labels: see `svg.Labels`.
      units: {"row", "start", "end", "kind", "thread", "tokens"}, as in `tw_jax.evals.sample`.
    """
    rows = sorted({u["row"] for u in units})
    begin = min((u["start"] for u in units), default=0)
    steps = max((u["end"] + 1 for u in units), default=1) - begin
    tokens = sum(u["tokens"] for u in units)
    height = 62 + _LANE * (len(rows) + 1)
    size = svg.Size(900, height, left=92, top=4)
    x_scale = Scale(0, max(1, steps, tokens), size.left, size.width - size.right)
    y_scale = Scale(0, 1, size.height - size.bottom, size.top)
    body = svg.axes(labels, size, x_scale, y_scale, number, number, y_ticks=())
    for lane, row in enumerate(rows):
        body += svg.text(size.left - 9, _LANE * (lane + 0.5) + 9, f"row {row}", "tick end")
    last = _LANE * len(rows) + 10
    body += svg.text(size.left - 9, last + 0.5 * _LANE + 5, "end to end", "tick end")
    done = 0
    for u in units:
        name = f"thread {u['thread']}" if u["kind"] == "thread" else "sequential"
        css = "c-parallel" if u["kind"] == "thread" else "c-sequential"
        tip = f"{name}: {u['tokens']} tokens, steps {u['start']} to {u['end']}"
        top = _LANE * rows.index(u["row"]) + 6
        span = x_scale(u["start"] - begin), x_scale(u["end"] + 1 - begin)
        body += _unit_bar(span, top, f"bar {css}", name, tip)
        span = x_scale(done), x_scale(done + u["tokens"])
        body += _unit_bar(span, last, f"bar pale {css}", "", tip)
        done += u["tokens"]
    return svg.figure(labels, size, body)


def _unit_bar(span: tuple[float, float], top: float, css: str, name: str, tip: str) -> Markup:
    """A bar of the timeline, named where the name fits."""
    left, width = span[0], max(1.5, span[1] - span[0] - 1.5)
    body = Markup(
        '<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="3"><title>{}</title></rect>'
    ).format(css, svg.px(left), svg.px(top), svg.px(width), svg.px(_LANE - 7), tip)
    if name and width > _CHARACTER_WIDTH * len(name) + 12:
        body += svg.text(left + 8, top + 0.5 * _LANE + 1, name, "inbar")
    return body


def fork_lines(threads: int, critical: int, *, join: bool) -> Markup:
    """The strokes from an outline to its threads, or from the threads to what follows.

    The drawing is as wide as the row of threads and stretched to fit it: one unit per column.

    Args:
      threads: number of columns.
      critical: index of the longest thread, drawn last and strongest.
      join: flip it.
    """
    middle = threads / 2
    order = [i for i in range(threads) if i != critical] + [critical] * (0 <= critical < threads)
    body = Markup("")
    for i in order:
        x = i + 0.5
        begin, end = (x, middle) if join else (middle, x)
        css = "fork critical" if i == critical else "fork"
        body += Markup('<path class="{}" d="M{} 0C{} 17 {} 7 {} 24"/>').format(
            css, begin, begin, end, end
        )
    return Markup(
        '<svg class="forks" viewBox="0 0 {} 24" preserveAspectRatio="none" aria-hidden="true">'
        "{}</svg>"
    ).format(threads, body)


# --- pieces -------------------------------------------------------------------------------------


def _polyline(
    line: Series, ys: Sequence[float | None], x_scale: Scale, y_scale: Scale, css: str
) -> Markup:
    """One path with gaps where values are missing."""
    commands, pen_down = [], False
    for x, y in zip(line.x, ys, strict=True):
        if y is None:
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{svg.px(x_scale(x))} {svg.px(y_scale(y))}")
        pen_down = True
    return Markup('<path class="{} {}" d="{}"/>').format(css, line.css, "".join(commands))


def _legend(size: svg.Size, entries: Sequence[tuple[str, str]]) -> Markup:
    """Names at the top right; filled swatches."""
    body, x = Markup(""), size.width - size.right
    for name, css in reversed(entries):
        body += svg.text(x, 13, name, "tick end")
        x -= 5.8 * len(name) + 16
        body += Markup('<rect class="bar {}" x="{}" y="5" width="10" height="8" rx="2"/>').format(
            css, svg.px(x)
        )
        x -= 10
    return body


def _point_labels(
    size: svg.Size, points: Sequence[Point], x_scale: Scale, y_scale: Scale, drawn: Sequence[Box]
) -> Markup:
    """Writes each label where it covers nothing drawn and no other label, if there is room."""
    taken = list(drawn)
    for p in points:
        x, y = x_scale(p.x), y_scale(p.y)
        taken.append((x - 9, y - 9, x + 9, y + 9))
        if p.y_interval:
            low, high = map(y_scale, p.y_interval)
            taken.append((x - 3, high, x + 3, low))
        if p.x_interval:
            taken.append((x_scale(p.x_interval[0]), y - 3, x_scale(p.x_interval[1]), y + 3))
    body = Markup("")
    for p in points:
        x, y = x_scale(p.x), y_scale(p.y)
        width = _CHARACTER_WIDTH * len(p.label)
        # Beside the marker, or beside a horizontal bar that reaches further.
        x_left, right = x - 6, x + 6
        if p.x_interval:
            x_left = min(x_left, x_scale(p.x_interval[0]))
            right = max(right, x_scale(p.x_interval[1]))
        choices = []
        for rise in (0, -20, 20, -36, 36, -52, 52):
            middle = y + rise
            for left, css in (
                (right + 7, "label strong"),
                (x_left - 7 - width, "label strong end"),
            ):
                box = (left, middle - _LINE_HEIGHT / 2, left + width, middle + _LINE_HEIGHT / 2)
                outside = (
                    max(0, size.left - box[0]) + max(0, box[2] - size.width)
                    + max(0, size.top - 10 - box[1]) + max(0, box[3] - (size.height - size.bottom))
                )  # fmt: skip
                cost = 40 * outside + sum(_overlap(box, other) for other in taken) + abs(rise) / 10
                choices.append((cost, box, css))
        _, box, css = min(choices, key=lambda choice: choice[0])
        taken.append(box)
        at = box[2] if css.endswith("end") else box[0]
        body += svg.text(at, (box[1] + box[3]) / 2 + 4, p.label, css)
    return body


def _overlap(a: Box, b: Box) -> float:
    """Area shared by two boxes."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _thin(series: Series) -> Series:
    """Drops non-finite values and averages neighbours until a line is short enough to embed."""
    ys = [y if y is not None and math.isfinite(y) else None for y in series.y]
    pairs = list(zip(series.x, ys, strict=True))
    stride = math.ceil(len(pairs) / MAX_LINE_POINTS)
    if stride > 1:
        groups = [pairs[i : i + stride] for i in range(0, len(pairs), stride)]
        pairs = [(group[-1][0], _mean([y for _, y in group])) for group in groups]
    if not series.smooth:
        # Measurements taken now and then are joined across the steps between them.
        pairs = [pair for pair in pairs if pair[1] is not None]
    return dataclasses.replace(series, x=[p[0] for p in pairs], y=[p[1] for p in pairs])


def _mean(values: Sequence[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def _moving_average(values: Sequence[float | None]) -> list[float | None]:
    """Centred mean over about a tenth of the line; shorter windows at the ends."""
    half = max(1, len(values) // 20)
    return [_mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def ends(series: Sequence[Series], write: Callable[[float], str]) -> str:
    """First and last value of every line, for those who cannot see the chart."""
    sentences = []
    for line in series:
        present = [y for y in line.y if y is not None and math.isfinite(y)]
        if present:
            sentences.append(f"{line.name} from {write(present[0])} to {write(present[-1])}")
    return "; ".join(sentences)
