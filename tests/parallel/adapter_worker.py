"""Run on eight virtual CPU devices: one update of an adapter per mesh against one device.

    python -m tests.parallel.adapter_worker      # one JSON object per line

A process of its own, since the number of devices is fixed when JAX starts.
"""

import dataclasses
import json
import os
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import optax

from tests.parallel.spread_worker import DENSE, MIXTURE, random_batch, relative
from tw_jax.models import Qwen3Config, graphdef, init_params
from tw_jax.models.lora import AdapterConfig, bind_adapter, merged
from tw_jax.models.param_shardings import adapter_shardings, base_shardings, param_shardings
from tw_jax.parallel import Layout, ParallelConfig, make_layout
from tw_jax.train.placement import place_run, placed_state
from tw_jax.train.update import MemoryConfig, make_update, nll_sum

UNTIED = dataclasses.replace(DENSE, tie_word_embeddings=False)
NF4 = AdapterConfig(rank=4, base="nf4", block_size=4)
ATTENTION = AdapterConfig(
    rank=4, targets=("attention",), embeddings="frozen", base="int8", block_size=2
)
CASES: dict[str, tuple[Qwen3Config, AdapterConfig, ParallelConfig]] = {
    "fsdp": (UNTIED, NF4, ParallelConfig("fsdp")),
    "fsdp_tensor": (UNTIED, NF4, ParallelConfig("fsdp_tensor")),
    "tensor": (UNTIED, AdapterConfig(rank=4, embeddings="all"), ParallelConfig("tensor")),
    "context": (DENSE, AdapterConfig(rank=4), ParallelConfig("context")),
    "expert": (MIXTURE, ATTENTION, ParallelConfig("expert", expert=4, tensor=2)),
}
CONTROL = (1, 5, 63)


def update_once(config: Qwen3Config, settings: AdapterConfig, layout: Layout | None) -> Any:
    """One update; the optimizer's state is the gradient itself."""
    adapter = bind_adapter(settings, config, CONTROL)
    params = init_params(config, 0, param_shardings(layout, config))
    init = jax.jit(adapter.init, static_argnums=1, out_shardings=adapter_shardings(layout, adapter))
    trained = jax.tree.map(lambda x: x + 0.05, init(params, 0))  # B alone would have a gradient
    frozen = adapter.freeze(params, base_shardings(layout, adapter))
    optimizer = optax.chain(optax.trace(0.0), optax.sgd(0.1))
    placement = place_run(layout, config, optimizer, adapter)
    sum_loss = nll_sum(graphdef(config), MemoryConfig(remat="full", head_chunk=256), layout)
    update = make_update(sum_loss, optimizer, placement.state, adapter.assemble)
    state = placed_state(trained, optimizer, placement)
    batch = placement.batch(random_batch(config.vocab_size, hidden=False))
    matrices = [leaf for leaf in jax.tree.leaves(frozen["layers"]) if leaf.ndim > 2]
    shares = [leaf.addressable_shards[0].data.size / leaf.size for leaf in matrices]
    after, metrics = update.whole(state, batch, frozen)
    whole = merged(adapter.assemble(after.params, frozen), param_shardings(layout, config))
    return {
        "gradient": jax.tree.map(np.asarray, after.opt_state[0].trace),
        "merged": jax.tree.map(np.asarray, whole),
        "loss": float(metrics["loss"] / metrics["weight"]),
        "shares": shares,
    }


def compare(name: str) -> dict[str, Any]:
    """One update on a mesh beside the same on one device."""
    config, settings, parallel = CASES[name]
    one, many = (update_once(config, settings, lay) for lay in (None, make_layout(parallel)))
    return {
        "case": name,
        "loss": [one["loss"], many["loss"]],
        "gradient_rel_diff": relative(one["gradient"], many["gradient"]),
        "merged_rel_diff": relative(one["merged"], many["merged"]),
        "largest_share": max(many["shares"]),
    }


if __name__ == "__main__":
    for case in CASES:
        print(json.dumps(compare(case)), flush=True)
