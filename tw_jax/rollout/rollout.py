"""What the rollout engine returns: a trajectory, how each unit of it was sampled, and when."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int32

from tw_jax.trajectory.trajectory import Trajectory

UnitKind = Literal["segment", "thread"]
# spawn: the unit ended at the spawn trigger; thread_stop: at the thread's closing tag;
# eos: the model ended its text; length: a token budget was spent; context: the slot was full;
# cancelled: the caller ended it; deadline: its time was up; controller: a row controller said so.
FinishReason = Literal[
    "spawn", "thread_stop", "eos", "length", "context", "cancelled", "deadline", "controller"
]


@dataclasses.dataclass(frozen=True)
class RolloutUnit:
    """One (context, completion) pair of a rollout.

    Attributes:
      kind: sequential segment or thread.
      parent: index of the unit this one continues or was spawned from; -1 for the first.
      block: parallel blocks before this unit (threads: index of their block).
      thread: 0 for segments, else 1, 2, ... in join order.
      context_len: tokens of context, forced header included.
      start: index in the joined tokens of the first completion token.
      completion: sampled ids, stop token included.
      logprobs: natural-log probability of each completion token at the sampling temperature 1
        distribution of the model (before temperature, top-k and top-p).
      finish_reason: why the unit ended.
      row: batch row that decoded it.
      start_step: engine step of its first token.
      end_step: engine step of its last token.
    """

    kind: UnitKind
    parent: int
    block: int
    thread: int
    context_len: int
    start: int
    completion: Int32[np.ndarray, "n"]
    logprobs: Float32[np.ndarray, "n"]
    finish_reason: FinishReason
    row: int
    start_step: int
    end_step: int


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One sampled trajectory.

    Attributes:
      trajectory: prompt and joined ids with their parallel blocks.
      units: in the order in which their first tokens were sampled; a block's threads in join order.
      finish_reason: of the whole rollout.
      critical_path: tokens on the longest chain of dependent tokens (DESIGN section 11).
      total_tokens: tokens appended after the prompt, each once.
      duplicate_outlines: outline numbers that were dropped because they repeated an earlier one.
      policy_version: training steps behind the parameters that sampled all of its tokens; None
        where nobody counts them.
    """

    trajectory: Trajectory
    units: tuple[RolloutUnit, ...]
    finish_reason: FinishReason
    critical_path: int
    total_tokens: int
    duplicate_outlines: int = 0
    policy_version: int | None = None

    @property
    def prompt(self) -> Int32[np.ndarray, "prompt"]:
        """Prompt ids."""
        return self.trajectory.tokens[: self.trajectory.prompt_len]

    @property
    def response(self) -> Int32[np.ndarray, "response"]:
        """Joined ids after the prompt."""
        return self.trajectory.tokens[self.trajectory.prompt_len :]

    @property
    def timeline(self) -> tuple[tuple[int, int, int], ...]:
        """(row, start step, end step) of every unit, for drawing."""
        return tuple((u.row, u.start_step, u.end_step) for u in self.units)
