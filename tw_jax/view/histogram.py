"""Histograms as inline SVG, with single values pointed out."""

import dataclasses
import math
from collections.abc import Sequence

from markupsafe import Markup

from tw_jax.view import svg
from tw_jax.view.charts import LARGE
from tw_jax.view.numbers import Formatter, number
from tw_jax.view.scales import linear_scale


@dataclasses.dataclass(frozen=True)
class Mark:
    """One value that a histogram points out.

    Attributes:
      value: where.
      name: written beside it.
      css: class of its line.
    """

    value: float
    name: str
    css: str = "rule"


def histogram(
    labels: svg.Labels,
    values: Sequence[float],
    marks: Sequence[Mark],
    *,
    tick: Formatter = number,
    size: svg.Size = LARGE,
    low: float | None = None,
) -> Markup:
    """How values are distributed.

    Args:
      labels: see `svg.Labels`.
      values: those that are not finite are ignored.
      marks: drawn as vertical lines.
      tick: writes the values of the horizontal axis.
      size: of the chart.
      low: the horizontal axis reaches down to this at least.
    """
    finite = [v for v in values if math.isfinite(v)]
    include = [mark.value for mark in marks] + ([] if low is None else [low])
    x_scale = linear_scale(
        finite, size.left, size.width - size.right, include=include, floor=0, target=6
    )
    bins = _bin_count(len(finite))
    width = (x_scale.high - x_scale.low) / bins
    counts = [0] * bins
    for value in finite:
        counts[min(bins - 1, int((value - x_scale.low) / width))] += 1
    y_range = (size.height - size.bottom, size.top + 22)
    y_scale = linear_scale([0, max(counts, default=1), 1], *y_range, target=4)
    whole = [t for t in y_scale.ticks(4) if t == int(t)]
    body = svg.axes(labels, size, x_scale, y_scale, tick, number, y_ticks=whole)
    for i, count in enumerate(counts):
        if count:
            left = x_scale.low + i * width
            x, right, y = x_scale(left), x_scale(left + width), y_scale(count)
            tip = f"{tick(left)} to {tick(left + width)}: {count}"
            body += Markup(
                '<rect class="bar c-parallel" x="{}" y="{}" width="{}" height="{}">'
                "<title>{}</title></rect>"
            ).format(
                svg.px(x + 0.75), svg.px(y), svg.px(right - x - 1.5), svg.px(y_range[0] - y), tip
            )
    for row, mark in enumerate(marks):
        x = x_scale(mark.value)
        near_end = x > size.width * 0.7
        body += svg.line(x, y_range[0], x, size.top - 6 + 14 * row, mark.css)
        anchor = "label end" if near_end else "label"
        body += svg.text(x + (-5 if near_end else 5), size.top + 4 + 14 * row, mark.name, anchor)
    return svg.figure(labels, size, body)


def _bin_count(values: int) -> int:
    """Bins that show a shape without drawing single problems as towers."""
    return min(24, max(6, round(2 * math.sqrt(values)))) if values else 6
