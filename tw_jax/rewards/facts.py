"""What rewards depend on: facts of a rollout, and of the group it belongs to."""

import dataclasses
from collections.abc import Sequence

from tw_jax.trajectory.metrics import acceleration_ratio


@dataclasses.dataclass(frozen=True)
class RolloutFacts:
    """Facts of one rollout.

    Attributes:
      correct: the answer was graded right.
      format_valid: every parallel block parses strictly; so does a response without blocks.
      total_tokens: tokens after the prompt.
      critical_path: tokens on the longest dependent chain.
      blocks: parallel blocks.
      threads: threads of all blocks.
      format_breaks: kinds of what does not parse strictly, as the schema names them.
      score: share of the full credit, 0 to 1; None where a grader knows right and wrong only.
      grading_failure: why the answer could not be graded; None if it was.
      finish_reason: why sampling ended.
      token_budget: most tokens after the prompt; None where nothing bounds them.
    """

    correct: bool
    format_valid: bool
    total_tokens: int
    critical_path: int
    blocks: int = 0
    threads: int = 0
    format_breaks: tuple[str, ...] = ()
    score: float | None = None
    grading_failure: str | None = None
    finish_reason: str = "eos"
    token_budget: int | None = None

    @property
    def has_block(self) -> bool:
        """Whether there is a parallel block."""
        return self.blocks > 0

    @property
    def credit(self) -> float:
        """Share of the full credit: the grader's score, else 1 or 0."""
        return float(self.correct) if self.score is None else self.score

    @property
    def acceleration_ratio(self) -> float:
        """`1 - critical_path / total_tokens`."""
        return acceleration_ratio(self.total_tokens, self.critical_path)


@dataclasses.dataclass(frozen=True)
class GroupFacts:
    """Facts of the rollouts of one prompt.

    Attributes:
      accuracy: share that is correct.
      mean_critical_path: of the correct ones; None where there are none.
      shortest_critical_path: of the correct ones; None where there are none.
    """

    accuracy: float
    mean_critical_path: float | None
    shortest_critical_path: int | None


def group_facts(rollouts: Sequence[RolloutFacts]) -> GroupFacts:
    """Sums up a group."""
    paths = [facts.critical_path for facts in rollouts if facts.correct]
    return GroupFacts(
        accuracy=len(paths) / len(rollouts),
        mean_critical_path=sum(paths) / len(paths) if paths else None,
        shortest_critical_path=min(paths, default=None),
    )
