"""Settings of `tw-jax rl`."""

import dataclasses

from tw_jax.config_checks import require_at_least, require_seed, require_share
from tw_jax.data.problem_file import ProblemColumns
from tw_jax.models.lora import AdapterConfig
from tw_jax.parallel.mesh import ParallelConfig
from tw_jax.rewards.graders import GradingConfig
from tw_jax.rewards.reward import RewardConfig
from tw_jax.rollout.engine import EngineConfig
from tw_jax.rollout.request import SamplingParams
from tw_jax.tasks.registry import TaskConfig
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.objective_presets import PRESETS, ObjectiveName
from tw_jax.train.optimizer import OptimizerConfig
from tw_jax.train.rl_health import HealthConfig
from tw_jax.train.rollout_devices import RolloutDevicesConfig
from tw_jax.train.rollout_samples import RolloutSamplesConfig
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
      refill_rounds: rounds of further problems that a step may ask in place of those whose rollouts
        all have the same reward (DAPO's dynamic sampling); needs objective.drop_zero_variance.
      overlap: sample the next step's rollouts while this step's update runs. They are one update
        old then, so the objective needs an importance_cap.
      updates_per_step: optimizer updates that share a step's rollouts; more than 1 needs an
        objective with a ratio.
      passes_per_step: how often a step's rollouts are gone through, all updates in the same order
        each time; more than 1 needs a ratio likewise.
      task: source of problems where none are named; it grades its own answers.
      problems: sources of problems: .jsonl, .parquet, .array_record, a saved dataset, hf://NAME;
        empty takes training problems of the task. Every pass has an order of its own.
      columns: names of the problems' fields.
      as_chat: put prompts that are plain text through the model's chat template.
      max_reject_share: more bad problems than this share stop the run before it begins.
      grading: how answers to problems from sources are judged.
      grading_wait_s: seconds that a step waits for grades behind its last rollout; answers that are
        not graded by then count as failures of the grader.
      max_ungraded_share: largest share of a step's answers on which the grader may fail; more stop
        the run. Failures are rewarded as `reward.accuracy.ungraded` says.
      sampling: how rollouts are drawn.
      engine: size of the rollout engine.
      reward: see `RewardConfig`.
      preset: a published objective by its name (`tw_jax.train.objective_presets`); null takes
        `objective`, or else "pgrpo".
      objective: an objective that `preset` does not name; not given with one.
      measure_entropy: log the policy's entropy, by kind of token; worked out beside the loss.
      measure_kl_to_start: log how far the policy is from the model that the run started from: one
        more forward pass, and the start's parameters stay in memory.
      optimizer: see `OptimizerConfig`.
      health: when the run stops by itself.
      memory: see `MemoryConfig`.
      parallel: how the update is spread over devices.
      rollout_devices: which devices sample.
      row_len: tokens per packed row; a group that is longer is split into several forests.
      rows: rows per micro-batch.
      tracker: where metrics go.
      samples: which rollouts are kept in `rollouts.jsonl`, for `tw-jax view run`.
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
    refill_rounds: int = 0
    overlap: bool = False
    updates_per_step: int = 1
    passes_per_step: int = 1
    task: TaskConfig = TaskConfig()
    problems: tuple[str, ...] = ()
    columns: ProblemColumns = ProblemColumns()
    as_chat: bool = False
    max_reject_share: float = 0.1
    grading: GradingConfig = GradingConfig()
    grading_wait_s: float = 60.0
    max_ungraded_share: float = 0.5
    sampling: SamplingParams = SamplingParams()
    engine: EngineConfig = EngineConfig()
    reward: RewardConfig = RewardConfig()
    preset: ObjectiveName | None = None
    objective: ObjectiveConfig | None = None
    measure_entropy: bool = True
    measure_kl_to_start: bool = True
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1.5e-4, schedule="constant", warmup_steps=5
    )
    health: HealthConfig = HealthConfig()
    memory: MemoryConfig = MemoryConfig()
    parallel: ParallelConfig = ParallelConfig()
    rollout_devices: RolloutDevicesConfig = RolloutDevicesConfig()
    row_len: int = 2048
    rows: int = 2
    tracker: TrackerConfig = TrackerConfig()
    samples: RolloutSamplesConfig = RolloutSamplesConfig()
    checkpoint_every: int = 20
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        require_at_least(self, steps=0, prompts=1, passes_per_step=1, row_len=1, rows=1)
        require_at_least(self, checkpoint_every=1, keep_checkpoints=1)
        require_at_least(self, grading_wait_s=0, refill_rounds=0)
        require_share(self, "max_reject_share", "max_ungraded_share")
        require_seed(self)
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size}: a group mean needs at least 2")
        if not 1 <= self.updates_per_step <= self.prompts:
            raise ValueError(
                f"updates_per_step={self.updates_per_step}: must lie in 1..prompts={self.prompts}"
            )
        if self.preset is not None and self.objective is not None:
            raise ValueError(f"preset={self.preset} excludes settings of objective: give one")
        if self.refill_rounds and not self.policy_objective.drop_zero_variance:
            raise ValueError(
                f"refill_rounds={self.refill_rounds}: only with objective.drop_zero_variance do "
                "groups leave a place to others"
            )
        if self.overlap and self.policy_objective.importance_cap is None:
            raise ValueError(
                "overlap=true: rollouts are one update old, which an objective without "
                "importance_cap takes for on-policy; set objective.importance_cap, e.g. to 2"
            )
        if self.optimizer_steps_per_step > 1 and self.policy_objective.ratio == "on_policy":
            field = "updates_per_step" if self.updates_per_step > 1 else "passes_per_step"
            raise ValueError(
                f"{field} > 1 is off-policy: set objective.ratio to ppo_clip or detached"
            )

    @property
    def optimizer_steps_per_step(self) -> int:
        """Optimizer steps that one step of the run takes: every update of every pass."""
        return self.passes_per_step * self.updates_per_step

    @property
    def most_rollouts(self) -> int:
        """Most rollouts of a step, those of further rounds included."""
        return self.prompts * self.group_size * (1 + self.refill_rounds)

    @property
    def keeps_parts(self) -> bool:
        """Whether a step's rollouts are kept as they finish, not only all together.

        Where the update reads the engine's log-probabilities, they must not depend on what was
        sampled together: half a step, and after a crash the other half, would differ in last bits.
        """
        return self.policy_objective.importance_cap is None or self.engine.deterministic

    @property
    def policy_objective(self) -> ObjectiveConfig:
        """The objective that is minimised: `objective`, or the preset's."""
        return self.objective or PRESETS[self.preset or "pgrpo"]
