"""Run on eight virtual CPU devices: tree attention spread over a mesh against the dense oracle.

    python -m tests.parallel.attention_worker BACKEND    # one JSON object

Rows, queries of a row, and heads are each split over two devices; `tpu` runs in the interpreter.
"""

import json
import os
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from tests.kernels.dense_oracle import dense_attention
from tests.kernels.test_tree_attention import out_and_grads
from tw_jax.parallel import ParallelConfig, make_layout
from tw_jax.parallel.attention import plan_tiles_on, tree_attention_on

ROWS, ROW_LEN, HEADS, KV_HEADS, DIM = 2, 256, 4, 2, 32


def compare(backend: str) -> float:
    """Largest difference of output or a gradient, relative to its largest entry."""
    layout = make_layout(ParallelConfig(fsdp=2, context=2, tensor=2))
    assert layout is not None
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = [
        jax.random.normal(key, (ROWS, ROW_LEN, count, DIM))
        for key, count in zip(keys, heads, strict=True)
    ]
    end = np.full((ROWS, ROW_LEN), ROW_LEN, np.int32)
    end[1, :100], end[1, 100:150] = 100, 150

    def spread(q, k, v, end, hidden):
        group = HEADS // KV_HEADS
        plan = plan_tiles_on(layout, end, hidden, backend=backend, group=group)
        return tree_attention_on(layout, q, k, v, end, hidden, plan)

    exact = out_and_grads(dense_attention)(*inputs, end, None)
    # The plain interpreter: the TPU one waits for ever for devices that share two cores.
    with pltpu.force_tpu_interpret_mode(True):
        found = out_and_grads(spread)(*inputs, end, None)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    return max(float(np.abs(np.asarray(a - b)).max() / np.abs(b).max()) for a, b in pairs)


if __name__ == "__main__":
    print(json.dumps({"relative_difference": compare(sys.argv[1])}))
