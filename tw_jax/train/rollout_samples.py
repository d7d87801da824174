"""Sampled rollouts of an RL run, kept whole for people to look at: `rollouts.jsonl`.

A line holds one rollout:

    step, problem, member   training step, problem of the step, rollout of its group; from 1, 0, 0
    prompt, response        as text, every tag kept
    reward, terms           the reward, and the terms that it is the sum of
    advantage               what its tokens were weighted with
    answer, correct         the answer as graded
    format_valid            every parallel block parses strictly
    rollout                 ids, units, finish reasons (`rollout_file.rollout_to_json`)

Which rollouts are kept depends on the configuration alone: the first of every group, then the
second of every group, and so on. So they are a fair sample, and a resumed run keeps the same ones.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tw_jax.config_checks import require_at_least
from tw_jax.errors import UserError
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.rollout_file import rollout_to_json
from tw_jax.train.jsonl_tracker import json_number, keep_until, parsed_line

FILE_NAME = "rollouts.jsonl"


@dataclasses.dataclass(frozen=True)
class RolloutSamplesConfig:
    """Which sampled rollouts a run keeps for `tw-jax view run`.

    Attributes:
      every: steps between those whose rollouts are kept; the first step's always are.
      rollouts: rollouts kept of such a step; 0 keeps none.
    """

    every: int = 5
    rollouts: int = 4

    def __post_init__(self) -> None:
        require_at_least(self, every=1, rollouts=0)

    def kept(self, step: int, prompts: int, group_size: int) -> list[tuple[int, int]]:
        """(problem, member) of the rollouts of a step that are kept.

        Args:
          step: from 1.
          prompts: problems of a step.
          group_size: rollouts of a problem.
        """
        if step != 1 and step % self.every:
            return []
        everything = [(p, k) for k in range(group_size) for p in range(prompts)]
        return everything[: self.rollouts]


@dataclasses.dataclass(frozen=True)
class Judged:
    """What is kept of a rollout besides itself.

    Attributes:
      reward: the sum of `terms`.
      terms: by name.
      advantage: of the rollout's tokens.
      answer: as it was graded, None if none was found.
      correct: the answer was graded right.
      format_valid: every parallel block parses strictly.
    """

    reward: float
    terms: Mapping[str, float]
    advantage: float
    answer: str | None
    correct: bool
    format_valid: bool


class RolloutSamples:
    """The file of a run, open for appending; use it as `with RolloutSamples(...) as samples`."""

    def __init__(
        self, path: str | os.PathLike[str], tokenizer: Any, *, resume_step: int = 0
    ) -> None:
        """Opens the file.

        Args:
          path: the file, made if need be.
          tokenizer: the one that encoded the prompts.
          resume_step: lines of later steps are dropped; 0 starts the file afresh.

        Raises:
          UserError: the file cannot be read or written.
        """
        self._path, self._tokenizer = pathlib.Path(path), tokenizer
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            keep_until(self._path, resume_step)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from error

    def __enter__(self) -> "RolloutSamples":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write_step(
        self,
        config: RolloutSamplesConfig,
        step: int,
        rollouts: Sequence[Rollout],
        judged: Sequence[Judged],
        group_size: int,
    ) -> None:
        """Appends those rollouts of a step that the configuration keeps.

        Args:
          config: says which.
          step: from 1.
          rollouts: all of the step, group by group.
          judged: one per rollout.
          group_size: rollouts of a problem.

        Raises:
          UserError: the disk refuses it.
        """
        for problem, member in config.kept(step, len(rollouts) // group_size, group_size):
            index = problem * group_size + member
            self.write(step, problem, member, rollouts[index], judged[index])

    def write(self, step: int, problem: int, member: int, rollout: Rollout, judged: Judged) -> None:
        """Appends one line.

        Raises:
          UserError: the disk refuses it.
        """
        line = {
            "step": int(step),
            "problem": int(problem),
            "member": int(member),
            "prompt": self._text(rollout.prompt),
            "response": self._text(rollout.response),
            **dataclasses.asdict(judged),
            "reward": json_number(judged.reward),
            "terms": {name: json_number(value) for name, value in judged.terms.items()},
            "advantage": json_number(judged.advantage),
            "rollout": rollout_to_json(rollout),
        }
        try:
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error

    def _text(self, tokens: Any) -> str:
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    def _failure(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write sampled rollouts to {self._path}: {error.strerror or error}; make room "
            "or set samples.rollouts=0, then run the same command again"
        )


def read_samples(
    path: str | os.PathLike[str], steps: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Lines of the file, in order, without holding all of it in memory.

    Args:
      path: the file.
      steps: those whose rollouts are wanted; None for all.

    Yields:
      What a line holds; lines that are cut short are left out.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                content = parsed_line(line)
                if content is not None and (steps is None or content["step"] in steps):
                    yield content
    except OSError as error:
        raise UserError(f"cannot read rollouts from {path}: {error.strerror or error}") from error
