"""Compiles the TPU path of paged attention for a topology: `python -m ... v5e:2x2`.

Prints, as JSON on the last line, how often each case's program calls the kernel and copies pages.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from benchmarks.compiled_copies import compiled_copies
from tw_jax.kernels.page_pool import empty_pool
from tw_jax.kernels.paged_attention import paged_attention

# Qwen3's heads, and what each case changes about it: corners of what `tpu_obstacle` lets through.
FIELDS = dict(rows=64, run=1, heads=32, kv_heads=8, head_dim=128, page_size=16, pages_per_row=256)
CASES = (
    {},
    {"run": 32, "rows": 4},
    {"dtype": "float32"},
    {"kv_heads": 1, "heads": 4},
    {"kv_heads": 16, "heads": 16, "page_size": 64},
    {"page_size": 256, "pages_per_row": 160, "rows": 256},
    {"page_size": 1, "rows": 8},
    {"rows": 56, "pages_per_row": 4096},
)


def compile_case(topology, rows, run, heads, kv_heads, head_dim, page_size, pages_per_row, dtype):
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    pool = jax.eval_shape(lambda: empty_pool(2, 1000, page_size, kv_heads, head_dim, dtype))
    pool = jax.tree.map(lambda x: array(x.shape, x.dtype), pool)
    lens = array((rows,), jnp.int32)

    def attend(q, pool, kv_lens, page_indices, q_lens):
        return paged_attention(q, pool, 1, kv_lens, page_indices, q_lens, backend="tpu")

    q = array((rows * run, heads, head_dim), dtype)
    table = array((rows, pages_per_row), jnp.int32)
    # The kernel asks the mesh of the context which chip it is compiled for.
    with jax.set_mesh(mesh):
        text = jax.jit(attend).lower(q, pool, lens, table, lens).compile().as_text()
    copies = compiled_copies(text).count(pool.pages.shape)
    return text.count('custom_call_target="tpu_custom_call"'), copies


if __name__ == "__main__":
    named = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
    calls = []
    for case in CASES:
        print(case, flush=True)
        calls.append(compile_case(named, **{**FIELDS, "dtype": "bfloat16", **case}))
    print(json.dumps(calls))
