"""Rollouts of a model whose parameters are spread over processes, sampled in each by itself.

    TW_JAX="python -m tests.train.rollout_processes_worker" launch/local_multiprocess.sh 2 3 FOLDER

Of every process's three devices the last one samples. Every process writes what it saw to
`FOLDER/PROCESS.json`.
"""

import json
import os
import pathlib
import sys

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from tests.rollout.scenarios import small_requests
from tests.rollout.sessions import tokens
from tests.rollout.small_world import make_model, make_schema
from tests.rollout.tiny_language import CONFIG
from tests.train.rollout_devices_worker import SMALL_ENGINE
from tw_jax.models.param_shardings import param_shardings
from tw_jax.parallel import ParallelConfig, make_layout
from tw_jax.parallel.processes import join_processes
from tw_jax.train.rollout_devices import RolloutDevices, RolloutDevicesConfig, split_devices


def main(folder: pathlib.Path) -> None:
    """Each process samples requests of its own, a different number of them."""
    join_processes(os.environ)
    process = jax.process_index()
    config = RolloutDevicesConfig(dedicated=1)
    train, own = split_devices(config, jax.devices(), process)
    graphdef, params = make_model()
    host = jax.device_get(params)
    places = param_shardings(make_layout(ParallelConfig("fsdp"), train), CONFIG)
    spread = jax.tree.map(
        lambda x, place: jax.make_array_from_callback(x.shape, place, lambda i, x=x: x[i]),
        host,
        places,
    )
    sampler = RolloutDevices(graphdef, make_schema(), SMALL_ENGINE, config, own)
    sampler.take(spread)
    requests = small_requests(4 + 3 * process)
    found = [tokens(rollout) for rollout in sampler.generate(requests)]
    alone = sampler.engines[0].generate(jax.device_put(params, own[0]), requests)
    result = {
        "tokens": found,
        "alone": [tokens(rollout) for rollout in alone],
        "training_devices": len(train),
        "whole": all(leaf.is_fully_addressable for leaf in jax.tree.leaves(spread)),
    }
    (folder / f"{process}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
