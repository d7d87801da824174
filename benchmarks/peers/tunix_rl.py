"""Worker of `python -m benchmarks rl`: tunix's GRPOLearner with its own sampler.

Runs in the environment `benchmarks/peers/tunix`, from the repository, with the folder that
`benchmarks.rl` prepared. Actor and sampler share their weights. The cache is exactly as long as the
texts, and the prompts have a power of two as their length: both are the best case for it.
"""

import importlib.metadata
import json
import pathlib
import sys
import time

import jax
import numpy as np
from flax import nnx
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks.blocks import answer, asked_blocks
from benchmarks.peers.tunix_model import load_model
from benchmarks.peers.tunix_optimizer import make_optimizer
from benchmarks.peers.tunix_rollout import NumberTokenizer
from benchmarks.rl_task import reward

NO_TOKEN = 1_000_000  # an end of text that is never sampled


def main(folder: pathlib.Path) -> None:
    """Trains in blocks of steps as asked on standard input."""
    asked = json.loads((folder / "workload.json").read_text())
    shape, settings = asked["shape"], asked["optimizer"]
    prompts = np.array(asked["prompts"])  # [steps, prompts, tokens]
    tokenizer = NumberTokenizer(asked["bos_id"], asked["eos_id"], asked["pad_id"])
    actor = load_model(folder / "weights", shape)
    optimizer = make_optimizer(settings)
    # Its models' shardings name both axes.
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    cluster = RLCluster(
        actor=actor,
        reference=load_model(folder / "weights", shape),
        tokenizer=tokenizer,
        cluster_config=ClusterConfig(
            role_to_mesh={role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)},
            training_config=RLTrainingConfig(
                actor_optimizer=optimizer, eval_every_n_steps=10**9, max_steps=10**9
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=asked["new_tokens"],
                max_prompt_length=prompts.shape[-1],
                kv_cache_size=prompts.shape[-1] + asked["new_tokens"],
                temperature=1.0,
                top_p=1.0,  # without it, its sampler is greedy; at 1, nothing is sorted
                eos_tokens=[NO_TOKEN],
            ),
        ),
    )
    sampled, cpu_s = [], []

    def rewards(prompts, completions, **_):
        sampled.append(sum(len(text.split()) for text in completions))
        return [reward(text) for text in completions]

    learner = GRPOLearner(
        rl_cluster=cluster,
        algo_config=GRPOConfig(
            num_generations=asked["group_size"],
            num_iterations=1,
            beta=asked["kl_coefficient"],
            kl_loss_mode="low_var_kl",
        ),
        reward_fns=rewards,
    )

    def batches():
        # The learner asks for a batch when a step begins: a block ends when the next one would.
        step = 0
        for count in asked_blocks():
            start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(count):
                texts = [tokenizer.decode(row[1:]) for row in prompts[step % len(prompts)]]
                step += 1
                yield {"prompts": np.array(texts)}
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
            seconds = time.perf_counter() - start
            cpu_s.append((time.process_time() - cpu_start) / count)
            answer(seconds=seconds)

    learner.train(batches())
    names = ("google-tunix", "jax", "flax", "optax")
    answer(
        sampled_tokens=sampled,
        cpu_s=cpu_s,
        versions={name: importlib.metadata.version(name) for name in names},
    )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
