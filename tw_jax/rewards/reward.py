"""Rewards of finished rollouts: small pure functions of a few facts.

P-GRPO (arXiv 2512.07843, section 4): `r = correct + correct * min(rho * eta, rho_clip)` with the
acceleration ratio `eta = 1 - critical_path / total_tokens`, the prompt excluded.
"""

import dataclasses
from collections.abc import Mapping

from tw_jax.trajectory.metrics import acceleration_ratio


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Weights of the reward's terms; a term of weight 0 is off.

    Attributes:
      accuracy: reward of a correct answer.
      acceleration: rho, weight of the acceleration ratio of correct rollouts.
      acceleration_clip: rho_clip, the largest acceleration bonus. The paper saturates at eta 0.4
        (0.5 and 0.2), the published code at eta 0.2 (0.5 and 0.1).
      format: penalty, as a positive number, of a rollout whose blocks do not all parse strictly.
      length: penalty of correct rollouts per 1,000 tokens of critical path.
      incorrect: reward of a wrong answer.
      acceleration_from_step: steps before this one give no acceleration bonus.
    """

    accuracy: float = 1.0
    acceleration: float = 0.5
    acceleration_clip: float = 0.2
    format: float = 0.0
    length: float = 0.0
    incorrect: float = 0.0
    acceleration_from_step: int = 0


@dataclasses.dataclass(frozen=True)
class RolloutFacts:
    """What rewards depend on.

    Attributes:
      correct: the answer was graded right.
      format_valid: every parallel block parses strictly.
      total_tokens: tokens after the prompt.
      critical_path: tokens on the longest dependent chain.
    """

    correct: bool
    format_valid: bool
    total_tokens: int
    critical_path: int


def reward_terms(config: RewardConfig, facts: RolloutFacts, step: int = 0) -> Mapping[str, float]:
    """The reward's terms by name; the reward is their sum."""
    terms = {"accuracy": config.accuracy if facts.correct else config.incorrect}
    if facts.correct and step >= config.acceleration_from_step:
        eta = acceleration_ratio(facts.total_tokens, facts.critical_path)
        terms["acceleration"] = min(config.acceleration * eta, config.acceleration_clip)
    if not facts.format_valid:
        terms["format"] = -config.format
    if facts.correct:
        terms["length"] = -config.length * facts.critical_path / 1000
    return terms


def reward(config: RewardConfig, facts: RolloutFacts, step: int = 0) -> float:
    """Sum of the terms."""
    return sum(reward_terms(config, facts, step).values())
