"""Run on eight virtual CPU devices: one SFT update per sharding preset against one device.

    python -m tests.parallel.spread_worker [PRESET ...]     # one JSON object per line
    python -m tests.parallel.spread_worker --golden         # writes golden_collectives.json anew

A process of its own, since the number of devices is fixed when JAX starts.
"""

import json
import os
import pathlib
import sys
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import optax

from tests.forests import forest_row
from tw_jax.data.packed_batch import PackedBatch
from tw_jax.models import Qwen3Config, graphdef, init_params, preset
from tw_jax.models.config import MixtureOfExperts
from tw_jax.models.param_shardings import param_shardings
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


def update_once(config: Qwen3Config, layout: Layout | None, *, hidden: bool) -> dict[str, Any]:
    """One update; the optimizer's state is the gradient itself."""
    optimizer = optax.chain(optax.trace(0.0), optax.sgd(0.1))
    params = init_params(config, 0, param_shardings(layout, config))
    placement = place_run(layout, config, optimizer)
    sum_loss = nll_sum(graphdef(config), MemoryConfig(remat="full", head_chunk=256), layout)
    update = make_update(sum_loss, optimizer, placement.state)
    state = placed_state(params, optimizer, placement)
    shares = [x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(params)]
    batch = placement.batch(random_batch(config.vocab_size, hidden=hidden))
    compiled = update.whole.lower(state, batch).compile()
    after, metrics = compiled(state, batch)
    return {
        "gradient": jax.tree.map(np.asarray, after.opt_state[0].trace),
        "params": jax.tree.map(np.asarray, after.params),
        "loss": float(metrics["loss"] / metrics["weight"]),
        "grad_norm": float(metrics["grad_norm"]),
        "shares": shares,
        "program": compiled.as_text(),
    }


def compare(name: str) -> dict[str, Any]:
    """One update on the mesh of a preset beside the same on one device."""
    config, parallel = PRESETS[name]
    layout = make_layout(parallel)
    assert layout is not None
    hidden = "context" in name
    one, many = (update_once(config, place, hidden=hidden) for place in (None, layout))
    return {
        "preset": name,
        "mesh": layout.describe(),
        "loss": [one["loss"], many["loss"]],
        "grad_norm": [one["grad_norm"], many["grad_norm"]],
        "gradient_rel_diff": relative(one["gradient"], many["gradient"]),
        "params_rel_diff": relative(one["params"], many["params"]),
        "smallest_share": min(many["shares"]),
        "collectives": count_by_kind(many["program"], layout),
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


def relative(one, many) -> float:
    """Largest difference of any tensor, relative to that tensor's largest value."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


if __name__ == "__main__":
    names = [word for word in sys.argv[1:] if word != "--golden"] or list(PRESETS)
    golden = {}
    for preset_name in names:
        entry = compare(preset_name)
        golden[preset_name] = entry["collectives"]
        print(json.dumps(entry), flush=True)
    if "--golden" in sys.argv:
        path = pathlib.Path(__file__).parent / "golden_collectives.json"
        path.write_text(json.dumps(golden, indent=1) + "\n")
