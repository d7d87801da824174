"""The rollouts of one RL step after another, sampled when they are needed or one step ahead.

A step asks `prompts` problems. With dynamic sampling (DAPO, arXiv 2503.14476) groups whose rollouts
all have the same reward are left out, and further rounds of problems take their places.

With `overlap` the first round of the next step is sampled, in a thread, while this step's update
runs: by the parameters that the update starts from, so its rollouts are one step old. Whatever
processes do together stays in the main thread, in one order.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Bool, Float

from tw_jax.parallel.processes import gathered_bytes
from tw_jax.rewards.facts import RolloutFacts
from tw_jax.rewards.graders import Grade
from tw_jax.rewards.grading import require_graded
from tw_jax.rollout.rollout import Rollout
from tw_jax.train.advantages import usable_rollouts, varies
from tw_jax.train.pending_rollouts import PendingRollouts
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.rl_problems import RLProblems
from tw_jax.train.rl_rewards import Terms, step_rewards
from tw_jax.train.rl_rollouts import Round, Sampler, Share, exchanged, make_round, sample_share
from tw_jax.train.run_dir import LoadedModel


class SamplingDevices(Sampler, Protocol):
    """A sampler that can be given parameters."""

    def take(self, params: Any) -> None:
        """Takes over parameters in place of those that it had."""
        ...

    def release(self) -> None:
        """Gives up parameters and caches, so that training has the memory."""
        ...


@dataclasses.dataclass(frozen=True)
class StepSample:
    """What a step sampled, in all processes the same.

    Attributes:
      rollouts: group by group.
      grades: one per rollout.
      facts: one per rollout.
      terms: of the reward, one mapping per rollout.
      rewards: of every rollout.
      seconds: spent on sampling; more than the step waited, where it was done ahead.
    """

    rollouts: Sequence[Rollout]
    grades: Sequence[Grade]
    facts: Sequence[RolloutFacts]
    terms: Terms
    rewards: Float[np.ndarray, "groups group_size"]
    seconds: float

    @property
    def format_valid(self) -> Bool[np.ndarray, "groups group_size"]:
        """Which rollouts are well formed."""
        return np.reshape([fact.format_valid for fact in self.facts], self.rewards.shape)


class StepSampler:
    """Samples steps in order; use it as `with StepSampler(...) as sampler`."""

    def __init__(
        self,
        config: RLConfig,
        model: LoadedModel,
        devices: SamplingDevices,
        problems: RLProblems,
        pending: PendingRollouts,
        should_stop: Callable[[], bool],
    ) -> None:
        """Samples nothing yet.

        Args:
          config: of the run.
          model: whose tokenizer and schema rollouts are in.
          devices: what samples.
          problems: what is asked.
          pending: keeps what is sampled.
          should_stop: asked now and then; when it says so, sampling ends unfinished.
        """
        self._config, self._model, self._devices = config, model, devices
        self._problems, self._pending, self._should_stop = problems, pending, should_stop
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "sampling")
        self._ahead: _Ahead | None = None
        self._held: int | None = None  # version of the parameters that the devices hold
        self._cut_ahead = False  # what was begun by parameters of one step before was stopped
        self._leaving = False

    def __enter__(self) -> "StepSampler":
        return self

    def __exit__(self, *error: object) -> None:
        self._leaving = True
        self._thread.shutdown(wait=True)

    def sample(self, step: int, position: int, params: Any) -> StepSample | None:
        """The rollouts of a step.

        Args:
          step: counted from 0.
          position: problems asked in earlier steps.
          params: of the model, after `step` steps.

        Returns:
          None where sampling was stopped, in any process.

        Raises:
          UserError: something went wrong in any process, or too many answers were not graded.
        """
        rounds: list[StepSample] = []
        while missing := self._missing(rounds):
            ahead, self._ahead = self._ahead, None
            if ahead is not None:
                asked, version, own = ahead.asked, ahead.version, ahead.share.result()
            else:
                groups = sum(len(done.rewards) for done in rounds)
                asked = self._round(step, position, groups, missing)
                version, own = self._sample_now(step, asked, params, first=not rounds)
            share = exchanged(own, asked)
            if share.stopped:
                self._cut_ahead |= version < step
                return None
            rounds.append(self._judged(share, version, step))
            require_graded(
                [grade for done in rounds for grade in done.grades],
                self._config.max_ungraded_share,
            )
        return _joined(rounds)

    def begin(self, step: int, position: int, params: Any) -> None:
        """Starts to sample a step by the parameters of the step before it.

        Args:
          step: counted from 0; the next one that `sample` is asked for.
          position: problems asked in earlier steps.
          params: of the model, after `step - 1` steps; may be given up as soon as this returns.
        """
        asked, version = self._round(step, position, 0, self._config.prompts), step - 1
        self._hand_over(params, version)
        share = self._thread.submit(self._sample_share, step, asked, version)
        self._ahead = _Ahead(asked, version, share)

    def settled(self) -> bool:
        """Waits for what was begun.

        Returns:
          Whether it was finished in all processes. Only then may a checkpoint be written: a run
          that goes on from it could not sample the rest by the parameters of one step before.
        """
        finished = not self._cut_ahead
        if self._ahead is not None:
            share = self._ahead.share.result()
            finished &= not share.stopped and share.error is None
        return _everywhere(finished)

    def release(self) -> None:
        """Lets training have the memory of the devices that it shares with sampling."""
        if self._ahead is None and not self._config.rollout_devices.dedicated:
            self._devices.release()
            self._held = None

    # --- one round --------------------------------------------------------------------------------

    def _missing(self, rounds: Sequence[StepSample]) -> int:
        """Problems that the next round of a step has to ask; 0 where there is none."""
        if not rounds:
            return self._config.prompts
        if len(rounds) > self._config.refill_rounds:
            return 0
        objective = self._config.policy_objective
        differing = sum(
            int(varies(done.rewards, usable_rollouts(objective, done.format_valid)).sum())
            for done in rounds
        )
        return max(self._config.prompts - differing, 0)

    def _round(self, step: int, position: int, asked: int, count: int) -> Round:
        return make_round(self._config, self._problems, step, position, asked, count)

    def _sample_now(
        self, step: int, asked: Round, params: Any, *, first: bool
    ) -> tuple[int, Share]:
        """Samples a round with `params`, or takes what a run before a crash has kept of it."""
        mine = asked.share(jax.process_index(), jax.process_count())
        requests = [asked.requests[i] for i in mine]
        kept, was_ahead = self._pending.step(step), first and self._config.overlap and step > 0
        for version in (step - 1, step) if was_ahead else (step,):
            if _everywhere(kept.is_whole(kept.keys(requests, version))):
                return version, self._sample_share(step, asked, version)
        self._hand_over(params, step)
        return step, self._sample_share(step, asked, step)

    def _hand_over(self, params: Any, version: int) -> None:
        if self._held != version:
            self._devices.take(params)
            self._held = version

    def _sample_share(self, step: int, asked: Round, version: int) -> Share:
        return sample_share(
            self._config,
            self._model,
            self._devices,
            self._problems,
            asked,
            self._pending.step(step),
            version,
            lambda: self._leaving or self._should_stop(),
        )

    def _judged(self, share: Share, version: int, step: int) -> StepSample:
        rollouts = [dataclasses.replace(r, policy_version=version) for r in share.rollouts]
        judged = step_rewards(self._config, self._model, rollouts, share.grades, step)
        return StepSample(rollouts, share.grades, *judged, share.seconds)


@dataclasses.dataclass(frozen=True)
class _Ahead:
    """A round that is being sampled."""

    asked: Round
    version: int
    share: "concurrent.futures.Future[Share]"


def _joined(rounds: Sequence[StepSample]) -> StepSample:
    def together(name: str) -> list[Any]:
        return [item for done in rounds for item in getattr(done, name)]

    return StepSample(
        rollouts=together("rollouts"),
        grades=together("grades"),
        facts=together("facts"),
        terms=together("terms"),
        rewards=np.concatenate([done.rewards for done in rounds]),
        seconds=sum(done.seconds for done in rounds),
    )


def _everywhere(fact: bool) -> bool:
    """Whether something holds in all processes; all of them call it."""
    return all(said == b"1" for said in gathered_bytes(b"1" if fact else b"0"))
