"""The terms of a reward: small pure functions of a term's settings and a few facts, by name.

Every function takes (settings, facts of the rollout, facts of its group) and returns what it adds
to the rollout's reward; `TERMS` names them. Adding a term takes settings, a function, an entry, and
a field of `RewardConfig`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from tw_jax.config_checks import require_at_least, require_share
from tw_jax.config_fields import SHORTHAND
from tw_jax.rewards.facts import GroupFacts, RolloutFacts
from tw_jax.rewards.schedule import Schedule

_EPSILON = 1e-6  # keeps the published group penalty defined at a threshold of 1


def _weight(default: float) -> float:
    """The field that a plain number in place of a term means."""
    return dataclasses.field(default=default, metadata={SHORTHAND: True})


class _Finite:
    """Refuses numbers that would put NaN into every parameter."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name}={value}: must be a finite number")


class _Clipped(_Finite):
    """Refuses a bonus whose limit would turn it into a penalty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, clip=0)


@dataclasses.dataclass(frozen=True)
class AccuracyTerm(_Finite):
    """Reward of the answer.

    Attributes:
      weight: reward of a right answer. A grader's score s between 0 and 1 earns
        `incorrect + s * (weight - incorrect)`.
      incorrect: reward of a wrong answer.
      ungraded: reward where the grader failed; null takes that of a wrong answer.
      needs: what an answer must come with to count at all: "nothing"; "format": all blocks parse
        strictly; "block": there is a block, and all parse strictly.
      unmet: reward of a response that lacks what is needed.
      schedule: see `Schedule`.
    """

    weight: float = _weight(1.0)
    incorrect: float = 0.0
    ungraded: float | None = None
    needs: Literal["nothing", "format", "block"] = "nothing"
    unmet: float = 0.0
    schedule: Schedule = Schedule()


@dataclasses.dataclass(frozen=True)
class AccelerationTerm(_Clipped):
    """Bonus of correct rollouts, `min(weight * eta, clip)` with the acceleration ratio eta.

    The paper's 0.5 and 0.2 saturate at eta 0.4. The published code computes
    `0.5 * min(eta, 0.2)`: weight 0.5 and clip 0.1.

    Attributes:
      weight: rho.
      clip: rho_clip, the largest bonus.
      schedule: see `Schedule`.
    """

    weight: float = _weight(0.5)
    clip: float = 0.2
    schedule: Schedule = Schedule()


@dataclasses.dataclass(frozen=True)
class LatencyTerm(_Clipped):
    """Bonus of correct rollouts that are faster than their group, malus of slower ones.

    `weight * (1 - critical_path / mean)`, kept within -clip..clip. The mean is that of the group's
    correct rollouts. Unlike the acceleration ratio it cannot be raised by writing more.

    Attributes:
      weight: of the relative difference.
      clip: largest bonus and malus.
      schedule: see `Schedule`.
    """

    weight: float = _weight(0.0)
    clip: float = 0.2
    schedule: Schedule = Schedule()


@dataclasses.dataclass(frozen=True)
class FormatTerm(_Finite):
    """Penalty of responses whose blocks do not all parse strictly.

    Attributes:
      weight: the penalty, as a positive number; of a ladder, what its rungs are multiplied with.
      ladder: "flat" takes 1 off for anything; "npr" grades the fault as NPR (arXiv 2512.07461)
        does: 2.0 an empty response, 1.5 no block, 1.0 broken structure, 0.4 an empty plan or
        thread, 0.2 white space.
      schedule: see `Schedule`.
    """

    weight: float = _weight(0.0)
    ladder: Literal["flat", "npr"] = "flat"
    schedule: Schedule = Schedule()


@dataclasses.dataclass(frozen=True)
class ParallelTerm(_Finite):
    """Bonus of correct rollouts with a block, all of whose blocks parse strictly.

    Attributes:
      weight: the bonus.
      schedule: see `Schedule`.
    """

    weight: float = _weight(0.0)
    schedule: Schedule = Schedule()


@dataclasses.dataclass(frozen=True)
class LengthTerm(_Finite):
    """Penalty of correct rollouts by the length of their critical path.

    Attributes:
      weight: penalty per 1,000 tokens.
      schedule: see `Schedule`.
    """

    weight: float = _weight(0.0)
    schedule: Schedule = Schedule()


@dataclasses.dataclass(frozen=True)
class GroupLengthTerm(_Finite):
    """Penalty of rollouts longer than the group's shortest correct one, where most are correct.

    ThreadWeaver's published code: with accuracy a of the group at least tau,
    `weight * (a - tau) / (1 - tau)` times `(critical_path - shortest) / span_tokens` within 0..1.

    Attributes:
      weight: the largest penalty (beta; 0.2 in the code).
      from_accuracy: tau, the accuracy from which groups are penalised.
      span_tokens: excess length that earns the whole penalty.
      schedule: see `Schedule`.
    """

    weight: float = _weight(0.0)
    from_accuracy: float = 0.8
    span_tokens: int = 10_000
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self, "from_accuracy")
        require_at_least(self, span_tokens=1)


@dataclasses.dataclass(frozen=True)
class OverlongTerm(_Finite):
    """DAPO's soft punishment of overlong responses (arXiv 2503.14476, eq. 13).

    Nothing up to `buffer_tokens` before the limit, from there in a line to the whole penalty at the
    limit.

    Attributes:
      weight: the penalty at the limit.
      buffer_tokens: length of the interval before it; null takes a fifth of the limit, as DAPO does
        (4,096 of 20,480).
      limit_tokens: the limit, in tokens after the prompt; null takes
        `sampling.max_response_tokens`.
      schedule: see `Schedule`.
    """

    weight: float = _weight(0.0)
    buffer_tokens: int | None = None
    limit_tokens: int | None = None
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, buffer_tokens=1, limit_tokens=1)


Term = (
    AccuracyTerm
    | AccelerationTerm
    | LatencyTerm
    | FormatTerm
    | ParallelTerm
    | LengthTerm
    | GroupLengthTerm
    | OverlongTerm
)
TermFunction = Callable[[Any, RolloutFacts, GroupFacts], float]


def accuracy(term: AccuracyTerm, facts: RolloutFacts, group: GroupFacts) -> float:
    """See `AccuracyTerm`."""
    del group
    strict = facts.format_valid and (term.needs == "format" or facts.has_block)
    if term.needs != "nothing" and not strict:
        return term.unmet
    if facts.grading_failure is not None and term.ungraded is not None:
        return term.ungraded
    return term.incorrect + facts.credit * (term.weight - term.incorrect)


def acceleration(term: AccelerationTerm, facts: RolloutFacts, group: GroupFacts) -> float:
    """See `AccelerationTerm`."""
    del group
    return min(term.weight * facts.acceleration_ratio, term.clip) if facts.correct else 0.0


def latency(term: LatencyTerm, facts: RolloutFacts, group: GroupFacts) -> float:
    """See `LatencyTerm`."""
    if not facts.correct or not group.mean_critical_path:
        return 0.0
    gain = term.weight * (1 - facts.critical_path / group.mean_critical_path)
    return min(max(gain, -term.clip), term.clip)


def format_penalty(term: FormatTerm, facts: RolloutFacts, group: GroupFacts) -> float:
    """See `FormatTerm`."""
    del group
    if term.ladder == "npr":
        return -term.weight * _npr_fault(facts)
    return 0.0 if facts.format_valid else -term.weight


def _npr_fault(facts: RolloutFacts) -> float:
    if facts.total_tokens <= 1:  # the end of text alone
        return 2.0
    if not facts.has_block and facts.format_valid:
        return 1.5
    if facts.format_valid:
        return 0.0
    return max(map(_fault_of_kind, facts.format_breaks), default=1.0)


def _fault_of_kind(kind: str) -> float:
    if kind == "white_space":
        return 0.2
    return 0.4 if kind.startswith("empty_") else 1.0


def parallel(term: ParallelTerm, facts: RolloutFacts, group: GroupFacts) -> float:
    """See `ParallelTerm`."""
    del group
    return term.weight if facts.correct and facts.has_block and facts.format_valid else 0.0


def length(term: LengthTerm, facts: RolloutFacts, group: GroupFacts) -> float:
    """See `LengthTerm`."""
    del group
    return -term.weight * facts.critical_path / 1000 if facts.correct else 0.0


def group_length(term: GroupLengthTerm, facts: RolloutFacts, group: GroupFacts) -> float:
    """See `GroupLengthTerm`."""
    threshold = term.from_accuracy
    if group.shortest_critical_path is None or group.accuracy < threshold:
        return 0.0
    strength = (group.accuracy - threshold + _EPSILON) / (1 - threshold + _EPSILON)
    excess = (facts.critical_path - group.shortest_critical_path) / term.span_tokens
    return -term.weight * strength * min(max(excess, 0.0), 1.0)


def overlong(term: OverlongTerm, facts: RolloutFacts, group: GroupFacts) -> float:
    """See `OverlongTerm`."""
    del group
    limit = facts.token_budget if term.limit_tokens is None else term.limit_tokens
    if limit is None:
        return 0.0
    buffer = max(limit // 5, 1) if term.buffer_tokens is None else term.buffer_tokens
    excess = (facts.total_tokens - (limit - buffer)) / buffer
    return -term.weight * min(max(excess, 0.0), 1.0)


TERMS: Mapping[str, TermFunction] = {
    "accuracy": accuracy,
    "acceleration": acceleration,
    "latency": latency,
    "format": format_penalty,
    "parallel": parallel,
    "length": length,
    "group_length": group_length,
    "overlong": overlong,
}
