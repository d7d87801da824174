"""`tree_attention`: the only attention of training and scoring, and its choice of backend."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int32

from tw_jax.kernels.attention_gpu import tree_attention_gpu
from tw_jax.kernels.attention_tpu import tree_attention_tpu
from tw_jax.kernels.attention_xla import tree_attention_xla
from tw_jax.kernels.tile_plan import Hidden, TilePlan, plan_tiles

# Each backend: (q, k, v, visible_end, hidden, plan) -> out, differentiable in q, k, v.
_BACKENDS: dict[str, Callable[..., Array]] = {
    "xla": tree_attention_xla,
    "tpu": tree_attention_tpu,
    "gpu": tree_attention_gpu,
}
_BEST = {"tpu": "tpu", "cuda": "gpu"}


def platform_of(device: Any) -> str:
    """`cpu`, `tpu`, `cuda` or `rocm`, for a device or one of a topology that is only described."""
    # A GPU's own `platform` does not tell the last two apart.
    return device.client.platform if device.platform == "gpu" else device.platform


def best_backend(device: Any) -> str:
    """The backend for a device."""
    return _BEST.get(platform_of(device), "xla")


def tree_attention(
    q: Float[Array, "rows q_len heads dim"],
    k: Float[Array, "rows len kv_heads dim"],
    v: Float[Array, "rows len kv_heads dim"],
    visible_end: Int32[Array, "rows len"],
    hidden: Hidden | None = None,
    *,
    plan: TilePlan | None = None,
    backend: str | None = None,
) -> Float[Array, "rows q_len heads dim"]:
    """Softmax attention over rows of packed trees, scaled by `dim ** -0.5`.

    Key j is visible to the queries `j <= i < visible_end[j]`, except
    `hidden_start[d, j] <= i < hidden_end[d, j]` for any d. A causal row is
    `visible_end[j] = len`. Work and memory are proportional to the tiles that hold a visible pair;
    no array of size len x len exists. The softmax is float32 for inputs of 32 bits or fewer; for
    float64 inputs it is float64 with `xla`.

    Args:
      q: queries, already normed and rotated; as many as keys, or the part of them that `plan` was
        made for (`plan_tiles(q_start=..., q_len=...)`).
      k: keys; query head h reads key head `h // (heads // kv_heads)`.
      v: values.
      visible_end: exclusive end of each key's visibility; every token must see itself, padding
        too (`visible_end[j] > j`).
      hidden: `(hidden_start, hidden_end)`, or None where nothing is hidden (depth 0 is the same).
      plan: `plan_tiles(visible_end, hidden, backend=..., group=...)`, built once per batch; built
        here if absent.
      backend: `xla`, which runs everywhere, `tpu` or `gpu`; None is the one that the plan was made
        for, or without a plan the best one for this process's default device.

    Returns:
      The attention output, in the dtype of `q`.

    Raises:
      ValueError: unknown backend, heads that do not group, or a plan made for other rows, or for
        `tpu` one that was made for another backend.
    """
    name = backend or (best_backend(jax.devices()[0]) if plan is None else plan.backend)
    if name not in _BACKENDS:
        raise ValueError(f"no attention backend {name!r}: choose one of {', '.join(_BACKENDS)}")
    rows, q_len, heads, _ = q.shape
    row_len = k.shape[1]
    if heads % k.shape[2]:
        raise ValueError(f"{heads} query heads do not group over {k.shape[2]} key heads")
    if hidden is not None and hidden[0].shape[0] == 0:
        hidden = None
    if plan is None:
        plan = plan_tiles(visible_end, hidden, backend=name, group=heads // k.shape[2])
    if name == "tpu" and plan.by_key is None:
        raise ValueError(
            f"the plan is for the backend {plan.backend!r}, and 'tpu' needs one of its own: "
            "plan_tiles(..., backend='tpu')"
        )
    widest = max(plan.q_tile, plan.k_tile)
    padded_len = -(-row_len // widest) * widest
    padded_q_len = padded_len if q_len == row_len else q_len
    if (rows, padded_len, padded_q_len) != (plan.rows, plan.padded_len, plan.q_len):
        raise ValueError(
            f"the plan is for {plan.rows} rows of {plan.padded_len} tokens with {plan.q_len} "
            f"queries (whole tiles), not for {rows} rows of {padded_len} with {padded_q_len}: "
            "build it from this visible_end (per shard)"
        )
    return _BACKENDS[name](q, k, v, visible_end, hidden, plan)
