"""Run on eight virtual CPU devices: one SFT update per sharding preset against one device.

    python -m tests.parallel.spread_worker        # one JSON object per line

A process of its own, since the number of devices is fixed when JAX starts.
"""

import dataclasses
import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import optax

from tests.forests import forest_row
from tw_jax.data.packed_batch import PackedBatch
from tw_jax.models import Qwen3Config, graphdef, init_params, preset
from tw_jax.models.config import MixtureOfExperts
from tw_jax.models.qwen3 import param_axes
from tw_jax.parallel import Layout, ParallelConfig, make_layout
from tw_jax.planning.collectives import collectives
from tw_jax.train.placement import place_run, placed_state
from tw_jax.train.update import MemoryConfig, make_update, nll_sum

ROWS, ROW_LEN = 8, 128
DENSE = preset(
    "tiny",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
    initializer_range=0.2,
)
MIXTURE = preset(
    "tiny-moe",
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.2,
    moe=MixtureOfExperts(
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
    ),
)
PRESETS: dict[str, tuple[Qwen3Config, ParallelConfig]] = {
    "fsdp": (DENSE, ParallelConfig("fsdp")),
    "data_fsdp": (DENSE, ParallelConfig("fsdp", fsdp=4)),
    "fsdp_tensor": (DENSE, ParallelConfig("fsdp_tensor")),
    "fsdp_tensor_sequence": (DENSE, ParallelConfig("fsdp_tensor", sequence_parallel=True)),
    "tensor": (DENSE, ParallelConfig("tensor")),
    "context": (DENSE, ParallelConfig("context")),
    "expert": (MIXTURE, ParallelConfig("expert")),
    "expert_tensor": (MIXTURE, ParallelConfig("expert", expert=2, tensor=2)),
    "fsdp_mixture": (MIXTURE, ParallelConfig("fsdp")),
    "fsdp_context_tensor": (DENSE, ParallelConfig("fsdp", context=2, tensor=2)),
}


def random_batch(vocab_size: int, *, hidden: bool) -> PackedBatch:
    """Rows of random trees with branches, several trees and padding."""
    rng = np.random.default_rng(0)
    rows = [
        forest_row([(int(c), int(n)) for c, n in rng.integers((0, 1), (30, 25), (9, 2))], ROW_LEN)
        for _ in range(ROWS)
    ]
    parent, visible_end, depth = (np.stack(arrays) for arrays in zip(*rows, strict=True))
    start = np.zeros((1 if hidden else 0, ROWS, ROW_LEN), np.int32)
    end = np.zeros_like(start)
    if hidden:  # hides some keys from the queries 5..20 behind them
        keys = rng.random((ROWS, ROW_LEN)) < 0.3
        own = np.arange(ROW_LEN)
        start[0] = np.where(keys, own + 5, 0)
        end[0] = np.where(keys, own + 20, 0)
    return PackedBatch(
        tokens=rng.integers(0, vocab_size, parent.shape, dtype=np.int32),
        positions=depth,
        parent=parent,
        visible_end=visible_end,
        hidden_start=start,
        hidden_end=end,
        loss_weight=rng.random(parent.shape, dtype=np.float32),
    )


def compare(name: str) -> dict:
    """Loss and gradients on the mesh of a preset beside those of one device."""
    config, parallel = PRESETS[name]
    optimizer = optax.sgd(1.0)  # the step is the gradient
    batch = random_batch(config.vocab_size, hidden="context" in name)
    memory = dataclasses.replace(MemoryConfig(), head_chunk=256)
    found = {}
    for layout in (None, make_layout(parallel)):
        params = init_params(config, 0)
        placement = place_run(layout, params, param_axes(config), optimizer)
        update = make_update(nll_sum(graphdef(config), memory, layout), optimizer, placement.state)
        state = placed_state(placement.copy_params(params), optimizer, placement)
        placed = placement.batch(batch)
        gradients, sums = update.first(state.params, placed)
        if layout is not None:
            text = update.whole.lower(state, placed).compile().as_text()
            found["collectives"] = count_by_kind(text, layout)
            found["mesh"] = layout.describe()
            shards = [
                leaf.addressable_shards[0].data.size / leaf.size
                for leaf in jax.tree.leaves(state.params)
            ]
            found["smallest_share"], found["largest_share"] = min(shards), max(shards)
        after, metrics = update(state, [placed])
        found[layout is not None] = (
            jax.tree.map(np.asarray, gradients),
            float(sums["loss"] / sums["weight"]),
            jax.tree.map(np.asarray, after.params),
            float(metrics["grad_norm"]),
        )
    one, many = found.pop(False), found.pop(True)
    return {
        "preset": name,
        **found,
        "loss": [one[1], many[1]],
        "gradient_rel_diff": _relative(one[0], many[0]),
        "params_rel_diff": _relative(one[2], many[2]),
        "grad_norm": [one[3], many[3]],
    }


# Trips of the loops whose length is data; a collective inside one would be counted that often.
_DATA_LOOPS = {"tree_attention_forward": 1.0, "tree_attention_backward": 1.0}


def count_by_kind(hlo_text: str, layout: Layout) -> dict[str, float]:
    """How often each collective runs over which mesh axes, such as `all-gather fsdp`."""
    counts: dict[str, float] = {}
    for found in collectives(hlo_text, layout.mesh.shape, _DATA_LOOPS):
        key = f"{found.kind} {'+'.join(found.axes)}"
        counts[key] = counts.get(key, 0.0) + found.count
    return dict(sorted(counts.items()))


def _relative(one, many) -> float:
    """Largest difference of any tensor, relative to that tensor's largest value."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


if __name__ == "__main__":
    for preset_name in sys.argv[1:] or PRESETS:
        print(json.dumps(compare(preset_name)), flush=True)
