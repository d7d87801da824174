"""What one RL step logs, computed from its rollouts, rewards, times and update.

The update hands over sums, never means: they add up over micro-batches, updates and devices, and
are divided here, once. Keys that begin with "max_" are combined by maximum. `docs/rl_metrics.md`
explains every metric to users; this table is what the update and this module agree on. A sum that
is not there leaves its metrics out.

| sum over sampled tokens | what of each token | metric |
|---|---|---|
| `tokens` | 1 | |
| `weight`, `loss` | loss weight; weighted loss | `loss` |
| `nll` | minus the trainer's log-probability | `nll` |
| `logprob_abs_diff`, `max_logprob_abs_diff` | absolute difference to the sampler's | \
`logprob_abs_diff_mean`, `_max` |
| `logprob_sq`, `sampler_logprob`, `sampler_logprob_sq`, `logprob_product` | square of the \
trainer's; the sampler's; its square; product of both | `logprob_correlation` |
| `kl_start` | k3 estimate of KL to the policy that the run starts from | `kl_start` |
| `kl_reference`, `kl_old` | estimate of KL to the reference of the objective's KL term; k3 \
estimate of KL to the policy that sampled | `kl_reference`, `kl_old` |
| `clipped_tokens`, `clipped_low`, `_high`, `_dual` | 1 where the ratio's clip cuts the gradient; \
by the bound that does | `clip_fraction`, `clip_fraction/low`, `/high`, `/dual` |
| `importance_weight`, `importance_capped` | weight of engine mismatch; 1 where it is capped | \
`importance_weight_mean`, `importance_capped_fraction` |
| `entropy/KIND`, `tokens/KIND` | entropy of the prediction; 1. KIND: outline, thread, sequential, \
tags | `entropy/KIND`, and `entropy` over all kinds |
| `grad_norm` | (of an update, not of a token) norm of the gradient before clipping | `grad_norm`, \
mean over the step's updates |

`merge_sums` adds `updates`, the number of updates that were merged.
"""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from tw_jax.rewards.facts import RolloutFacts
from tw_jax.rollout.rollout import FinishReason, Rollout
from tw_jax.train.advantages import varies

ENTROPY_KINDS = ("outline", "thread", "sequential", "tags")
_QUANTILES = (0.1, 0.5, 0.9)
# Only a segment in the middle ends by a spawn, and only a thread by its closing tag.
_THREAD_ENDS = tuple(reason for reason in get_args(FinishReason) if reason != "spawn")
_ROLLOUT_ENDS = tuple(reason for reason in _THREAD_ENDS if reason != "thread_stop")
# Sums that need nothing but the division: name of the sum -> name of the metric.
_PER_TOKEN = {
    "kl_start": "kl_start",
    "kl_reference": "kl_reference",
    "kl_old": "kl_old",
    "clipped_tokens": "clip_fraction",
    "clipped_low": "clip_fraction/low",
    "clipped_high": "clip_fraction/high",
    "clipped_dual": "clip_fraction/dual",
    "importance_weight": "importance_weight_mean",
    "importance_capped": "importance_capped_fraction",
}


def merge_sums(sums: Mapping[str, float], more: Mapping[str, Any]) -> dict[str, float]:
    """Adds up the sums of a step's updates; maxima by maximum.

    Args:
      sums: what earlier calls returned; empty for the first update.
      more: sums of one further update.
    """
    values = {name: float(value) for name, value in more.items()} | {"updates": 1.0}
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
    sums: Mapping[str, float],
    usable: np.ndarray | None = None,
) -> dict[str, float]:
    """What one step logs besides reward terms and times.

    Args:
      rollouts: of the step.
      facts: one per rollout.
      rewards: `[prompts, group_size]`.
      sums: of the update, merged; see the top of the file.
      usable: `[prompts, group_size]`, rollouts that advantages are computed over; None: all.
    """
    graded = {
        "accuracy": _mean(f.correct for f in facts),
        "format_valid_rate": _mean(f.format_valid for f in facts),
    }
    return (
        _reward_metrics(rewards, usable)
        | graded
        | _latency_metrics(rollouts)
        | _shape_metrics(rollouts)
        | finish_metrics(rollouts)
        | update_metrics(sums)
    )


