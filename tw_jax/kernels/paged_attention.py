"""`paged_attention`: attention of the rollout engine over pages, and its choice of backend."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from tw_jax.kernels.attention import platform_of
from tw_jax.kernels.page_pool import PagedShape, PagePool, paged_shape
from tw_jax.kernels.paged_attention_gpu import gpu_obstacle, paged_attention_gpu
from tw_jax.kernels.paged_attention_tpu import paged_attention_tpu, tpu_obstacle
from tw_jax.kernels.paged_attention_xla import paged_attention_xla

# Each backend: (q [rows, run, heads, dim], pool, layer, kv_lens, page_indices, q_lens) -> out.
_BACKENDS: dict[str, Callable[..., Array]] = {
    "xla": paged_attention_xla,
    "tpu": paged_attention_tpu,
    "gpu": paged_attention_gpu,
}
# Why a backend cannot run a call; None if it can.
_OBSTACLES: dict[str, Callable[[PagedShape], str | None]] = {
    "xla": lambda shape: None,
    "tpu": tpu_obstacle,
    "gpu": gpu_obstacle,
}
_BEST = {"cuda": "gpu", "tpu": "tpu"}


def best_paged_backend(shape: PagedShape, platform: str) -> tuple[str, str]:
    """The backend for a call, and why.

    Args:
      shape: of the call.
      platform: of the devices (`platform_of`).
    """
    if platform not in _BEST:
        return "xla", f"there is no kernel for the platform {platform}"
    name = _BEST[platform]
    obstacle = _OBSTACLES[name](shape)
    return ("xla", obstacle) if obstacle else (name, f"the {name} kernel supports this shape")


def paged_attention(
    q: Float[Array, "tokens heads dim"],
    pool: PagePool,
    layer: int | Int32[Array, ""],
    kv_lens: Int32[Array, "rows"],
    page_indices: Int32[Array, "rows pages_per_row"],
    q_lens: Int32[Array, "rows"] | None = None,
    *,
    backend: str | None = None,
) -> Float[Array, "tokens heads dim"]:
    """Softmax attention of each row's last tokens over its pages, scaled by `dim ** -0.5`.

    Decoding has one query per row (`tokens == rows`), prefill a run of `tokens // rows` slots per
    row, of which a row uses the first `q_lens[row]`. The query in slot s is the row's token
    `kv_lens[row] - q_lens[row] + s`, whose key and value have been written already, and sees the
    tokens up to and including itself. The softmax is float32 whatever the inputs are.

    Args:
      q: queries, normed and rotated but not scaled, row after row; query head h reads key head
        `h // (heads // kv_heads)`. Rounded to the dtype of the pool.
      pool: the pages.
      layer: which layer's pages.
      kv_lens: tokens of each row, the queries' own included; 0 for rows that rest. At most
        `pages_per_row * page_size`.
      page_indices: pages of each row in order. Rows may share pages. Entries behind a row's length
        must exist in the pool; what they hold is never looked at.
      q_lens: queries of each row, at most its `kv_lens`; None uses as many slots as that allows.
      backend: `xla`, `tpu` or `gpu`; None takes `best_paged_backend` for this process's default
        platform.

    Returns:
      One output per slot, in the dtype of `q`; zeros in slots without a query.

    Raises:
      ValueError: arguments that do not fit each other, or a backend that cannot run them.
    """
    shape = paged_shape(q, pool, page_indices)
    name = backend or best_paged_backend(shape, platform_of(jax.devices()[0]))[0]
    if name not in _BACKENDS:
        raise ValueError(f"no paged attention {name!r}: choose one of {', '.join(_BACKENDS)}")
    obstacle = _OBSTACLES[name](shape)
    if obstacle:
        raise ValueError(f"paged attention {name!r} cannot run this: {obstacle}")
    if q_lens is None:
        q_lens = jnp.minimum(kv_lens, shape.run)
    rows = q.reshape(shape.rows, shape.run, *q.shape[1:])
    return _BACKENDS[name](rows, pool, layer, kv_lens, page_indices, q_lens).reshape(q.shape)
