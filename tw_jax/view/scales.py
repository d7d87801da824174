"""From data to pixels and round ticks: the arithmetic under the charts."""

import dataclasses
import math
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Scale:
    """A map from data to a chart's pixels.

    Attributes:
      low: data value at `start`.
      high: data value at `stop`; larger than `low`.
      start: pixel of `low`.
      stop: pixel of `high`; smaller than `start` on a vertical axis.
      log: distances are ratios; needs `low` > 0.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a data value, held inside the axis."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, target: int = 5) -> list[float]:
        """About `target` round values inside the axis."""
        return (
            log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high, target)
        )


def linear_scale(
    values: Iterable[float],
    start: float,
    stop: float,
    *,
    include: Iterable[float] = (),
    floor: float | None = None,
    target: int = 5,
) -> Scale:
    """A linear scale that holds the finite values and begins and ends on round numbers.

    Args:
      values: data; those that are not finite are ignored.
      start: pixel of the low end.
      stop: pixel of the high end.
      include: further values that the axis must hold.
      floor: the axis never begins below it.
      target: about how many ticks the ends are rounded for.
    """
    finite = [v for v in (*values, *include) if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    step = nice_step(high - low, target)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    if floor is not None and low < floor < high:
        low = floor
    return Scale(low, high, start, stop)


def log_scale(values: Iterable[float], start: float, stop: float) -> Scale:
    """A logarithmic scale that holds the finite positive values, with a little air."""
    positive = [v for v in values if math.isfinite(v) and v > 0] or [1.0, 10.0]
    return Scale(min(positive) / 1.25, max(positive) * 1.25, start, stop, log=True)


def nice_step(span: float, target: int) -> float:
    """The step among 1, 2, 5 times a power of ten that cuts `span` into about `target` pieces."""
    raw = span / max(1, target)
    power = 10.0 ** math.floor(math.log10(raw))
    return power * next(m for m in (1, 2, 5, 10) if raw <= m * power * (1 + 1e-9))


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Multiples of a nice step in [low, high]."""
    step = nice_step(high - low, target)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Rounding away the binary noise of `3 * 0.1` keeps the labels short.
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high]; with 2 and 5 times them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = range(first, last + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**d for d in decades for f in factors]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 7)]
    return ticks
