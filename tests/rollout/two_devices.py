"""Run on two virtual CPU devices: rollouts of a model whose weights are spread over them.

    python -m tests.rollout.two_devices    # one JSON object: tokens and log-probabilities

A process of its own, since the number of devices is fixed when JAX starts.
"""

import json
import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from tests.rollout.sessions import run, tokens
from tests.rollout.small_world import make_model, make_schema
from tests.rollout.test_schedules import BASE, SCHEDULES, mixed_requests
from tests.rollout.tiny_language import CONFIG
from tw_jax.models.param_shardings import param_shardings
from tw_jax.parallel import ParallelConfig, make_layout
from tw_jax.rollout.engine import EngineConfig, RolloutEngine


def main() -> None:
    graphdef, params = make_model()
    layout = make_layout(ParallelConfig(preset="tensor"))
    params = jax.device_put(params, param_shardings(layout, CONFIG))
    spread = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    config = EngineConfig(**{**vars(BASE), **SCHEDULES["small pages, few rows"]})
    engine = RolloutEngine(graphdef, make_schema(), config, layout)
    rollouts = run(engine, params, mixed_requests())
    out = {
        "spread": spread,
        "tokens": [tokens(rollout) for rollout in rollouts],
        "logprobs": [[unit.logprobs.tolist() for unit in r.units] for r in rollouts],
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
