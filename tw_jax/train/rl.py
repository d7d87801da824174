"""Reinforcement learning with the exact policy gradient of the fork-join process (P-GRPO).

1. Each step samples `group_size` rollouts of `prompts` problems with the current parameters.
2. Every rollout is graded; rewards are centred within their group into advantages.
3. Each group becomes one forest (`group_forest`), forests are packed into rows, and one optimizer
   update follows on the global token mean; sampler and trainer log-probabilities are compared.
4. Problems and sampling seeds are functions of (seed, step), so a run resumed from a checkpoint
   repeats exactly what an uninterrupted run would have done.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from tw_jax.data.progress import shown_progress
from tw_jax.errors import UserError
from tw_jax.parallel.attention import check_backend
from tw_jax.parallel.mesh import make_layout
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.tasks.registry import make_task
from tw_jax.train.checkpoint import Checkpointer
from tw_jax.train.interrupt import graceful_interrupt
from tw_jax.train.objective import group_advantages
from tw_jax.train.optimizer import make_optimizer
from tw_jax.train.placement import place_run, placed_state
from tw_jax.train.rl_batches import make_scorer, micro_batches
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.rl_metrics import merge_sums, reward_term_means, step_metrics
from tw_jax.train.rl_rollouts import sample_step, step_rewards
from tw_jax.train.run_dir import (
    LoadedModel,
    ModelConfig,
    checkpoint_meta,
    checkpoints_dir,
    load_run,
    prepare_run_dir,
    write_config,
)
from tw_jax.train.tracker import make_tracker
from tw_jax.train.trainable import part
from tw_jax.train.update import make_update, policy_sum


@dataclasses.dataclass(frozen=True)
class RLResult:
    """How a run ended.

    Attributes:
      model: the improved model; an adapter is not merged (`tw_jax.models.lora.merged`).
      max_logprob_abs_diff: largest sampler-trainer difference of any token in this call.
      seconds: wall time of this call.
      interrupted: the run was stopped by a signal and saved.
    """

    model: LoadedModel
    max_logprob_abs_diff: float
    seconds: float
    interrupted: bool


def run_rl(config: RLConfig) -> RLResult:
    """Improves a model until `config.steps`, resuming where a checkpoint exists.

    Raises:
      UserError: unusable configuration or checkpoint.
    """
    began = time.monotonic()
    if jax.process_count() > 1:
        raise UserError("rl runs in one process so far, on all devices that it sees")
    layout = make_layout(config.parallel)
    check_backend(layout, config.memory.attention)
    if layout is not None:
        layout.check_rows(config.rows, config.row_len)
        print(f"{jax.device_count()} devices: {layout.describe()}")
    model = load_run(config.init_from, config.init_step, layout=layout)
    dtypes: Any = {n: getattr(model.config, n) for n in ("param_dtype", "compute_dtype")}
    source = ModelConfig(config.init_from, schema=model.schema.name, **dtypes)
    model, trainable = part(model, config.adapter, source, config.seed, layout)
    run_dir = prepare_run_dir(config.run_dir, model.tokenizer)
    task = make_task(config.task)
    engine = RolloutEngine(model.graphdef, model.schema, config.engine)
    optimizer = make_optimizer(config.optimizer, config.steps)
    placement = place_run(layout, model.config, optimizer, trainable.adapter)
    sum_loss = policy_sum(model.graphdef, config.objective, config.memory, layout)
    update = make_update(sum_loss, optimizer, placement.state, trainable.assemble)
    score = make_scorer(config, model, layout)

    # The update donates its state; the reference and the loaded model must survive it.
    own_params = jax.tree.map(jnp.copy, trainable.params)
    state = placed_state(own_params, optimizer, placement)
    reference = model.params if config.objective.kl_coefficient else None
    meta = checkpoint_meta(
        model.config,
        model.schema,
        seed=config.seed,
        task=dataclasses.asdict(config.task),
        prompts=config.prompts,
        group_size=config.group_size,
        **trainable.settings,
    )
    saved_meta = meta | trainable.origin
    largest = 0.0
    with (
        Checkpointer(checkpoints_dir(run_dir), keep=config.keep_checkpoints) as checkpointer,
        graceful_interrupt() as interrupt,
    ):
        if checkpointer.latest_step() is not None:
            state, _, _ = checkpointer.restore(state, expected_meta=meta)
            print(f"{run_dir}: going on from a checkpoint")
        write_config(run_dir, config)
        step = start = int(state.step) // config.updates_per_step
        with (
            make_tracker(config.tracker, run_dir, resume_step=start) as tracker,
            shown_progress("P-GRPO", config.steps, start) as progress,
        ):
            saved = start
            while step < config.steps and not interrupt.requested_anywhere():
                clock = time.monotonic()
                current = trainable.model_params(state.params)
                params = jax.device_put(current, jax.devices()[0])
                rollouts, graded = sample_step(config, model, engine, task, params, step)
                del params  # a whole copy on a mesh
                rollout_s = time.monotonic() - clock
                facts, rewards = step_rewards(config, rollouts, graded, step)
                advantages = group_advantages(rewards, config.objective.normalizer)
                sums: dict[str, float] = {}
                # Scored before the first update: "old" is the policy that sampled.
                updates = [
                    [score(current, reference, placement.batch(batch)) for batch in batches]
                    for batches in micro_batches(config, model, rollouts, advantages)
                ]
                for batches in updates:
                    state, update_sums = update(state, batches, trainable.frozen)
                    sums = merge_sums(sums, update_sums)
                largest = max(largest, sums["max_logprob_abs_diff"])
                step += 1
                metrics = step_metrics(rollouts, facts, rewards, sums)
                metrics |= {
                    "rollout_s": rollout_s,
                    "update_s": time.monotonic() - clock - rollout_s,
                    "skipped_updates": int(state.skipped_updates),
                }
                metrics |= reward_term_means(config.reward, facts, step - 1)
                tracker.log(step, metrics)
                shown = {k: metrics[k] for k in ("reward", "accuracy", "activation_ratio")}
                progress.update(step, tokens=int(sums["tokens"]), metrics=shown)
                if step % config.checkpoint_every == 0 or step == config.steps:
                    checkpointer.save(step, state, data_state=None, meta=saved_meta)
                    saved = step
            if step > saved:
                checkpointer.save(step, state, data_state=None, meta=saved_meta)
    if interrupt.requested:
        print(f"Stopped at step {step} and saved. Run the same command again to go on.")
    print(f"{run_dir}: step {step}, checkpoint saved")
    return RLResult(
        model=dataclasses.replace(model, params=trainable.model_params(state.params), step=step),
        max_logprob_abs_diff=largest,
        seconds=time.monotonic() - began,
        interrupted=interrupt.requested,
    )
