"""The learning half of RL: a step's rollouts become updates of the train state."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int32

from tw_jax.models.qwen3 import Params
from tw_jax.parallel.layout import Layout
from tw_jax.train.optimizer import make_optimizer
from tw_jax.train.placement import place_run, placed_state
from tw_jax.train.policy_sum import policy_sum
from tw_jax.train.reference import next_reference
from tw_jax.train.rl_batches import make_scorer, micro_batches
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.rl_metrics import merge_sums
from tw_jax.train.rl_sampling import StepSample
from tw_jax.train.run_dir import LoadedModel
from tw_jax.train.state import TrainState
from tw_jax.train.step_times import StepTimes
from tw_jax.train.trainable import Trainable
from tw_jax.train.update import make_update


@dataclasses.dataclass(frozen=True)
class Learned:
    """What a step's updates made of it.

    Attributes:
      state: after them.
      sums: of all updates (`tw_jax.train.rl_metrics`).
      ages: for every token that the updates took, the training steps between the parameters that
        sampled it and those that the step began with.
      packed: rollouts that the updates took.
      too_long_tokens: trie tokens of each rollout that fits into no row.
      updates: that had tokens to train on.
      skipped_updates: of those, the ones whose gradient was not finite.
    """

    state: TrainState
    sums: dict[str, float]
    ages: Int32[np.ndarray, " tokens"]
    packed: int
    too_long_tokens: Sequence[int]
    updates: int
    skipped_updates: int


class PolicyLearner:
    """Compiled updates of one run, and the parameters that the policy is compared with."""

    def __init__(
        self, config: RLConfig, model: LoadedModel, trainable: Trainable, layout: Layout | None
    ) -> None:
        """Compiles nothing yet.

        Args:
          config: of the run.
          model: before the first step; its parameters are kept where the objective or a metric
            compares the policy with them.
          trainable: what of it is trained.
          layout: how training lies on a mesh; None on one device.
        """
        self._config = config
        # Parameters that nothing below needs must not be held: they would be a second copy.
        self._model = dataclasses.replace(model, params={})
        self._trainable = trainable
        objective = self._objective = config.policy_objective
        optimizer = make_optimizer(config.optimizer, config.steps * config.optimizer_steps_per_step)
        self._optimizer = optimizer
        self._placement = place_run(layout, model.config, optimizer, trainable.adapter)
        sum_loss = policy_sum(
            model.graphdef,
            objective,
            config.memory,
            layout,
            rollouts=config.most_rollouts,
            measure_entropy=config.measure_entropy,
        )
        self._update = make_update(sum_loss, optimizer, self._placement.state, trainable.assemble)
        self._score = make_scorer(config, self._model, layout)
        self._origin = model.params if config.measure_kl_to_start else None
        self._reference = model.params if objective.kl_coefficient else None

    def initial_state(self, params: Params) -> TrainState:
        """The state before the first step.

        Args:
          params: what is trained, as it is then; an update may give their buffers up.
        """
        start = params
        # The update donates its state; what the policy is compared with must survive it.
        if self._origin is not None or self._reference is not None:
            params = jax.tree.map(jnp.copy, params)
        state = placed_state(params, self._optimizer, self._placement)
        if self._objective.reference.moves:
            state = dataclasses.replace(state, reference=jax.tree.map(jnp.copy, start))
        return state

    def learn(
        self,
        state: TrainState,
        step: int,
        sample: StepSample,
        advantages: Float[np.ndarray, "groups group_size"],
        kept: Bool[np.ndarray, "groups group_size"],
        times: StepTimes,
    ) -> Learned:
        """Makes all updates of a step.

        Args:
          state: before them; it is donated.
          step: counted from 0.
          sample: what was sampled.
          advantages: of every rollout.
          kept: which rollouts the updates take.
          times: gets the seconds of "pack", "score" and "update".
        """
        with times.of("pack"):
            batches = micro_batches(self._config, self._model, sample.rollouts, advantages, kept)
            versions = [b.policy_version[b.loss_weight > 0] for m in batches.updates for b in m]
        with times.of("score"):
            current = self._trainable.model_params(state.params)
            reference = self._reference_params(state)
            # Scored before the first update: "old" is the policy that starts it.
            updates = [
                [
                    self._score(current, reference, self._origin, self._placement.batch(batch))
                    for batch in micro
                ]
                for micro in batches.updates
            ]
            del current
            jax.block_until_ready(updates)
        skipped_before = int(state.skipped_updates)
        sums: dict[str, float] = {}
        made = 0
        with times.of("update"):
            for micro in updates * self._config.passes_per_step:
                state, more = self._update(state, micro, self._trainable.frozen)
                made += float(more["weight"]) > 0
                sums = merge_sums(sums, more)
            moved = next_reference(
                self._objective.reference, state.reference, state.params, step + 1
            )
            state = dataclasses.replace(state, reference=moved)
        skipped = int(state.skipped_updates) - skipped_before
        return Learned(
            state=state,
            sums=sums,
            ages=step - np.concatenate(versions),
            packed=batches.packed,
            too_long_tokens=batches.too_long_tokens,
            updates=made,
            skipped_updates=skipped,
        )

    def _reference_params(self, state: TrainState) -> Params | None:
        if self._objective.reference.moves:
            return self._trainable.model_params(state.reference)
        return self._reference
