"""On a GPU: time per live tile of tree attention over that of cuDNN's causal flash attention.

A row of packed trees has few live tiles, a causal row has half of all. If a tile costs the same in
both, skipping tiles is worth what it promises. Qwen3-8B's heads, bfloat16, one row of 8k to 40k
tokens; medians of interleaved runs. A backward pass is forward and backward minus forward.
"""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.kernels import TilePlan, plan_tiles, tree_attention

HEADS, KV_HEADS, DIM = 32, 8, 128
ROW_LENS = (8192, 16384, 40960)
TREES, THREADS, REPEATS = 8, 3, 15


def causal_row(row_len: int) -> np.ndarray:
    """Every token is visible to all that follow."""
    return np.full((1, row_len), row_len, np.int32)


def packed_row(row_len: int) -> np.ndarray:
    """Trees one after another, each a trunk that forks into threads of the same length."""
    tree_len = row_len // TREES
    part = tree_len // (THREADS + 1)
    trunk = np.full(tree_len - THREADS * part, tree_len)
    threads = np.repeat(tree_len - part * np.arange(THREADS)[::-1], part)
    tree = np.concatenate([trunk, threads])
    return np.concatenate([tree + i * tree_len for i in range(TREES)])[None].astype(np.int32)


def tree(q, k, v, end, plan: TilePlan):
    """Ours."""
    return tree_attention(q, k, v, end, plan=plan, backend="gpu")


def flash(q, k, v):
    """The yardstick: causal, whatever the row holds."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def with_gradients(attention: Callable[..., jax.Array], q, k, v, cotangent, *rest):
    """Output and gradients of q, k and v."""
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, *rest), q, k, v)
    return out, pull(cotangent)


def medians(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds per call; the functions take turns, so that a slow spell hits all of them."""
    for function in functions.values():
        jax.block_until_ready(function())
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(REPEATS):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(row_len: int) -> dict[str, float]:
    """Ratios of the time per tile for one row length."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (
        jax.random.normal(key, (1, row_len, heads, DIM), jnp.bfloat16)
        for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS, HEADS), strict=True)
    )
    rows = {"causal": jnp.array(causal_row(row_len)), "packed": jnp.array(packed_row(row_len))}
    plans = {name: jax.jit(plan_tiles)(end) for name, end in rows.items()}

    flash_grad = jax.jit(functools.partial(with_gradients, flash))
    tree_grad = jax.jit(functools.partial(with_gradients, tree))
    flash_out, tree_out = jax.jit(flash), jax.jit(tree)
    functions: dict[str, Callable[[], object]] = {
        "flash_fwd": lambda: flash_out(q, k, v),
        "flash_all": lambda: flash_grad(q, k, v, cotangent),
    }
    for name, end in rows.items():
        rest = (end, plans[name])
        functions[f"{name}_fwd"] = functools.partial(tree_out, q, k, v, *rest)
        functions[f"{name}_all"] = functools.partial(tree_grad, q, k, v, cotangent, *rest)
    # The same row in both: a kernel that is fast because it is wrong shall not be timed.
    expected, actual = (
        x.astype(jnp.float32) for x in (flash_out(q, k, v), functions["causal_fwd"]())
    )
    difference = float(jnp.abs(expected - actual).max())
    if not difference < 0.05:
        raise SystemExit(f"outputs differ by {difference}: nothing was timed")

    seconds = medians(functions)
    tiles = {name: int(plan.count) for name, plan in plans.items()}
    result: dict[str, float] = {f"flash_fwd_s_{row_len}": seconds["flash_fwd"]}
    for name, count in tiles.items():
        share = count / tiles["causal"]
        forward = seconds[f"{name}_fwd"] / seconds["flash_fwd"]
        backward = (seconds[f"{name}_all"] - seconds[f"{name}_fwd"]) / (
            seconds["flash_all"] - seconds["flash_fwd"]
        )
        result[f"live_tiles_{name}_{row_len}"] = count
        result[f"tile_time_fwd_{name}_{row_len}"] = forward / share
        result[f"tile_time_bwd_{name}_{row_len}"] = backward / share
    return result


def run() -> dict[str, float | str]:
    """Ratios for each row, and the worst of them as `gpu_tile_time_fwd` and `..._bwd`."""
    if jax.default_backend() != "gpu":
        raise SystemExit(
            "attention-gpu measures a CUDA device, and JAX sees none: on a machine with one, "
            "install tw_jax[cuda] or tw_jax[cuda13]"
        )
    result: dict[str, float] = {}
    for row_len in ROW_LENS:
        result |= measure(row_len)
    worst = {
        f"gpu_tile_time_{way}": max(
            value for name, value in result.items() if name.startswith(f"tile_time_{way}_")
        )
        for way in ("fwd", "bwd")
    }
    return {"device": jax.devices()[0].device_kind, **worst, **result}
