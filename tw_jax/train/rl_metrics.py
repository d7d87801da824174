"""What one RL step logs, computed from its rollouts, rewards and update."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tw_jax.rewards.reward import RewardConfig, RolloutFacts, reward_terms
from tw_jax.rollout import Rollout


def merge_sums(sums: dict[str, float], more: dict[str, Any]) -> dict[str, float]:
    """Adds up the sums of a step's updates; maxima by maximum."""
    values = {name: float(value) for name, value in more.items()}
    if not sums:
        return values
    return {
        name: max(sums[name], value) if name.startswith("max_") else sums[name] + value
        for name, value in values.items()
    }


def step_metrics(
    rollouts: Sequence[Rollout],
    facts: Sequence[RolloutFacts],
    rewards: np.ndarray,
    sums: dict[str, float],
) -> dict[str, float]:
    """What one step logs: rollouts, rewards and the update."""

    def mean(values: Any) -> float:
        return float(np.mean(list(values)))

    tokens = max(sums["tokens"], 1.0)
    return {
        "reward": float(rewards.mean()),
        "reward_std_in_group": float(rewards.std(axis=1).mean()),
        "accuracy": mean(f.correct for f in facts),
        "format_valid_rate": mean(f.format_valid for f in facts),
        "activation_ratio": mean(bool(r.trajectory.blocks) for r in rollouts),
        "critical_path": mean(r.critical_path for r in rollouts),
        "total_tokens": mean(r.total_tokens for r in rollouts),
        "acceleration_ratio": mean(1 - r.critical_path / max(r.total_tokens, 1) for r in rollouts),
        "finished_by_eos": mean(r.finish_reason == "eos" for r in rollouts),
        "loss": sums["loss"] / max(sums["weight"], 1e-20),
        "nll": sums["nll"] / tokens,
        "grad_norm": sums["grad_norm"],
        "logprob_abs_diff_mean": sums["logprob_abs_diff"] / tokens,
        "logprob_abs_diff_max": sums["max_logprob_abs_diff"],
    }


def reward_term_means(
    config: RewardConfig, facts: Sequence[RolloutFacts], step: int
) -> dict[str, float]:
    """Mean of every reward term over all rollouts."""
    totals: dict[str, float] = {}
    for fact in facts:
        for name, value in reward_terms(config, fact, step).items():
            totals[name] = totals.get(name, 0.0) + value
    return {f"reward/{name}": value / len(facts) for name, value in totals.items()}
