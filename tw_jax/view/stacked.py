"""How a whole is divided over training steps: stacked areas as inline SVG."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from tw_jax.view import svg
from tw_jax.view.charts import SMALL, Series
from tw_jax.view.numbers import Formatter, number
from tw_jax.view.scales import Scale, linear_scale

_MOST_COLUMNS = 120


def stacked_chart(
    labels: svg.Labels,
    series: Sequence[Series],
    *,
    tick: Formatter = number,
    share: bool = False,
) -> Markup:
    """Parts of a whole, one on top of the other; the first lies at the bottom.

    Args:
      labels: see `svg.Labels`.
      series: the parts, over the same steps; what is missing or not finite counts as 0.
      tick: writes the values of the vertical axis.
      share: the whole is 1, and so is the top of the axis.
    """
    columns = _columns([[_finite(y) for y in part.y] for part in series])
    steps = _last_of_groups(series[0].x, len(columns)) if series else []
    if not columns:
        return svg.figure(
            labels, SMALL, svg.text(SMALL.width / 2, SMALL.height / 2, "no data", "tick mid")
        )
    size = SMALL
    y_range = (size.height - size.bottom, size.top)
    wholes = [sum(column) for column in columns]
    y_scale = Scale(0, 1, *y_range) if share else linear_scale([0, *wholes], *y_range, floor=0)
    first = steps[0]
    x_scale = Scale(first, steps[-1] if steps[-1] > first else first + 1, size.left,
                    size.width - size.right)  # fmt: skip
    body = Markup("")
    floor = [0.0] * len(columns)
    for index, part in enumerate(series):
        top = [low + column[index] for low, column in zip(floor, columns, strict=True)]
        if any(high > low for low, high in zip(floor, top, strict=True)):
            tip = f"{part.name}: last {tick(columns[-1][index])}"
            body += _area(steps, floor, top, x_scale, y_scale, part.css, tip)
        floor = top
    return svg.figure(labels, size, svg.axes(labels, size, x_scale, y_scale, number, tick) + body)


def _area(
    steps: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    x_scale: Scale,
    y_scale: Scale,
    css: str,
    tip: str,
) -> Markup:
    xs = [x_scale(step) for step in steps]
    if len(xs) == 1:  # a step alone still has a width
        xs, low, high = [xs[0], x_scale.stop], [low[0]] * 2, [high[0]] * 2
    there = [f"{svg.px(x)} {svg.px(y_scale(y))}" for x, y in zip(xs, high, strict=True)]
    back = [f"{svg.px(x)} {svg.px(y_scale(y))}" for x, y in zip(xs, low, strict=True)]
    return Markup('<path class="area {}" d="M{}z"><title>{}</title></path>').format(
        css, "L".join([*there, *reversed(back)]), tip
    )


def _columns(parts: Sequence[Sequence[float]]) -> list[list[float]]:
    """One list of parts per step, neighbours averaged until they are few enough to embed."""
    steps = len(parts[0]) if parts else 0
    stride = max(1, math.ceil(steps / _MOST_COLUMNS))
    return [
        [sum(part[i : i + stride]) / len(part[i : i + stride]) for part in parts]
        for i in range(0, steps, stride)
    ]


def _last_of_groups(steps: Sequence[float], groups: int) -> list[float]:
    stride = max(1, math.ceil(len(steps) / _MOST_COLUMNS))
    found = [steps[min(i + stride, len(steps)) - 1] for i in range(0, len(steps), stride)]
    assert len(found) == groups
    return found


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0
