"""What a process samples of an RL step, graded on the way, and what all processes make of it.

Every process asks its own share of the problems, on its own devices. Then the shares are
exchanged, so that from here on all processes see the same rollouts in the same order, and the rest
of a step is the same program in all of them as it is in one.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from tw_jax.errors import UserError
from tw_jax.parallel.processes import gathered_bytes
from tw_jax.rewards.graders import Grade
from tw_jax.rewards.grading import answer_text
from tw_jax.rollout.engine import OnFinish
from tw_jax.rollout.request import Request, sampling_seed
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.rollout_bytes import rollouts_from_bytes, rollouts_to_bytes
from tw_jax.rollout.session import RolloutsStopped
from tw_jax.train.pending_rollouts import PendingStep
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.rl_problems import RLProblem, RLProblems
from tw_jax.train.run_dir import LoadedModel


class Sampler(Protocol):
    """What samples with parameters that it was given before: the rollout devices."""

    def generate(
        self,
        requests: Sequence[Request],
        *,
        on_finish: OnFinish | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Rollout]:
        """See `tw_jax.train.rollout_devices.RolloutDevices.generate`."""
        ...


@dataclasses.dataclass(frozen=True)
class Round:
    """Problems of a step that are asked at once.

    Attributes:
      problems: in order.
      requests: prompt by prompt, those of a group one after another.
      group_size: rollouts of a problem.
    """

    problems: tuple[RLProblem, ...]
    requests: tuple[Request, ...]
    group_size: int

    def share(self, process: int, processes: int) -> list[int]:
        """Indices of the requests that a process samples: whole groups, dealt out in turn."""
        groups = range(process, len(self.problems), processes)
        return [g * self.group_size + k for g in groups for k in range(self.group_size)]

    def reference(self, request: int) -> str | None:
        """The reference answer of a request's problem."""
        return self.problems[request // self.group_size].reference


def make_round(
    config: RLConfig, problems: RLProblems, step: int, position: int, asked: int, count: int
) -> Round:
    """The next problems of a step.

    Args:
      config: of the run.
      problems: of the run.
      step: counted from 0.
      position: of the step's first problem.
      asked: problems that the step has asked before.
      count: problems to ask now.
    """
    chosen = tuple(problems.at(position + asked + i) for i in range(count))
    requests = tuple(
        Request(
            prompt=problem.prompt,
            seed=sampling_seed(config.seed, step, asked + p, k),
            sampling=config.sampling,
        )
        for p, problem in enumerate(chosen)
        for k in range(config.group_size)
    )
    return Round(chosen, requests, config.group_size)


@dataclasses.dataclass(frozen=True)
class Share:
    """What one process did of a round.

    Attributes:
      rollouts: in the order of its requests; empty where it was stopped.
      grades: one per rollout.
      seconds: how long it took.
      stopped: it was told to stop, and did not finish.
      error: what went wrong, in words for the user; None if nothing did.
    """

    rollouts: Sequence[Rollout] = ()
    grades: Sequence[Grade] = ()
    seconds: float = 0.0
    stopped: bool = False
    error: str | None = None


def sample_share(
    config: RLConfig,
    model: LoadedModel,
    sampler: Sampler,
    problems: RLProblems,
    asked: Round,
    pending: PendingStep,
    version: int,
    should_stop: Callable[[], bool],
) -> Share:
    """Samples and grades what this process has to do of a round; sends nothing to others.

    Answers are graded while the engine decodes on. Behind the last rollout the step waits for
    grades at most `config.grading_wait_s`.

    Args:
      config: of the run.
      model: whose tokenizer and schema rollouts are in.
      sampler: holds the parameters of `version`.
      problems: of the run.
      asked: the round.
      pending: keeps what is sampled, and knows what was sampled before a crash.
      version: training steps behind the parameters that sample.
      should_stop: asked now and then; when it says so, the share ends unfinished.
    """
    began = time.monotonic()
    mine = asked.share(jax.process_index(), jax.process_count())
    requests = [asked.requests[i] for i in mine]
    keys = pending.keys(requests, version)
    known = pending.grades(keys)

    def submit(index: int, rollout: Rollout) -> None:
        if index not in known:
            text = answer_text(rollout, model.tokenizer, model.schema)
            problems.grading.submit(index, text, asked.reference(mine[index]))

    try:
        rollouts = pending.generate(
            keys,
            requests,
            lambda missing, on_finish: sampler.generate(
                missing, on_finish=on_finish, should_stop=should_stop
            ),
            on_finish=submit,
            parts=config.keeps_parts,
        )
        graded = problems.grading.collect(config.grading_wait_s)
        # What a grader failed on it may judge once it has been mended.
        judged = {i: grade for i, grade in graded.items() if grade.failure is None}
        pending.keep_grades(keys, judged)
    except RolloutsStopped:
        problems.grading.collect(0.0)  # nobody will look at these
        return Share(seconds=time.monotonic() - began, stopped=True)
    except UserError as error:
        return Share(seconds=time.monotonic() - began, error=str(error))
    grades = {**known, **graded}
    return Share(rollouts, [grades[i] for i in range(len(mine))], time.monotonic() - began)


def exchanged(own: Share, asked: Round) -> Share:
    """What all processes did of a round, in the order of its requests; all of them call it.

    Raises:
      UserError: in all processes, where something went wrong in one.
    """
    shares = [own]
    if jax.process_count() > 1:
        said = gathered_bytes(json.dumps(_said(own)).encode())
        sampled = gathered_bytes(rollouts_to_bytes(own.rollouts))
        shares = [_share(json.loads(a), b) for a, b in zip(said, sampled, strict=True)]
    for process, share in enumerate(shares):
        if share.error is not None:
            where = f"process {process}: " if len(shares) > 1 else ""
            raise UserError(where + share.error)
    seconds = max(share.seconds for share in shares)
    if any(share.stopped for share in shares):
        return Share(seconds=seconds, stopped=True)
    found: dict[int, tuple[Rollout, Grade]] = {}
    for process, share in enumerate(shares):
        mine = asked.share(process, len(shares))
        found.update(zip(mine, zip(share.rollouts, share.grades, strict=True), strict=True))
    in_order = [found[i] for i in range(len(asked.requests))]
    return Share([r for r, _ in in_order], [g for _, g in in_order], seconds)


def _said(share: Share) -> dict[str, Any]:
    """All of a share but its rollouts."""
    grades = [dataclasses.asdict(grade) for grade in share.grades]
    return {**vars(share), "rollouts": (), "grades": grades}


def _share(said: dict[str, Any], rollouts: bytes) -> Share:
    grades = [Grade(**grade) for grade in said["grades"]]
    return Share(**{**said, "rollouts": rollouts_from_bytes(rollouts), "grades": grades})
