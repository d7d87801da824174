"""What the rollouts of an RL step are worth: facts, rewards, and what people are shown of them."""

import collections
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from tw_jax.rewards.facts import RolloutFacts
from tw_jax.rewards.graders import Grade
from tw_jax.rewards.grading import rollout_facts
from tw_jax.rewards.reward import group_reward_terms
from tw_jax.rollout.rollout import Rollout
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.rollout_samples import Judged
from tw_jax.train.run_dir import LoadedModel


def step_rewards(
    config: RLConfig,
    model: LoadedModel,
    rollouts: Sequence[Rollout],
    grades: Sequence[Grade],
    step: int,
) -> tuple[list[RolloutFacts], Float[np.ndarray, "prompts group_size"]]:
    """What rewards depend on, per rollout, and the rewards."""
    budget = config.sampling.max_response_tokens
    facts = [
        rollout_facts(rollout, grade, model.schema, token_budget=budget)
        for rollout, grade in zip(rollouts, grades, strict=True)
    ]
    rewards = [sum(terms.values()) for terms in _terms(config, facts, step)]
    return facts, np.reshape(rewards, (-1, config.group_size))


def reward_metrics(config: RLConfig, facts: Sequence[RolloutFacts], step: int) -> dict[str, float]:
    """Mean of every reward term that counts, and the share of every way in which grading failed."""
    means: collections.defaultdict[str, float] = collections.defaultdict(float)
    for terms in _terms(config, facts, step):
        for name, value in terms.items():
            means[f"reward/{name}"] += value / len(facts)
    means["ungraded"] = 0.0
    for fact in facts:
        if fact.grading_failure is not None:
            means["ungraded"] += 1 / len(facts)
            means[f"ungraded/{fact.grading_failure}"] += 1 / len(facts)
    return dict(means)


def judged_rollouts(
    config: RLConfig,
    facts: Sequence[RolloutFacts],
    grades: Sequence[Grade],
    advantages: Float[np.ndarray, "prompts group_size"],
    step: int,
) -> list[Judged]:
    """What is kept of every rollout beside itself, for people to look at."""
    return [
        Judged(
            reward=sum(terms.values()),
            terms=terms,
            advantage=float(advantage),
            answer=grade.extracted,
            correct=fact.correct,
            format_valid=fact.format_valid,
        )
        for fact, grade, advantage, terms in zip(
            facts, grades, advantages.reshape(-1), _terms(config, facts, step), strict=True
        )
    ]


def _terms(config: RLConfig, facts: Sequence[RolloutFacts], step: int) -> list[Mapping[str, float]]:
    """The reward terms of every rollout, group by group."""
    size = config.group_size
    return [
        terms
        for start in range(0, len(facts), size)
        for terms in group_reward_terms(config.reward, facts[start : start + size], step)
    ]
