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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.config_checks import require_at_least, require_seed
from tw_jax.data.packed_batch import PackedBatch
from tw_jax.data.packing import WeightedTrie, best_fit_rows, pack_rows
from tw_jax.data.text import encode_prompt
from tw_jax.errors import UserError
from tw_jax.models.lora import AdapterConfig
from tw_jax.parallel.attention import check_backend
from tw_jax.parallel.layout import Layout
from tw_jax.parallel.mesh import ParallelConfig, make_layout
from tw_jax.rewards.grading import Graded, grade
from tw_jax.rewards.reward import RewardConfig, RolloutFacts, reward_terms
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import Request, SamplingParams, sampling_seed
from tw_jax.rollout.rollout import Rollout
from tw_jax.tasks.registry import TaskConfig, make_task
from tw_jax.tasks.task import Task
from tw_jax.train.checkpoint import Checkpointer
from tw_jax.train.group_forest import group_forest
from tw_jax.train.interrupt import graceful_interrupt
from tw_jax.train.objective import ObjectiveConfig, group_advantages
from tw_jax.train.optimizer import OptimizerConfig, make_optimizer
from tw_jax.train.placement import place_run, placed_state
from tw_jax.train.progress import training_progress
from tw_jax.train.rl_metrics import merge_sums, reward_term_means, step_metrics
from tw_jax.train.run_dir import (
    LoadedModel,
    ModelConfig,
    checkpoint_meta,
    checkpoints_dir,
    load_run,
    prepare_run_dir,
    write_config,
)
from tw_jax.train.scoring import token_logprobs
from tw_jax.train.tracker import TrackerConfig, make_tracker
from tw_jax.train.trainable import part
from tw_jax.train.update import MemoryConfig, make_update, policy_sum


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """One reinforcement-learning run.

    Attributes:
      run_dir: folder of the run; the same folder resumes.
      init_from: folder of the run whose model is improved.
      init_step: checkpoint step of `init_from`; null takes the newest.
      adapter: train a low-rank adapter on a frozen base, which may be quantised; null trains the
        whole model.
      seed: of problems and sampling.
      steps: rollout-and-update rounds.
      prompts: problems per step.
      group_size: rollouts per problem.
      updates_per_step: optimizer updates that share a step's rollouts; more than 1 needs an
        objective with a ratio.
      task: source of problems.
      sampling: how rollouts are drawn.
      engine: size of the rollout engine.
      reward: see `RewardConfig`.
      objective: see `ObjectiveConfig`; `tw_jax.train.objective.PRESETS` lists the published ones.
      optimizer: see `OptimizerConfig`.
      memory: see `MemoryConfig`.
      parallel: how the update is spread over devices; rollouts run on the first one.
      row_len: tokens per packed row; a group that is longer is split into several forests.
      rows: rows per micro-batch.
      tracker: where metrics go.
      checkpoint_every: steps between checkpoints; the last step is always saved.
      keep_checkpoints: newest checkpoints that are kept.
    """

    run_dir: str = "runs/rl"
    init_from: str = "runs/sft"
    init_step: int | None = None
    adapter: AdapterConfig | None = None
    seed: int = 0
    steps: int = 60
    prompts: int = 16
    group_size: int = 8
    updates_per_step: int = 1
    task: TaskConfig = TaskConfig()
    sampling: SamplingParams = SamplingParams()
    engine: EngineConfig = EngineConfig()
    reward: RewardConfig = RewardConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1.5e-4, schedule="constant", warmup_steps=5
    )
    memory: MemoryConfig = MemoryConfig()
    parallel: ParallelConfig = ParallelConfig()
    row_len: int = 2048
    rows: int = 2
    tracker: TrackerConfig = TrackerConfig()
    checkpoint_every: int = 20
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        require_at_least(self, steps=0, prompts=1, row_len=1, rows=1)
        require_at_least(self, checkpoint_every=1, keep_checkpoints=1)
        require_seed(self)
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size}: a group mean needs at least 2")
        if not 1 <= self.updates_per_step <= self.prompts:
            raise ValueError(
                f"updates_per_step={self.updates_per_step}: must lie in 1..prompts={self.prompts}"
            )
        if self.updates_per_step > 1 and self.objective.ratio == "on_policy":
            raise ValueError(
                "updates_per_step > 1 is off-policy: set objective.ratio to ppo_clip or detached"
            )


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
    score = _scorer(config, model, layout)

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
            training_progress("P-GRPO", config.steps, start) as progress,
        ):
            saved = start
            while step < config.steps and not interrupt.requested_anywhere():
                clock = time.monotonic()
                current = trainable.model_params(state.params)
                params = jax.device_put(current, jax.devices()[0])
                rollouts, graded = _sample(config, model, engine, task, params, step)
                del params  # a whole copy on a mesh
                rollout_s = time.monotonic() - clock
                facts, rewards = _rewards(config, rollouts, graded, step)
                advantages = group_advantages(rewards, config.objective.normalizer)
                sums: dict[str, float] = {}
                # Scored before the first update: "old" is the policy that sampled.
                updates = [
                    [score(current, reference, placement.batch(batch)) for batch in batches]
                    for batches in _micro_batches(config, model, rollouts, advantages)
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


def _sample(
    config: RLConfig,
    model: LoadedModel,
    engine: RolloutEngine,
    task: Task,
    params: Any,
    step: int,
) -> tuple[list[Rollout], list[Graded]]:
    """Rollouts of one step, prompt by prompt, graded as they finish."""
    problems = [
        task.problem("train", step * config.prompts + i, config.seed) for i in range(config.prompts)
    ]
    requests = [
        Request(
            prompt=encode_prompt(model.tokenizer, problem.prompt),
            seed=sampling_seed(config.seed, step, p, k),
            sampling=config.sampling,
        )
        for p, problem in enumerate(problems)
        for k in range(config.group_size)
    ]
    graded: dict[int, Graded] = {}

    def grade_one(index: int, rollout: Rollout) -> None:
        problem = problems[index // config.group_size]
        graded[index] = grade(rollout, problem, task, model.tokenizer, model.schema)

    rollouts = engine.generate(params, requests, on_finish=grade_one)
    return rollouts, [graded[i] for i in range(len(rollouts))]


def _rewards(
    config: RLConfig, rollouts: Sequence[Rollout], graded: Sequence[Graded], step: int
) -> tuple[list[RolloutFacts], np.ndarray]:
    facts = [
        RolloutFacts(g.correct, g.format_valid, r.total_tokens, r.critical_path)
        for r, g in zip(rollouts, graded, strict=True)
    ]
    rewards = [sum(reward_terms(config.reward, f, step).values()) for f in facts]
    return facts, np.reshape(rewards, (config.prompts, config.group_size))


def _micro_batches(
    config: RLConfig,
    model: LoadedModel,
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
) -> list[list[PackedBatch]]:
    """Micro-batches of every update; groups are dealt to updates in order."""
    groups = np.array_split(np.arange(config.prompts), config.updates_per_step)
    updates = []
    for members in groups:
        forests = [
            f for p in members for f in _forests(config, model, rollouts, advantages, int(p))
        ]
        rows = best_fit_rows([len(forest.trie) for forest in forests], config.row_len)
        rows += [[] for _ in range(-len(rows) % config.rows)]
        updates.append(
            [
                pack_rows(
                    [[forests[i] for i in row] for row in rows[start : start + config.rows]],
                    config.row_len,
                )
                for start in range(0, len(rows), config.rows)
            ]
        )
    return updates


def _forests(
    config: RLConfig,
    model: LoadedModel,
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    prompt: int,
) -> list[WeightedTrie]:
    """The group of one prompt as one forest, or several where it is longer than a row."""
    ids = list(range(prompt * config.group_size, (prompt + 1) * config.group_size))

    def build(members: list[int]) -> list[WeightedTrie]:
        forest = group_forest(
            model.schema,
            [rollouts[i] for i in members],
            [float(advantages.reshape(-1)[i]) for i in members],
            members,
            config.objective.aggregation,
        )
        if len(forest.trie) <= config.row_len:
            return [forest]
        if len(members) == 1:
            raise UserError(
                f"row_len={config.row_len} is too short: one rollout has {len(forest.trie)} trie "
                "tokens; raise row_len or lower sampling.max_response_tokens"
            )
        half = len(members) // 2
        return build(members[:half]) + build(members[half:])

    return build(ids)


def _scorer(
    config: RLConfig, model: LoadedModel, layout: Layout | None
) -> Callable[[Any, Any, PackedBatch], PackedBatch]:
    """Adds log-probabilities of the policy before the update, and of the reference if any."""

    @jax.jit
    def logprobs(params: Any, batch: PackedBatch):
        return token_logprobs(
            model.graphdef,
            params,
            batch,
            head_chunk=config.memory.head_chunk,
            remat=config.memory.remat,
            attention=config.memory.attention,
            layout=layout,
        )

    def score(params: Any, reference: Any, batch: PackedBatch) -> PackedBatch:
        if config.objective.ratio != "on_policy":
            batch = dataclasses.replace(batch, old_logprob=logprobs(params, batch))
        if reference is not None:
            batch = dataclasses.replace(batch, reference_logprob=logprobs(reference, batch))
        return batch

    return score
