"""Notices that an RL run has stopped to be worth its time, and says why and what to do.

Every step hands over a few facts, and `checked` returns the next `Health` and, if the run should
stop, a message. `Health` is a small value that belongs into the checkpoint: a resumed run stops at
the step at which an uninterrupted one would have.

Three rules count steps in a row in which everything was malformed, too long for a row, or skipped.
The other two judge what chance can do in a small run, so they also ask for evidence in groups of
rollouts, which are independent draws: no signal needs 100 groups in a row, and a fall of the
accuracy must be six times the standard error of two shares of that many groups.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tw_jax.config_checks import require_at_least, require_share

LEAST_GROUPS_WITHOUT_SIGNAL = 100
STANDARD_ERRORS_OF_A_FALL = 6.0
# Accuracy from which on, or down to which, nothing is left to learn, or nothing to start from.
_SOLVED, _UNSOLVED = 0.99, 0.01


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """When a run stops by itself, saves, and says why.

    Attributes:
      patience_steps: steps in a row that a fault must last; 0 never stops a run. Where chance could
        do it in a small run, more is asked for: groups without different rewards must be at least
        100 in a row, and a fall of the accuracy beyond what so few groups explain.
      min_format_valid_rate: a smaller share of rollouts whose blocks parse is a fault. Answers
        without any block parse, so this is a model whose nearly every answer has broken tags.
      collapse_share: the accuracy over the last `patience_steps` steps below this share of the best
        that so many steps have had is a fault, if it is no chance; 0 admits any fall.
    """

    patience_steps: int = 10
    min_format_valid_rate: float = 0.02
    collapse_share: float = 0.2

    def __post_init__(self) -> None:
        require_at_least(self, patience_steps=0)
        require_share(self, "min_format_valid_rate", "collapse_share")


@dataclasses.dataclass(frozen=True)
class StepFacts:
    """What one step says about the run.

    Attributes:
      groups: of rollouts that were sampled.
      teaching_groups: those that move the policy (`tw_jax.train.advantages.teaching_groups`).
      accuracy: share of right answers.
      format_valid_rate: share of rollouts whose blocks parse.
      packed: rollouts that fit into rows.
      too_long_tokens: trie tokens of the longest rollout that did not fit; 0 if all did.
      updates: that had tokens to train on, over all passes.
      skipped_updates: of those, the ones whose gradient was not finite.
    """

    groups: int
    teaching_groups: int
    accuracy: float
    format_valid_rate: float
    packed: int
    too_long_tokens: int
    updates: int
    skipped_updates: int


@dataclasses.dataclass(frozen=True)
class Health:
    """What is remembered of the steps so far.

    Attributes:
      skipped_steps: steps in a row whose every update was skipped.
      too_long_steps: steps in a row whose every rollout was too long for a row.
      malformed_steps: steps in a row with too few well-formed rollouts.
      silent_steps: steps in a row without a group that teaches anything.
      silent_groups: groups in them.
      accuracies: of the last steps, oldest first; at most `patience_steps`.
      best_accuracy: the highest mean that `patience_steps` of them have had; None before.
    """

    skipped_steps: int = 0
    too_long_steps: int = 0
    malformed_steps: int = 0
    silent_steps: int = 0
    silent_groups: int = 0
    accuracies: tuple[float, ...] = ()
    best_accuracy: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the checkpoint."""
        return dataclasses.asdict(self) | {"accuracies": list(self.accuracies)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Health":
        """What `to_json` wrote."""
        return cls(**{**saved, "accuracies": tuple(saved["accuracies"])})


def checked(
    config: HealthConfig, health: Health, facts: StepFacts, *, row_len: int
) -> tuple[Health, str | None]:
    """What is remembered after a step, and why the run should stop.

    Args:
      config: when it should.
      health: what was remembered before the step.
      facts: of the step.
      row_len: tokens of a packed row, for the message.

    Returns:
      The next health; and None, or the message: what was seen, for how long, and what to do. With a
      message comes a health without memory, so that whoever goes on has `patience_steps` anew.
    """
    patience = config.patience_steps
    if not patience:
        return health, None
    health = _after(config, health, facts)
    message = (
        _skipped(health, patience)
        or _too_long(health, patience, facts, row_len)
        or _malformed(health, patience, config)
        or _collapsed(health, patience, config, facts)
        or _silent(health, patience)
    )
    if message is None:
        return health, None
    return Health(), message


def _after(config: HealthConfig, health: Health, facts: StepFacts) -> Health:
    """The health with one more step; nothing is judged."""

    def in_a_row(steps: int, fault: bool) -> int:
        return steps + 1 if fault else 0

    silent = not facts.teaching_groups
    accuracies = (*health.accuracies, facts.accuracy)[-config.patience_steps :]
    best = health.best_accuracy
    if len(accuracies) == config.patience_steps:
        best = max(_mean(accuracies), -math.inf if best is None else best)
    return Health(
        skipped_steps=in_a_row(health.skipped_steps, 0 < facts.updates == facts.skipped_updates),
        too_long_steps=in_a_row(
            health.too_long_steps, facts.too_long_tokens > 0 and not facts.packed
        ),
        malformed_steps=in_a_row(
            health.malformed_steps, facts.format_valid_rate < config.min_format_valid_rate
        ),
        silent_steps=in_a_row(health.silent_steps, silent),
        silent_groups=health.silent_groups + facts.groups if silent else 0,
        accuracies=accuracies,
        best_accuracy=best,
    )


def _skipped(health: Health, patience: int) -> str | None:
    if health.skipped_steps < patience:
        return None
    return (
        f"every update of the last {health.skipped_steps} steps was skipped, because its gradient "
        "was not finite: the model no longer changes. Start a new run from an earlier checkpoint "
        "(init_from, init_step) with a lower optimizer.learning_rate or optimizer.clip_norm"
    )


def _too_long(health: Health, patience: int, facts: StepFacts, row_len: int) -> str | None:
    if health.too_long_steps < patience:
        return None
    return (
        f"no rollout of the last {health.too_long_steps} steps fits into a row of row_len="
        f"{row_len} tokens, so nothing is trained; the longest of the last step has "
        f"{facts.too_long_tokens} trie tokens. Raise row_len, or lower "
        "sampling.max_response_tokens"
    )


def _malformed(health: Health, patience: int, config: HealthConfig) -> str | None:
    if health.malformed_steps < patience:
        return None
    return (
        f"for {health.malformed_steps} steps fewer than {100 * config.min_format_valid_rate:g}% of "
        "the rollouts were well formed (format_valid_rate): nearly every answer has broken tags of "
        "parallel blocks. Look at some with `tw-jax view run`; train longer with `tw-jax sft` "
        "first, lower sampling.temperature, or reward the format (reward.format)"
    )


def _collapsed(health: Health, patience: int, config: HealthConfig, facts: StepFacts) -> str | None:
    best, accuracies = health.best_accuracy, health.accuracies
    if best is None or len(accuracies) < patience:
        return None
    now = _mean(accuracies)
    if now >= config.collapse_share * best:
        return None
    if not _is_no_chance(best, now, facts.groups * patience):
        return None
    return (
        f"the accuracy collapsed: {now:.3f} over the last {patience} steps, after {best:.3f} over "
        f"the best {patience} steps before. Look at entropy, logprob_abs_diff_max and the reward "
        "terms of the steps before the fall; start a new run from an earlier checkpoint "
        "(init_from, init_step) with a lower optimizer.learning_rate, or with an objective that "
        "holds on to its reference (objective.kl_coefficient)"
    )


def _is_no_chance(best: float, now: float, groups: int) -> bool:
    """Whether two shares of so many draws each differ by more than their standard error explains.

    The rollouts of a group may all go the same way, so a group counts as one draw.
    """
    pooled = (best + now) / 2
    error = math.sqrt(2 * pooled * (1 - pooled) / groups)
    return best - now > STANDARD_ERRORS_OF_A_FALL * error


def _silent(health: Health, patience: int) -> str | None:
    if health.silent_steps < patience or health.silent_groups < LEAST_GROUPS_WITHOUT_SIGNAL:
        return None
    accuracy = _mean(health.accuracies)
    seen = (
        f"no group of the last {health.silent_steps} steps taught anything: within each of "
        f"{health.silent_groups} groups all rollouts that the update takes have the same reward"
    )
    if accuracy >= _SOLVED:
        return (
            f"{seen}, and {accuracy:.1%} of the answers are right. Everything is solved, and the "
            "run may well end here; harder problems, or a reward for short critical paths "
            "(reward.acceleration), would give it more to learn"
        )
    if accuracy <= _UNSOLVED:
        return (
            f"{seen}, and {accuracy:.1%} of the answers are right. The problems are too hard to "
            "learn from: take easier ones, train longer with `tw-jax sft` first, or raise "
            "group_size; look at some answers with `tw-jax view run`, in case the grader is wrong"
        )
    return (
        f"{seen}; {accuracy:.1%} of the answers are right. Raise sampling.temperature or "
        "group_size, take problems that are solved now and then, or let fewer rollouts be left "
        "out by the objective's filters"
    )


def _mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values)
