"""What RL changed: the style of thinking, or the skill within a style.

RL can raise accuracy without any better solving, by moving samples to the style that was already
the more accurate one. Accuracies measured with the style forced do not see that shift, so the two
can be told apart.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tw_jax.evals.metrics import Interval, difference_interval
from tw_jax.view.numbers import interval_of, pair_of, points, signed

STYLES = ("parallel", "sequential")


@dataclasses.dataclass(frozen=True)
class Change:
    """A share before and after, with the 95% interval of the difference."""

    before: float
    after: float
    interval: Interval

    @property
    def direction(self) -> int:
        """1 for up and -1 for down where the interval excludes zero, else 0."""
        return 1 if self.interval[0] > 0 else -1 if self.interval[1] < 0 else 0

    def sentence(self, start: str) -> str:
        """The change in words."""
        low, high = (signed(100 * bound, 1) for bound in self.interval)
        ending = "" if self.direction else ", which includes no change"
        return (
            f"{start} from {100 * self.before:.1f}% to {100 * self.after:.1f}% "
            f"({points(self.after - self.before)}; 95% interval {low} to {high}{ending})."
        )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether RL changed the style, the skill, both or neither.

    Attributes:
      style: 1 more parallel, -1 less parallel, 0 no measurable change.
      skill: per style, 1 better and -1 worse at solving once that style is forced, 0 no measurable
        change.
      headline: one sentence.
      sentences: the numbers behind it.
    """

    style: int
    skill: Mapping[str, int]
    headline: str
    sentences: tuple[str, ...]


def rl_verdict(rl: Mapping[str, Any]) -> Verdict | None:
    """Judges the summary's "rl" entry; a change counts where its 95% interval excludes zero.

    Returns:
      None where forced-style accuracies, activation ratios or their intervals are missing.
    """
    style = _change(rl, "before.activation_ratio", "after.activation_ratio")
    skills = {s: _change(rl, f"before_{s}.accuracy", f"after_{s}.accuracy") for s in STYLES}
    measured = {s: change for s, change in skills.items() if change}
    if style is None or len(measured) < len(STYLES):
        return None
    sentences = [style.sentence("The share of rollouts that think in parallel went")]
    sentences += [
        change.sentence(f"With the {name} style forced, accuracy went")
        for name, change in measured.items()
    ]
    total = pair_of(rl, "before.accuracy", "after.accuracy")
    if total:
        gap = measured["parallel"].before - measured["sequential"].before
        shift = (style.after - style.before) * gap
        sentences.append(
            "The shift of style alone, at the forced-style accuracies from before RL, would move "
            f"free-style accuracy by {points(shift)}; it moved by {points(total[1] - total[0])}."
        )
    skill = {name: change.direction for name, change in measured.items()}
    return Verdict(style.direction, skill, _headline(style.direction, skill), tuple(sentences))


def _headline(style: int, skill: Mapping[str, int]) -> str:
    better = " and ".join(name for name, direction in skill.items() if direction > 0)
    worse = " and ".join(name for name, direction in skill.items() if direction < 0)
    how = "more often parallel" if style > 0 else "less often parallel"
    if not better and not worse:
        if not style:
            return "RL changed neither the style nor the skill measurably."
        return f"RL changed the style ({how}), not the skill within a style."
    start = f"RL changed the style ({how})" if style else "RL left the style as it was"
    link = "and" if style else "but"
    if better and worse:
        return f"{start} {link} traded skill: better when {better}, worse when {worse}."
    if better:
        return f"{start} {link} improved the skill within a style ({better})."
    return f"{start} {link} made the skill within a style worse ({worse})."


def _change(rl: Mapping[str, Any], before: str, after: str) -> Change | None:
    values = pair_of(rl, before, after)
    first = interval_of(rl, f"{before}_interval")
    second = interval_of(rl, f"{after}_interval")
    if not values or not first or not second:
        return None
    return Change(*values, difference_interval(values[0], first, values[1], second))