def update_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of the update from its sums; those whose sums are missing are left out."""
    tokens = max(sums["tokens"], 1.0)
    metrics = {
        "loss": sums["loss"] / max(sums["weight"], 1e-20),
        "nll": sums["nll"] / tokens,
        "update_tokens": sums["tokens"],
        "logprob_abs_diff_mean": sums["logprob_abs_diff"] / tokens,
        "logprob_abs_diff_max": sums["max_logprob_abs_diff"],
    }
    if "grad_norm" in sums:
        metrics["grad_norm"] = sums["grad_norm"] / sums.get("updates", 1.0)
    if "logprob_product" in sums:
        metrics["logprob_correlation"] = _correlation(sums)
    for name, metric in _PER_TOKEN.items():
        if name in sums:
            metrics[metric] = sums[name] / tokens
    kinds = [kind for kind in ENTROPY_KINDS if sums.get(f"tokens/{kind}")]
    for kind in kinds:
        metrics[f"entropy/{kind}"] = sums[f"entropy/{kind}"] / sums[f"tokens/{kind}"]
    if kinds:
        counted = sum(sums[f"tokens/{kind}"] for kind in kinds)
        metrics["entropy"] = sum(sums[f"entropy/{kind}"] for kind in kinds) / counted
    return metrics


def _correlation(sums: Mapping[str, float]) -> float:
    """Pearson's correlation of the trainer's and the sampler's log-probabilities.

    1 where either does not vary: there is nothing that they could disagree about.
    """
    n = max(sums["tokens"], 1.0)
    trainer, sampler = -sums["nll"] / n, sums["sampler_logprob"] / n
    trainer_var = sums["logprob_sq"] / n - trainer**2
    sampler_var = sums["sampler_logprob_sq"] / n - sampler**2
    if min(trainer_var, sampler_var) <= 1e-12:
        return 1.0
    covariance = sums["logprob_product"] / n - trainer * sampler
    # Sums in float32 can leave it a hair outside.
    return max(-1.0, min(1.0, covariance / math.sqrt(trainer_var * sampler_var)))


def _reward_metrics(rewards: np.ndarray, usable: np.ndarray | None) -> dict[str, float]:
    return {
        "reward": float(rewards.mean()),
        "reward_min": float(rewards.min()),
        "reward_max": float(rewards.max()),
        "reward_std_in_group": float(rewards.std(axis=1).mean()),
        # A group without variance has zero advantage: it teaches nothing.
        "groups_without_variance": 1 - float(varies(rewards, usable).mean()),
    }


def _latency_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Length, critical path and their quantiles."""
    metrics = {
        "critical_path": _mean(r.critical_path for r in rollouts),
        "total_tokens": _mean(r.total_tokens for r in rollouts),
        "acceleration_ratio": _mean(1 - r.critical_path / max(r.total_tokens, 1) for r in rollouts),
    }
    for name, values in (
        ("total_tokens", [r.total_tokens for r in rollouts]),
        ("critical_path", [r.critical_path for r in rollouts]),
    ):
        for q, value in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True):
            metrics[f"{name}/p{round(100 * q)}"] = float(value)
        metrics[f"{name}/max"] = float(max(values))
    return metrics


def _shape_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """How parallel the rollouts are; means over blocks are left out where there is none."""
    widths = [len(block.threads) for r in rollouts for block in r.trajectory.blocks]
    metrics = {
        "activation_ratio": _mean(bool(r.trajectory.blocks) for r in rollouts),
        "blocks_per_rollout": _mean(len(r.trajectory.blocks) for r in rollouts),
    }
    if widths:
        metrics |= {"threads_per_block": _mean(widths), "threads_per_block/max": float(max(widths))}
    return metrics


def finish_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Share of every finish reason, of whole rollouts and of threads.

    Reasons that ended none are 0, so that a curve has no gaps; threads are left out where there is
    none.
    """
    ends = collections.Counter(r.finish_reason for r in rollouts)
    metrics = {f"finish/{reason}": ends[reason] / len(rollouts) for reason in _ROLLOUT_ENDS}
    threads = [u.finish_reason for r in rollouts for u in r.units if u.kind == "thread"]
    thread_ends = collections.Counter(threads)
    if threads:
        for reason in _THREAD_ENDS:
            metrics[f"thread_finish/{reason}"] = thread_ends[reason] / len(threads)
    return metrics


def time_metrics(
    seconds: Mapping[str, float],
    *,
    sampled_tokens: int,
    sampling_s: float,
    update_tokens: float,
) -> dict[str, float]:
    """Time split of a step, and tokens per second of its two large parts.

    Args:
      seconds: wall time of every part that was timed (`tw_jax.train.step_times`); "update" must be
        there.
      sampled_tokens: tokens that the engine sampled.
      sampling_s: seconds it took; more than the step waited, where it was done ahead.
      update_tokens: tokens that carried loss.
    """
    metrics = {f"time/{part}_s": value for part, value in seconds.items()}
    metrics["time/step_s"] = sum(seconds.values())
    metrics["rollout_tokens_per_s"] = sampled_tokens / max(sampling_s, 1e-9)
    metrics["update_tokens_per_s"] = update_tokens / max(seconds["update"], 1e-9)
    return metrics


def sampled_tokens(rollouts: Iterable[Rollout]) -> int:
    """Tokens that the model itself wrote."""
    return sum(len(unit.completion) for r in rollouts for unit in r.units)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
