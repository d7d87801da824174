"""Rewards of finished rollouts: the sum of a few terms, each a pure function of a few facts.

P-GRPO (arXiv 2512.07843, section 4): `r = correct + correct * min(rho * eta, rho_clip)` with the
acceleration ratio `eta = 1 - critical_path / total_tokens`, the prompt excluded.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from tw_jax.config_fields import SHORTHAND
from tw_jax.rewards.facts import GroupFacts, RolloutFacts, group_facts
from tw_jax.rewards.schedule import Schedule, share_at
from tw_jax.rewards.terms import (
    TERMS,
    AccelerationTerm,
    AccuracyTerm,
    FormatTerm,
    GroupLengthTerm,
    LatencyTerm,
    LengthTerm,
    OverlongTerm,
    ParallelTerm,
    Term,
)

PresetName = Literal["paper", "code", "apr", "papo", "npr_zero", "parallel_r1", "dapo"]
PRESETS: Mapping[PresetName, Mapping[str, Term]] = {
    # ThreadWeaver as the paper states it, and as its published code computes it.
    "paper": {"accuracy": AccuracyTerm(), "acceleration": AccelerationTerm()},
    "code": {
        "accuracy": AccuracyTerm(incorrect=-1.0),
        "acceleration": AccelerationTerm(clip=0.1),
    },
    "apr": {"accuracy": AccuracyTerm()},
    # NPR's third stage: only what passes the schema's filter can be right.
    "papo": {"accuracy": AccuracyTerm(incorrect=-1.0, needs="format", unmet=-1.0)},
    # NPR's first stage as its paper states it: the format's fault, or the answer's +-1.
    "npr_zero": {
        "accuracy": AccuracyTerm(incorrect=-1.0, needs="block"),
        "format": FormatTerm(1.0, "npr"),
    },
    # Parallel-R1's second stage: 8 steps for the answer, 2 for the answer and blocks.
    "parallel_r1": {
        "accuracy": AccuracyTerm(incorrect=-1.0),
        "parallel": ParallelTerm(0.2, Schedule("alternate")),
    },
    "dapo": {"accuracy": AccuracyTerm(incorrect=-1.0), "overlong": OverlongTerm(1.0)},
}


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The terms of the reward; `reward=code` is short for `reward.preset`.

    A term that is given takes the place of the preset's term of that name as a whole: what it
    leaves out has the defaults shown here. `reward.acceleration=0` switches a term off;
    `reward.format=0.25` is short for `reward.format.weight`.

    Attributes:
      preset: the terms that are not given: "paper" and "code" are ThreadWeaver's, the others those
        of the systems they are named after; docs/rewards.md lists them.
      accuracy: see `AccuracyTerm`; null takes the preset's.
      acceleration: see `AccelerationTerm`; null takes the preset's.
      latency: see `LatencyTerm`; null takes the preset's.
      format: see `FormatTerm`; null takes the preset's.
      parallel: see `ParallelTerm`; null takes the preset's.
      length: see `LengthTerm`; null takes the preset's.
      group_length: see `GroupLengthTerm`; null takes the preset's.
      overlong: see `OverlongTerm`; null takes the preset's.
    """

    preset: PresetName = dataclasses.field(default="paper", metadata={SHORTHAND: True})
    accuracy: AccuracyTerm | None = None
    acceleration: AccelerationTerm | None = None
    latency: LatencyTerm | None = None
    format: FormatTerm | None = None
    parallel: ParallelTerm | None = None
    length: LengthTerm | None = None
    group_length: GroupLengthTerm | None = None
    overlong: OverlongTerm | None = None

    @property
    def terms(self) -> Mapping[str, Term]:
        """The terms that count, by name."""
        preset = PRESETS[self.preset]
        given: Mapping[str, Term | None] = {
            "accuracy": self.accuracy,
            "acceleration": self.acceleration,
            "latency": self.latency,
            "format": self.format,
            "parallel": self.parallel,
            "length": self.length,
            "group_length": self.group_length,
            "overlong": self.overlong,
        }
        chosen = {name: preset.get(name) if term is None else term for name, term in given.items()}
        return {
            name: term
            for name, term in chosen.items()
            if term is not None and (term.weight or name == "accuracy")
        }


def reward_terms(
    config: RewardConfig, facts: RolloutFacts, group: GroupFacts, step: int = 0
) -> Mapping[str, float]:
    """The values of all terms that count, by name; the reward is their sum."""
    return {
        name: share_at(term.schedule, step) * TERMS[name](term, facts, group)
        for name, term in config.terms.items()
    }


def group_reward_terms(
    config: RewardConfig, rollouts: Sequence[RolloutFacts], step: int = 0
) -> list[Mapping[str, float]]:
    """`reward_terms` of every rollout of one group."""
    group = group_facts(rollouts)
    return [reward_terms(config, facts, group, step) for facts in rollouts]


def reward(
    config: RewardConfig, facts: RolloutFacts, group: GroupFacts | None = None, step: int = 0
) -> float:
    """Sum of the terms; a rollout without a group is its own."""
    group = group_facts([facts]) if group is None else group
    return sum(reward_terms(config, facts, group, step).values())
