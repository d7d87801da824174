"""A decoding step's attention: one pool of pages in XLA beside the columns that the engine uses.

All layers of a step, writes included, without the rest of the model. Rows lie in pages in random
order; their lengths are spread evenly over a quarter to all of the context, or all end in its
first quarter. Both variants run in one process, in turn; `cpu_ms` is the time of all cores, which
says more than `ms` on a machine that does other work.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.kernels import column_attention, column_cache, page_pool
from tw_jax.kernels.paged_attention import paged_attention

LAYERS, HEADS, KV_HEADS, DIM, PAGE_SIZE = 3, 4, 2, 32, 16
SHAPES = {"quickstart": (128, 256), "long": (16, 4096)}  # rows, context
STEPS, REPEATS = 8, 9


def column_steps(cache, q, kv_lens):
    """`STEPS` steps over columns, as `tw_jax.rollout.lanes` calls them."""
    page_size = cache.keys[0][0].shape[3]
    own = jnp.arange(len(q))[:, None]
    table = jnp.broadcast_to(own, (len(q), len(cache.keys[0])))

    def step(_, state):
        cache, q, kv_lens = state
        plan = column_attention.plan_reads(table, kv_lens + 1, page_size)
        for layer in range(LAYERS):
            k, v = q[:, :KV_HEADS], q[:, KV_HEADS:]
            valid = kv_lens >= 0
            cache = column_cache.write_tokens(
                cache, layer, table, kv_lens, valid, k, v, few_columns=True
            )
            q = column_attention.attend_rows(q, cache, layer, table, kv_lens, plan)
        return cache, q, kv_lens + 1

    return jax.lax.fori_loop(0, STEPS, step, (cache, q, kv_lens))


def paged_steps(pool, q, kv_lens, page_indices):
    """`STEPS` steps over pages."""

    def step(_, state):
        pool, q, kv_lens = state
        place = (kv_lens // PAGE_SIZE)[:, None]
        page = jnp.take_along_axis(page_indices, place, axis=1)[:, 0]
        for layer in range(LAYERS):
            k, v = q[:, :KV_HEADS], q[:, KV_HEADS:]
            offset, valid = kv_lens % PAGE_SIZE, kv_lens >= 0
            pool = page_pool.write_tokens(pool, layer, page, offset, valid, k, v)
            q = paged_attention(q, pool, layer, kv_lens + 1, page_indices)
        return pool, q, kv_lens + 1

    return jax.lax.fori_loop(0, STEPS, step, (pool, q, kv_lens))


def time_in_turn(variants: dict[str, tuple[Callable, Any, tuple]]) -> dict[str, float]:
    """Median milliseconds per step; each variant's memory is donated from call to call."""
    memory = {name: state for name, (_, state, _) in variants.items()}
    wall, cpu = ({name: [] for name in variants} for _ in range(2))
    for repeat in range(REPEATS + 1):
        for name, (run_steps, _, arguments) in variants.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            memory[name], *_ = jax.block_until_ready(run_steps(memory[name], *arguments))
            if repeat:  # the first call compiles
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)
    per_step = 1000 / STEPS
    found = {f"{name}_ms": statistics.median(times) * per_step for name, times in wall.items()}
    for name, times in cpu.items():
        found[f"{name}_cpu_ms"] = statistics.median(times) * per_step
    return found


def run() -> dict[str, Any]:
    """Milliseconds per step of each shape, with rows of all lengths and with short rows."""
    found: dict[str, Any] = {"layers": LAYERS, "page_size": PAGE_SIZE}
    columns, paged = (jax.jit(f, donate_argnums=0) for f in (column_steps, paged_steps))
    for name, (rows, context) in SHAPES.items():
        rng = np.random.default_rng(0)
        per_row = context // PAGE_SIZE
        table = jnp.array(rng.permutation(rows * per_row).reshape(rows, per_row), jnp.int32)
        q = jnp.array(rng.standard_normal((rows, HEADS, DIM)), jnp.float32)
        cut = context // 4
        lengths = {
            "spread": np.linspace(cut, context - STEPS - 1, rows),
            "short": np.linspace(0, cut - STEPS - 1, rows),
        }
        for kind, kv_lens in lengths.items():
            kv_lens = jnp.array(kv_lens, jnp.int32)
            layout = column_cache.cache_layout(LAYERS, rows, context, context // 4)
            cache = column_cache.empty_cache(layout, KV_HEADS, DIM, jnp.float32)
            pool = page_pool.empty_pool(
                LAYERS, rows * per_row, PAGE_SIZE, KV_HEADS, DIM, jnp.float32
            )
            variants = {
                "columns": (columns, cache, (q, kv_lens)),
                "paged": (paged, pool, (q, kv_lens, table)),
            }
            found[f"{name}_{kind}"] = time_in_turn(variants)
    return found
