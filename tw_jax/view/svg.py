"""The few shapes that charts are made of, as escaped SVG markup.

Colours come from the page's style sheet through classes, so that dark mode and print restyle the
charts. Sizes are in user units; the page scales a chart to its column.
"""

import dataclasses
import math
from collections.abc import Iterable

from markupsafe import Markup, escape

from tw_jax.view.numbers import Formatter
from tw_jax.view.scales import Scale


@dataclasses.dataclass(frozen=True)
class Labels:
    """What a chart says about itself.

    Attributes:
      key: unique in the page; names the elements that assistive technology reads.
      title: one line.
      description: what the chart shows, in a sentence, for those who cannot see it.
      x: axis label with unit.
      y: axis label with unit.
    """

    key: str
    title: str
    description: str
    x: str
    y: str


@dataclasses.dataclass(frozen=True)
class Size:
    """A chart's size and margins in user units."""

    width: float
    height: float
    left: float = 52
    right: float = 14
    top: float = 26
    bottom: float = 44


def figure(labels: Labels, size: Size, body: Markup) -> Markup:
    """The whole chart, with the title and description that assistive technology reads."""
    return Markup(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-labelledby="{k}-t {k}-d">'
        '<title id="{k}-t">{t}</title><desc id="{k}-d">{d}</desc>{b}</svg>'
    ).format(
        w=px(size.width), h=px(size.height), k=labels.key, t=labels.title,
        d=labels.description, b=body,
    )  # fmt: skip


def axes(
    labels: Labels,
    size: Size,
    x_scale: Scale,
    y_scale: Scale,
    x_tick: Formatter,
    y_tick: Formatter,
    *,
    y_ticks: Iterable[float] | None = None,
) -> Markup:
    """Grid, ticks and axis labels; `y_ticks` replaces the vertical axis's own choice."""
    floor, right = size.height - size.bottom, size.width - size.right
    body = Markup("")
    for value in y_scale.ticks(4) if y_ticks is None else y_ticks:
        y = y_scale(value)
        body += line(size.left, y, right, y, "grid")
        body += text(size.left - 7, y + 4, y_tick(value), "tick end")
    for value in x_scale.ticks(5 if size.width > 400 else 4):
        x = x_scale(value)
        body += line(x, floor, x, floor + 4, "axis")
        body += text(x, floor + 17, x_tick(value), "tick mid")
    body += line(size.left, floor, right, floor, "axis")
    body += text((size.left + right) / 2, size.height - 7, labels.x, "label mid")
    if labels.y:
        body += text(4, 13, labels.y, "label")
    return body


def marker(shape: str, x: float, y: float, css: str, tip: str, r: float) -> Markup:
    """A marker of about radius `r`: "square", "diamond", "ring" (hollow) or "circle"."""
    if shape == "square":
        d = f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h-{2 * r}z"
    elif shape == "diamond":
        s = 1.35 * r
        d = f"M{x:.1f} {y - s:.1f}l{s} {s}l-{s} {s}l-{s} -{s}z"
    else:
        d = f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 -{2 * r} 0z"
    hollow = " hollow" if shape == "ring" else ""
    return Markup('<path class="marker {}{}" d="{}"><title>{}</title></path>').format(
        css, hollow, d, tip
    )


def bar_with_caps(x1: float, x2: float, y1: float, y2: float, css: str) -> Markup:
    """An interval, horizontal where `y1 == y2`."""
    body = line(x1, y1, x2, y2, f"whisker {css}")
    for x, y in ((x1, y1), (x2, y2)):
        across = (x, y - 3.5, x, y + 3.5) if y1 == y2 else (x - 3.5, y, x + 3.5, y)
        body += line(*across, f"whisker {css}")
    return body


def arrow(tail: tuple[float, float], head: tuple[float, float]) -> Markup:
    """A thin arrow that stops short of both markers."""
    (x1, y1), (x2, y2) = tail, head
    length = math.hypot(x2 - x1, y2 - y1)
    if length < 40:
        return Markup("")
    ux, uy = (x2 - x1) / length, (y2 - y1) / length
    x1, y1, x2, y2 = x1 + 13 * ux, y1 + 13 * uy, x2 - 14 * ux, y2 - 14 * uy
    wings = [(x2 - 8 * ux + s * 4 * uy, y2 - 8 * uy - s * 4 * ux) for s in (1, -1)]
    head_path = "M{:.1f} {:.1f}L{:.1f} {:.1f}L{:.1f} {:.1f}".format(*wings[0], x2, y2, *wings[1])
    return line(x1, y1, x2, y2, "arrow") + Markup('<path class="arrow" d="{}"/>').format(head_path)


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    """A straight stroke."""
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
        css, px(x1), px(y1), px(x2), px(y2)
    )


def text(x: float, y: float, words: str, css: str) -> Markup:
    """One line of text; the classes "mid" and "end" set where it is anchored."""
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(
        css, px(x), px(y), escape(words)
    )


def px(value: float) -> str:
    """A coordinate with a tenth of a unit of precision."""
    return f"{value:.1f}".removesuffix(".0")
