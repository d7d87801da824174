"""Reading numbers out of a summary, and writing them the way people write numbers."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from tw_jax.evals.metrics import Interval

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
EN_DASH, ARROW = "\N{EN DASH}", "\N{THIN SPACE}\N{RIGHTWARDS ARROW}\N{THIN SPACE}"

Formatter = Callable[[float], str]


def lookup(tree: Any, path: str) -> Any:
    """The value under dotted keys, or None where any of them is missing."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def value_of(tree: Any, path: str) -> float | None:
    """A finite number under dotted keys, or None."""
    found = lookup(tree, path)
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def interval_of(tree: Any, path: str) -> Interval | None:
    """A (low, high) pair under dotted keys."""
    found = lookup(tree, path)
    return (float(found[0]), float(found[1])) if isinstance(found, list | tuple) else None


def pair_of(tree: Any, before: str, after: str) -> tuple[float, float] | None:
    """Two numbers under dotted keys, or None where either is missing."""
    first, second = value_of(tree, before), value_of(tree, after)
    return None if first is None or second is None else (first, second)


def number(value: float) -> str:
    """`12,300`, `0.25`, with a real minus sign."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", MINUS)


def percent(value: float) -> str:
    """A share as a whole percentage."""
    return f"{100 * value:.0f}%".replace("-", MINUS)


def times(value: float) -> str:
    """A ratio: `1.5×`."""
    return f"{value:.3g}{TIMES}"


def signed(value: float, digits: int) -> str:
    """A difference with its sign; what rounds to zero has none."""
    text = f"{value:+,.{digits}f}".replace("-", MINUS)
    return text[1:] if float(f"{value:.{digits}f}") == 0 else text


def points(change: float) -> str:
    """A difference of shares: `+12.5 points`."""
    return f"{signed(100 * change, 1)} points"


def percent_range(interval: Interval | None) -> str:
    """`68.2–79.0%`; empty for None."""
    return f"{100 * interval[0]:.1f}{EN_DASH}{100 * interval[1]:.1f}%" if interval else ""


def duration(minutes: float) -> str:
    """`7.5 minutes`, `2.1 hours`."""
    return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.1f} minutes"
