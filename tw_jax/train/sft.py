"""Supervised fine-tuning on trie-packed trajectories.

1. Each step takes the next `gradient_accumulation` batches of packed rows (`train.sft_data`).
2. `train.update` turns them into one optimizer update on the global weighted token mean.
3. Every `eval_every` steps the held-out loss is measured on fixed batches; every
   `checkpoint_every` steps parameters, optimizer and data position are saved.
4. Started again with the same command, a run goes on from its newest checkpoint with exactly the
   batches and updates that an uninterrupted run would have made.

With an `adapter`, "parameters" are the adapter's alone; the base is an argument of the update that
is neither differentiated nor donated nor saved (`tw_jax.train.trainable`).
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tw_jax.config_checks import require_at_least, require_seed
from tw_jax.data.packed_batch import PackedBatch
from tw_jax.data.progress import shown_progress
from tw_jax.errors import UserError
from tw_jax.models.lora import AdapterConfig
from tw_jax.parallel.attention import check_backend
from tw_jax.parallel.mesh import ParallelConfig, make_layout
from tw_jax.tasks.registry import TaskConfig
from tw_jax.train.checkpoint import Checkpointer
from tw_jax.train.interrupt import graceful_interrupt
from tw_jax.train.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from tw_jax.train.placement import place_run, placed_state
from tw_jax.train.run_dir import (
    LoadedModel,
    ModelConfig,
    checkpoint_meta,
    checkpoints_dir,
    new_model,
    only_run,
    prepare_run_dir,
    write_config,
)
from tw_jax.train.sft_data import (
    SFTDataConfig,
    heldout_batches,
    store_hashes,
    training_batches,
    useful_tokens,
)
from tw_jax.train.tracker import TrackerConfig, make_tracker
from tw_jax.train.trainable import part
from tw_jax.train.update import MemoryConfig, make_update, nll_sum


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """One fine-tuning run.

    Attributes:
      run_dir: folder of the run; the same folder resumes.
      seed: of parameters, problems and shuffling.
      steps: optimizer updates.
      gradient_accumulation: micro-batches per update.
      model: which model.
      adapter: train a low-rank adapter on a frozen base, which may be quantised; null trains the
        whole model.
      task: what is trained when neither files nor stores are given, and what is evaluated.
      data: see `SFTDataConfig`.
      optimizer: see `OptimizerConfig`.
      memory: see `MemoryConfig`.
      parallel: how the run is spread over devices.
      tracker: where metrics go.
      log_every: steps between logged metrics.
      eval_every: steps between held-out losses.
      checkpoint_every: steps between checkpoints; the last step is always saved.
      keep_checkpoints: newest checkpoints that are kept.
    """

    run_dir: str = "runs/sft"
    seed: int = 0
    steps: int = 1500
    gradient_accumulation: int = 1
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig | None = None
    task: TaskConfig = TaskConfig()
    data: SFTDataConfig = SFTDataConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=3e-3,
        final_learning_rate_fraction=0.05,
        warmup_steps=50,
        beta2=0.98,
        weight_decay=0.2,
    )
    memory: MemoryConfig = MemoryConfig()
    parallel: ParallelConfig = ParallelConfig()
    tracker: TrackerConfig = TrackerConfig()
    log_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 250
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        require_at_least(self, steps=1, gradient_accumulation=1, log_every=1)
        require_at_least(self, eval_every=1, checkpoint_every=1, keep_checkpoints=1)
        require_seed(self)


# Called after a step with the step number and the parameters; levanter's "hooks every n".
Hook = Callable[[int, Any], None]


@dataclasses.dataclass(frozen=True)
class SFTResult:
    """How a run ended.

    Attributes:
      model: the trained model; an adapter is not merged (`tw_jax.models.lora.merged`).
      heldout_loss: last held-out loss in nats per token, NaN where none was measured.
      seconds: wall time of this call.
      interrupted: the run was stopped by a signal and saved.
    """

    model: LoadedModel
    heldout_loss: float
    seconds: float
    interrupted: bool


def run_sft(config: SFTConfig, hooks: Sequence[tuple[int, Hook]] = ()) -> SFTResult:
    """Trains until `config.steps`, resuming where a checkpoint exists.

    Args:
      config: the run.
      hooks: (every n steps, function) pairs.

    Raises:
      UserError: unusable configuration, data or checkpoint.
    """
    began = time.monotonic()
    layout = make_layout(config.parallel)
    check_backend(layout, config.memory.attention)
    if layout is not None:
        layout.check_rows(config.data.rows, config.data.row_len)
        print(f"{jax.device_count()} devices: {layout.describe()}")
    model = new_model(config.model, config.seed, layout)
    model, trainable, params = part(model, config.adapter, config.model, config.seed, layout)
    model = dataclasses.replace(model, params={})  # nobody needs those of the start
    frozen = trainable.frozen
    run_dir = prepare_run_dir(config.run_dir, model.tokenizer)
    batches = iter(training_batches(config, model, layout))

    optimizer = make_optimizer(config.optimizer, config.steps)
    learning_rate = learning_rate_schedule(config.optimizer, config.steps)
    placement = place_run(layout, model.config, optimizer, trainable.adapter)
    sum_loss = nll_sum(model.graphdef, config.memory, layout)
    update = make_update(sum_loss, optimizer, placement.state, trainable.assemble)
    heldout_sums = jax.jit(
        lambda params, batch, frozen: sum_loss(trainable.assemble(params, frozen), batch)[1]
    )

    heldout = [placement.batch(batch) for batch in heldout_batches(config, model)]
    state = placed_state(params, optimizer, placement)
    del params
    # A checkpoint goes on only with the data it was trained on; its position means nothing else.
    meta = checkpoint_meta(
        model.config,
        model.schema,
        seed=config.seed,
        task=dataclasses.asdict(config.task),
        data=dataclasses.asdict(config.data),
        stores=store_hashes(config.data),
        gradient_accumulation=config.gradient_accumulation,
        **trainable.settings,
    )
    heldout_loss = float("nan")
    with (
        only_run(run_dir),
        Checkpointer(checkpoints_dir(run_dir), keep=config.keep_checkpoints) as checkpointer,
        graceful_interrupt() as interrupt,
    ):
        if checkpointer.latest_step() is not None:
            state, data_state, _ = checkpointer.restore(state, expected_meta=meta)
            batches.set_state(data_state)
            print(f"{run_dir}: going on from step {int(state.step)} of {config.steps}")
        step = int(state.step)
        write_config(run_dir, config)

        def save() -> None:
            saved_meta = meta | trainable.origin
            checkpointer.save(step, state, data_state=batches.get_state(), meta=saved_meta)

        with (
            make_tracker(config.tracker, run_dir, resume_step=step) as tracker,
            shown_progress("SFT", config.steps, step) as progress,
        ):
            saved, tokens_since_log = step, 0
            while step < config.steps and not interrupt.requested_anywhere():
                micro = list(itertools.islice(batches, config.gradient_accumulation))
                if len(micro) < config.gradient_accumulation:
                    break  # the files or stores are used up
                state, sums = update(state, [placement.batch(batch) for batch in micro], frozen)
                step += 1
                tokens_since_log += useful_tokens(micro)
                if step % config.log_every == 0 or step == config.steps:
                    # Reading the loss waits for the device: only here is the rate a true one.
                    loss = float(sums["loss"]) / max(float(sums["weight"]), 1e-20)
                    progress.update(step, tokens=tokens_since_log, metrics={"loss": loss})
                    tokens_since_log = 0
                    metrics = {
                        "loss": loss,
                        "grad_norm": float(sums["grad_norm"]),
                        "skipped_updates": int(state.skipped_updates),
                        "learning_rate": float(jnp.asarray(learning_rate(step - 1))),
                        "tokens_per_s": progress.tokens_per_s,
                    }
                    tracker.log(step, metrics)
                if heldout and (step % config.eval_every == 0 or step == config.steps):
                    heldout_loss = _mean_loss(heldout_sums, state.params, heldout, frozen)
                    tracker.log(step, {"heldout_loss": heldout_loss})
                if step % config.checkpoint_every == 0 or step == config.steps:
                    save()
                    saved = step
                for every, hook in hooks:
                    if step % every == 0:
                        hook(step, trainable.model_params(state.params))
            if step > saved:
                save()
    if step == 0:
        raise UserError("data: there is not enough for one step; add files or lower data.rows")
    if interrupt.requested:
        print(f"Stopped at step {step} and saved. Run the same command again to go on.")
    elif step < config.steps:
        print(f"The data ended after {step} of {config.steps} steps; data.epochs sets the passes.")
    skipped = int(state.skipped_updates)
    if skipped:
        print(
            f"Warning: {skipped} of {step} updates were skipped because a gradient was not finite; "
            "lower optimizer.learning_rate"
        )
    print(f"{run_dir}: step {step}, checkpoint saved")
    return SFTResult(
        model=dataclasses.replace(model, params=trainable.model_params(state.params), step=step),
        heldout_loss=heldout_loss,
        seconds=time.monotonic() - began,
        interrupted=interrupt.requested,
    )


def _mean_loss(sums: Callable, params: Any, batches: Sequence[PackedBatch], frozen: Any) -> float:
    totals = [sums(params, batch, frozen) for batch in batches]
    weight = sum(float(t["weight"]) for t in totals)
    return sum(float(t["loss"]) for t in totals) / max(weight, 1e-20)
