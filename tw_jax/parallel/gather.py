"""Gathering arrays that are spread over several mesh axes, and the reverse; for use in shard_map.

One mesh axis after another: of a gather or scatter over several at once, the TPU compiler makes an
all-reduce of the whole, which sends twice as much. Sums are scattered over the innermost mesh axis
first. It is a whole axis of the machine more often, over which the compiler really scatters, and
what is left to send over the others is smaller then.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array


def gathered(part: Array, mesh_axes: Sequence[str], *, axis: int) -> Array:
    """The whole of an array whose `axis` is spread over mesh axes, the first of them outermost.

    Its transpose is `scattered_sum`.
    """
    if not mesh_axes:
        return part
    part = jnp.moveaxis(part, axis, 0)
    for name in mesh_axes:
        part = jax.lax.all_gather(part, name)
    whole = _leading_axes_reversed(part, len(mesh_axes))
    return jnp.moveaxis(whole.reshape(-1, *part.shape[len(mesh_axes) + 1 :]), 0, axis)


def scattered_sum(whole: Array, mesh_axes: Sequence[str], *, axis: int) -> Array:
    """Adds arrays up over mesh axes and leaves each device its part of `axis`."""
    if not mesh_axes:
        return whole
    whole = jnp.moveaxis(whole, axis, 0)
    sizes = [jax.lax.axis_size(name) for name in mesh_axes]
    part = _leading_axes_reversed(whole.reshape(*sizes, -1, *whole.shape[1:]), len(sizes))
    for name in reversed(mesh_axes):
        part = jax.lax.psum_scatter(part, name)
    return jnp.moveaxis(part, 0, axis)


def _leading_axes_reversed(x: Array, count: int) -> Array:
    return x.transpose(*reversed(range(count)), *range(count, x.ndim))
