"""Worker of `python -m benchmarks rl`: the parts of `tw_jax.train.rl`'s step.

Their rewards are computed of token ids, as the peer's are, so grading is left out.

The folder is the one that `benchmarks.rl` prepared. A step ends when the next parameters are there
and the metrics that a run logs have been computed.
"""

import importlib.metadata
import json
import pathlib
import statistics
import sys
import time

import jax
import numpy as np

from benchmarks.blocks import answer, asked_blocks
from benchmarks.rl_task import as_text, reward
from tw_jax.models import Qwen3Config, graphdef
from tw_jax.models.import_weights import load_params
from tw_jax.rewards.facts import RolloutFacts
from tw_jax.rollout.engine import EngineConfig
from tw_jax.rollout.request import Request, SamplingParams, sampling_seed
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.train.advantages import group_advantages, kept_rollouts
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.optimizer import OptimizerConfig
from tw_jax.train.policy_learner import PolicyLearner
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.rl_metrics import step_metrics
from tw_jax.train.rl_sampling import StepSample
from tw_jax.train.rollout_devices import RolloutDevices
from tw_jax.train.run_dir import LoadedModel, ModelConfig
from tw_jax.train.step_times import StepTimes
from tw_jax.train.trainable import part
from tw_jax.trajectory.schemas import make_schema


def main(folder: pathlib.Path) -> None:
    """Makes steps in blocks as asked on standard input."""
    asked = json.loads((folder / "workload.json").read_text())
    prompts = np.array(asked["prompts"], np.int32)  # [steps, prompts, tokens]
    group_size = asked["group_size"]
    rollouts_per_step = prompts.shape[1] * group_size
    tokenizer = load_tokenizer()
    model_config = Qwen3Config.from_dict(asked["shape"], origin="the benchmark")
    sampling = SamplingParams(
        max_response_tokens=asked["new_tokens"],
        logit_bias=((asked["eos_id"], -np.inf), (asked["pad_id"], -np.inf)),
        max_threads=1,
        max_blocks=1,
    )
    context_len = prompts.shape[-1] + asked["new_tokens"]
    config = RLConfig(
        steps=1_000_000,  # of the schedule, which is constant
        prompts=prompts.shape[1],
        group_size=group_size,
        sampling=sampling,
        engine=EngineConfig(
            context_len=context_len,
            rows=rollouts_per_step + 1,  # one row is kept for threads
            requests=rollouts_per_step + 1,
            prefill_rows=rollouts_per_step,  # all prompts arrive at once
            prefill_chunk=32,
            max_threads=1,
            max_blocks=1,
            steps_per_dispatch=context_len,
        ),
        objective=ObjectiveConfig(
            normalizer="group_std",
            aggregation="sequence_mean",
            kl_coefficient=asked["kl_coefficient"],
        ),
        optimizer=OptimizerConfig(**asked["optimizer"]),
        # A group is a forest: its prompt once, and what was sampled.
        row_len=-(-(prompts.shape[-1] + group_size * asked["new_tokens"]) // 64) * 64,
        rows=prompts.shape[1],
    )
    schema = make_schema("threadweaver", tokenizer)
    params = load_params(str(folder / "weights"), model_config)
    model = LoadedModel(graphdef(model_config), params, model_config, tokenizer, schema, step=0)
    model, trainable, start = part(model, None, ModelConfig(), 0, None)
    learner = PolicyLearner(config, model, trainable, None)
    state = learner.initial_state(start)
    devices = RolloutDevices(
        model.graphdef, schema, config.engine, config.rollout_devices, jax.local_devices()
    )
    splits, sampled_tokens, apart, cpu_s = [], [], [], []
    step = 0
    for count in asked_blocks():
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(count):
            times = StepTimes()
            with times.of("weights"):
                devices.take(state.params)
            with times.of("rollout"):
                requests = [
                    Request(prompt, sampling_seed(0, step, p, k), sampling, mode="sequential")
                    for p, prompt in enumerate(prompts[step % len(prompts)])
                    for k in range(group_size)
                ]
                rollouts = devices.generate(requests)
                devices.release()
            with times.of("grade"):
                rewards = [reward(as_text(r.response.tolist())) for r in rollouts]
                rewards = np.reshape(rewards, (-1, group_size))
                facts = [
                    RolloutFacts(False, True, r.total_tokens, r.critical_path) for r in rollouts
                ]
                sample = StepSample(rollouts, [], facts, [], rewards, seconds=0.0)
                advantages = group_advantages(rewards, config.policy_objective.normalizer)
                kept = kept_rollouts(config.policy_objective, rewards, advantages)
            learned = learner.learn(state, step, sample, advantages, kept, times)
            state = learned.state
            with times.of("metrics"):
                metrics = step_metrics(rollouts, facts, rewards, learned.sums)
                jax.block_until_ready(state)
            splits.append(times.seconds)
            sampled_tokens.append(sum(len(r.response) for r in rollouts))
            apart.append(metrics["logprob_abs_diff_max"])
            step += 1
        seconds = time.perf_counter() - start
        cpu_s.append((time.process_time() - cpu_start) / count)
        answer(seconds=seconds)
    names = ("tw-jax", "jax", "flax", "optax")
    answer(
        sampled_tokens=sampled_tokens,
        cpu_s=cpu_s,
        logprob_abs_diff_max=max(apart),
        time_split_s={
            part: statistics.median(split[part] for split in splits) for part in splits[-1]
        },
        versions={name: importlib.metadata.version(name) for name in names},
    )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
