"""What an RL step samples, and what it is worth: rollouts, grades, rewards."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tw_jax.data.text import encode_prompt
from tw_jax.rewards.grading import Graded, grade
from tw_jax.rewards.reward import RolloutFacts, reward_terms
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.request import Request, sampling_seed
from tw_jax.rollout.rollout import Rollout
from tw_jax.tasks.task import Task
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.run_dir import LoadedModel


def sample_step(
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


def step_rewards(
    config: RLConfig, rollouts: Sequence[Rollout], graded: Sequence[Graded], step: int
) -> tuple[list[RolloutFacts], np.ndarray]:
    """What rewards depend on, per rollout, and the rewards `[prompts, group_size]`."""
    facts = [
        RolloutFacts(g.correct, g.format_valid, r.total_tokens, r.critical_path)
        for r, g in zip(rollouts, graded, strict=True)
    ]
    rewards = [sum(reward_terms(config.reward, f, step).values()) for f in facts]
    return facts, np.reshape(rewards, (config.prompts, config.group_size))
