"""Run on eight virtual CPU devices: an RL update's gradient and sums on meshes and on one device.

    python -m tests.train.policy_devices_worker     # one JSON object per line

A process of its own, since the number of devices is fixed when JAX starts.
"""

import dataclasses
import json
import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import optax

from tests.parallel.spread_worker import PRESETS, random_batch
from tw_jax.data.packed_batch import PackedBatch
from tw_jax.models import graphdef, init_params
from tw_jax.models.param_shardings import param_shardings
from tw_jax.parallel import Layout, make_layout
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.placement import place_run, placed_state
from tw_jax.train.policy_sum import policy_sum
from tw_jax.train.update import MemoryConfig, make_update

ROLLOUTS = 5
MESHES = ("fsdp", "fsdp_tensor", "context")  # the vocabulary is split on the second
OBJECTIVE = ObjectiveConfig(
    ratio="ppo_clip",
    ratio_level="sequence",
    clip_low=0.01,
    clip_high=0.01,
    dual_clip=1.05,
    kl_coefficient=0.3,
    entropy_coefficient=0.2,
    importance_cap=1.05,
)


def policy_batch(vocab_size: int) -> PackedBatch:
    """Rollouts whose tokens lie all over the rows."""
    rng = np.random.default_rng(1)
    batch = random_batch(vocab_size, hidden=False)
    shape = batch.tokens.shape
    ids = rng.integers(-1, ROLLOUTS, shape, dtype=np.int32)
    ids[batch.parent == np.arange(shape[1])] = -1
    sampled = ids >= 0
    # Ratios far above and below 1 under advantages of either sign: every clip has its rollout.
    advantage = np.array([1.0, -1.5, 0.5, -1.0, 0.8, 0.0], np.float32)[ids]
    shift = np.array([-3.0, -3.0, 3.0, 3.0, 0.0, 0.0], np.float32)[ids]

    def near_uniform() -> np.ndarray:
        return (rng.normal(-np.log(vocab_size), 0.3, shape) * sampled).astype(np.float32)

    return dataclasses.replace(
        batch,
        loss_weight=sampled.astype(np.float32),
        kl_weight=rng.random(shape, dtype=np.float32),
        denominator=sampled * rng.random(shape, dtype=np.float32),
        advantage=advantage,
        old_logprob=near_uniform() + shift,
        sampler_logprob=near_uniform(),
        reference_logprob=near_uniform(),
        start_logprob=near_uniform(),
        rollout_id=ids,
        region=np.where(sampled, rng.integers(0, 4, shape), -1).astype(np.int32),
    )


def update_once(name: str, layout: Layout | None):
    """Gradient and sums of one update."""
    config, _ = PRESETS[name]
    optimizer = optax.chain(optax.trace(0.0), optax.sgd(0.1))
    placement = place_run(layout, config, optimizer)
    loss = policy_sum(
        graphdef(config), OBJECTIVE, MemoryConfig(head_chunk=64), layout, rollouts=ROLLOUTS
    )
    update = make_update(loss, optimizer, placement.state)
    state = placed_state(
        init_params(config, 0, param_shardings(layout, config)), optimizer, placement
    )
    after, sums = update(state, [placement.batch(policy_batch(config.vocab_size))])
    gradient = jax.tree.map(np.asarray, after.opt_state[0].trace)
    return gradient, {key: float(value) for key, value in sums.items()}


def compare(name: str):
    """One update on a mesh beside the same on one device."""
    layout = make_layout(PRESETS[name][1])
    assert layout is not None
    (one, one_sums), (many, many_sums) = (update_once(name, place) for place in (None, layout))
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True))
    largest = max(float(np.abs(a).max()) for a, _ in pairs)
    apart = max(float(np.abs(a - b).max()) for a, b in pairs)
    return {
        "mesh": name,
        "gradient_rel_diff": apart / largest,
        "sums": {key: [value, many_sums[key]] for key, value in one_sums.items()},
    }


if __name__ == "__main__":
    for mesh in MESHES:
        print(json.dumps(compare(mesh)), flush=True)
