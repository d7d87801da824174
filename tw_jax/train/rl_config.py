"""Settings of `tw-jax rl`."""

import dataclasses

from tw_jax.config_checks import require_at_least, require_seed
from tw_jax.models.lora import AdapterConfig
from tw_jax.parallel.mesh import ParallelConfig
from tw_jax.rewards.reward import RewardConfig
from tw_jax.rollout.engine import EngineConfig
from tw_jax.rollout.request import SamplingParams
from tw_jax.tasks.registry import TaskConfig
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.optimizer import OptimizerConfig
from tw_jax.train.tracker import TrackerConfig
from tw_jax.train.update import MemoryConfig


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
