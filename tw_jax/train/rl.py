"""Reinforcement learning with the exact policy gradient of the fork-join process (P-GRPO).

1. Each step samples `group_size` rollouts of `prompts` problems with the current parameters, or,
   where sampling overlaps with the update, with those of one step before.
2. Every rollout is graded; rewards are centred within their group into advantages.
3. Each group becomes one forest (`group_forest`), forests are packed into rows, and one optimizer
   update follows on the global token mean; sampler and trainer log-probabilities are compared.
4. Problems and sampling seeds are functions of (seed, step), and rollouts that no checkpoint covers
   are kept on disk, so a run resumed after any interruption repeats exactly what an uninterrupted
   run would have done.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from tw_jax.data.progress import shown_progress
from tw_jax.errors import UserError
from tw_jax.parallel.attention import check_backend
from tw_jax.parallel.mesh import make_layout
from tw_jax.parallel.processes import is_first_process
from tw_jax.rollout.request import Request
from tw_jax.train.adapter_record import weights_fingerprint
from tw_jax.train.advantages import (
    group_advantages,
    kept_rollouts,
    teaching_groups,
    usable_rollouts,
)
from tw_jax.train.checkpoint import Checkpointer
from tw_jax.train.interrupt import graceful_interrupt
from tw_jax.train.pending_rollouts import PendingRollouts
from tw_jax.train.policy_learner import Learned, PolicyLearner
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.rl_health import Health, StepFacts, checked
from tw_jax.train.rl_metrics import sampled_tokens, step_metrics, time_metrics
from tw_jax.train.rl_problems import open_problems
from tw_jax.train.rl_rewards import judged_rollouts, reward_metrics
from tw_jax.train.rl_sampling import StepSample, StepSampler
from tw_jax.train.rollout_devices import RolloutDevices, split_devices
from tw_jax.train.rollout_samples import FILE_NAME as SAMPLES_FILE
from tw_jax.train.rollout_samples import RolloutSamples
from tw_jax.train.run_dir import (
    LoadedModel,
    ModelConfig,
    checkpoint_meta,
    checkpoints_dir,
    load_run,
    only_run,
    prepare_run_dir,
    write_config,
)
from tw_jax.train.step_times import StepTimes
from tw_jax.train.tracker import make_tracker
from tw_jax.train.trainable import part


@dataclasses.dataclass(frozen=True)
class RLResult:
    """How a run ended.

    Attributes:
      model: the improved model; an adapter is not merged (`tw_jax.models.lora.merged`).
      max_logprob_abs_diff: largest sampler-trainer difference of any token in this call.
      seconds: wall time of this call.
      interrupted: the run was stopped by a signal.
    """

    model: LoadedModel
    max_logprob_abs_diff: float
    seconds: float
    interrupted: bool


@dataclasses.dataclass(frozen=True)
class _Progress:
    """What a checkpoint holds of a run besides its train state.

    Attributes:
      position: problems asked so far.
      health: what is remembered of the steps so far.
    """

    position: int = 0
    health: Health = Health()

    def to_json(self) -> dict[str, Any]:
        return {"position": self.position, "health": self.health.to_json()}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "_Progress":
        return cls(saved["position"], Health.from_json(saved["health"]))


def run_rl(config: RLConfig) -> RLResult:
    """Improves a model until `config.steps`, resuming where a checkpoint exists.

    Raises:
      UserError: unusable configuration or checkpoint, or the run stopped by itself
        (`tw_jax.train.rl_health`).
    """
    began = time.monotonic()
    training, sampling = split_devices(config.rollout_devices, jax.devices(), jax.process_index())
    layout = make_layout(config.parallel, training)
    check_backend(layout, config.memory.attention)
    if layout is not None:
        layout.check_rows(config.rows, config.row_len)
        _say(f"{len(training)} devices train: {layout.describe()}")
    model = load_run(config.init_from, config.init_step, layout=layout)
    dtypes: Any = {n: getattr(model.config, n) for n in ("param_dtype", "compute_dtype")}
    source = ModelConfig(config.init_from, schema=model.schema.name, **dtypes)
    start = weights_fingerprint(model.params)
    model, trainable, params = part(model, config.adapter, source, config.seed, layout)
    run_dir = prepare_run_dir(config.run_dir, model.tokenizer)
    learner = PolicyLearner(config, model, trainable, layout)
    state = learner.initial_state(params)
    # Whoever needs the parameters of the start has them.
    model = dataclasses.replace(model, params={})
    del params
    devices = RolloutDevices(
        model.graphdef, model.schema, config.engine, config.rollout_devices, sampling
    )
    devices.check("sampling", Request(np.zeros(1, np.int32), config.seed, config.sampling))
    pending = PendingRollouts(run_dir, settings_digest(config), jax.process_index())
    with (
        only_run(run_dir),
        open_problems(config, model.tokenizer, run_dir) as problems,
        Checkpointer(checkpoints_dir(run_dir), keep=config.keep_checkpoints) as checkpointer,
        graceful_interrupt() as interrupt,
    ):
        meta = checkpoint_meta(
            model.config,
            model.schema,
            seed=config.seed,
            start=start,
            prompts=config.prompts,
            group_size=config.group_size,
            **problems.meta,
            **trainable.settings,
        )
        progress = _Progress()
        if checkpointer.latest_step() is not None:
            state, saved_progress, _ = checkpointer.restore(state, expected_meta=meta)
            progress = _Progress.from_json(saved_progress)
        write_config(run_dir, config)
        step = begun = saved = int(state.step) // config.optimizer_steps_per_step
        if step:
            _say(f"{run_dir}: going on from step {step} of {config.steps}")
        largest, unhealthy = 0.0, None

        def save() -> None:
            nonlocal saved
            checkpointer.save(
                step, state, data_state=progress.to_json(), meta=meta | trainable.origin
            )
            pending.forget_before(saved)  # the checkpoint before this one is on the disk by now
            saved = step

        with (
            make_tracker(config.tracker, run_dir, resume_step=begun) as tracker,
            RolloutSamples(run_dir / SAMPLES_FILE, model.tokenizer, resume_step=begun) as samples,
            shown_progress("RL", config.steps, begun) as shown,
            StepSampler(
                config, model, devices, problems, pending, lambda: interrupt.requested
            ) as sampler,
        ):
            times = StepTimes()
            while step < config.steps and not interrupt.requested_anywhere():
                with times.of("rollout"):
                    current = trainable.model_params(state.params)
                    sample = sampler.sample(step, progress.position, current)
                if sample is None:
                    break
                position = progress.position + len(sample.rewards)
                with times.of("weights"):
                    if config.overlap and step + 1 < config.steps:
                        sampler.begin(step + 1, position, current)
                    else:
                        sampler.release()
                    del current
                with times.of("reward"):
                    objective = config.policy_objective
                    usable = usable_rollouts(objective, sample.format_valid)
                    advantages = group_advantages(sample.rewards, objective.normalizer, usable)
                    kept = kept_rollouts(objective, sample.rewards, advantages, usable)
                learned = learner.learn(state, step, sample, advantages, kept, times)
                state = learned.state
                largest = max(largest, learned.sums["max_logprob_abs_diff"])

                facts = _step_facts(sample, learned, int(teaching_groups(advantages, kept).sum()))
                health, unhealthy = checked(
                    config.health, progress.health, facts, row_len=config.row_len
                )
                progress = _Progress(position, health)
                metrics = _metrics(sample, learned, usable, kept, times)
                judged = judged_rollouts(sample.facts, sample.terms, sample.grades, advantages)
                step += 1
                tracker.log(step, metrics)
                samples.write_step(config.samples, step, sample.rollouts, judged, config.group_size)
                shown.update(
                    step,
                    tokens=int(learned.sums["tokens"]),
                    metrics={k: metrics[k] for k in ("reward", "accuracy", "activation_ratio")},
                )
                times = StepTimes()  # a checkpoint counts towards the step behind it
                if step % config.checkpoint_every == 0 or step == config.steps or unhealthy:
                    with times.of("checkpoint"):
                        if sampler.settled():
                            save()
                if unhealthy:
                    break
            if step > saved and sampler.settled():
                save()
        checkpointer.wait()
        pending.forget_before(saved)
    _say_end(run_dir, step, saved, interrupt.requested)
    if unhealthy and step < config.steps:
        raise UserError(
            f"{run_dir}: stopped after step {step} of {config.steps}, saved. {unhealthy}. The same "
            "command goes on all the same; health.patience_steps=0 stops no run"
        )
    if unhealthy:  # the run is complete, so that nothing was stopped
        _say(f"Warning: {unhealthy}")
    return RLResult(
        model=dataclasses.replace(model, params=trainable.model_params(state.params), step=step),
        max_logprob_abs_diff=largest,
        seconds=time.monotonic() - began,
        interrupted=interrupt.requested,
    )


def settings_digest(config: RLConfig) -> str:
    """Names the settings under which parameters come about; what only watches them is left out."""
    settings = dataclasses.asdict(config)
    for name in ("run_dir", "tracker", "samples", "checkpoint_every", "keep_checkpoints", "health"):
        del settings[name]
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode())
    if (file := config.grading.file) is not None and file.is_file():
        digest.update(file.read_bytes())  # a function that judges in another way
    return digest.hexdigest()[:16]


def _step_facts(sample: StepSample, learned: Learned, teaching: int) -> StepFacts:
    return StepFacts(
        groups=len(sample.rewards),
        teaching_groups=teaching,
        accuracy=float(np.mean([f.correct for f in sample.facts])),
        format_valid_rate=float(np.mean([f.format_valid for f in sample.facts])),
        packed=learned.packed,
        too_long_tokens=max(learned.too_long_tokens, default=0),
        updates=learned.updates,
        skipped_updates=learned.skipped_updates,
    )


def _metrics(
    sample: StepSample,
    learned: Learned,
    usable: np.ndarray,
    kept: np.ndarray,
    times: StepTimes,
) -> dict[str, float]:
    metrics = step_metrics(sample.rollouts, sample.facts, sample.rewards, learned.sums, usable)
    metrics |= reward_metrics(sample.facts, sample.terms)
    metrics |= time_metrics(
        times.seconds,
        sampled_tokens=sampled_tokens(sample.rollouts),
        sampling_s=sample.seconds,
        update_tokens=learned.sums["tokens"],
    )
    if len(learned.ages):
        metrics["staleness"] = float(learned.ages.mean())
        metrics["staleness/max"] = float(learned.ages.max())
    metrics["groups"] = len(sample.rewards)
    metrics["left_out/filtered"] = float(1 - kept.mean())
    metrics["left_out/too_long"] = len(learned.too_long_tokens) / kept.size
    metrics["skipped_updates"] = int(learned.state.skipped_updates)
    return metrics


def _say(message: str) -> None:
    if is_first_process():
        print(message)


def _say_end(run_dir: pathlib.Path, step: int, saved: int, interrupted: bool) -> None:
    if interrupted and saved == step:
        _say(f"Stopped at step {step}. Run the same command again to go on.")
    elif interrupted:
        _say(
            f"Stopped at step {step}. Rollouts since the checkpoint of step {saved} are kept: the "
            "same command makes the updates again and goes on."
        )
    if saved:
        _say(f"{run_dir}: step {saved}, checkpoint saved")
