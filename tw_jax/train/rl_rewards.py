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

Terms = Sequence[Mapping[str, float]]  # by name, one mapping per rollout


def step_rewards(
    config: RLConfig,
    model: LoadedModel,
    rollouts: Sequence[Rollout],
    grades: Sequence[Grade],
    step: int,
) -> tuple[list[RolloutFacts], Terms, Float[np.ndarray, "groups group_size"]]:
    """What rewards depend on, their terms, and their sums; rollouts are given group by group."""
    budget, size = config.sampling.max_response_tokens, config.group_size
    facts = [
        rollout_facts(rollout, grade, model.schema, token_budget=budget)
        for rollout, grade in zip(rollouts, grades, strict=True)
    ]
    terms = [
        of_rollout
        for start in range(0, len(facts), size)
        for of_rollout in group_reward_terms(config.reward, facts[start : start + size], step)
    ]
    return facts, terms, np.reshape([sum(t.values()) for t in terms], (-1, size))


def reward_metrics(facts: Sequence[RolloutFacts], terms: Terms) -> dict[str, float]:
    """Mean of every reward term that counts, and the share of every way in which grading failed."""
    means: collections.defaultdict[str, float] = collections.defaultdict(float)
    for of_rollout in terms:
        for name, value in of_rollout.items():
            means[f"reward/{name}"] += value / len(facts)
    means["ungraded"] = 0.0
    for fact in facts:
        if fact.grading_failure is not None:
            means["ungraded"] += 1 / len(facts)
            means[f"ungraded/{fact.grading_failure}"] += 1 / len(facts)
    return dict(means)


def judged_rollouts(
    facts: Sequence[RolloutFacts],
    terms: Terms,
    grades: Sequence[Grade],
    advantages: Float[np.ndarray, "groups group_size"],
) -> list[Judged]:
    """What is kept of every rollout beside itself, for people to look at."""
    return [
        Judged(
            reward=sum(of_rollout.values()),
            terms=of_rollout,
            advantage=float(advantage),
            answer=grade.extracted,
            correct=fact.correct,
            format_valid=fact.format_valid,
        )
        for fact, grade, advantage, of_rollout in zip(
            facts, grades, advantages.reshape(-1), terms, strict=True
        )
    ]
