"""Grouped matrix product: each group of consecutive rows is multiplied by its own matrix.

On TPU this is `jax.lax.ragged_dot`, for which the compiler has a kernel. Elsewhere that operation
is lowered to a masked copy of the rows for every group, `[groups, rows, inner]`, and to as much
arithmetic; so there a loop runs over tiles of rows instead. A tile never spans two groups. The
gradient of the matrices runs that loop on TPU too, whose compiler lowers it to all groups times all
rows. The loop's trip count depends on the group sizes, so automatic differentiation cannot reverse
it: hence `jax.custom_vjp`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

_SMALLEST_TILE, _LARGEST_TILE = 8, 512  # rows
SCOPE = "grouped_matmul"  # by which planners find loops whose length is data


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "rows inner"],
    kernels: Float[Array, "groups inner out"],
    group_sizes: Int32[Array, " groups"],
) -> Float32[Array, "rows out"]:
    """`x[i] @ kernels[g]` for the rows i of group g; zero for rows behind the last group.

    Args:
      x: rows, group after group.
      kernels: one matrix per group; rounded to the dtype of `x`.
      group_sizes: rows in each group; their sum may be less than the number of rows.

    Returns:
      The products, accumulated and returned in float32.
    """
    kernels = kernels.astype(x.dtype)
    with jax.named_scope(SCOPE):
        out = jax.lax.platform_dependent(x, kernels, group_sizes, tpu=_ragged, default=_tiled)
    return _within(out, group_sizes)


def _within(rows: Array, group_sizes: Int32[Array, " groups"]) -> Array:
    """The rows of all groups; zero in place of the rest."""
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    return jnp.where((index < group_sizes.sum())[:, None], rows, 0)


def _forward_rule(x, kernels, group_sizes):
    return grouped_matmul(x, kernels, group_sizes), (x, kernels, group_sizes)


def _backward_rule(saved, d_out):
    x, kernels, group_sizes = saved
    d_out = _within(d_out, group_sizes).astype(x.dtype)
    with jax.named_scope(SCOPE):
        d_x = jax.lax.platform_dependent(
            d_out,
            kernels.astype(x.dtype),
            group_sizes,
            tpu=_ragged_transposed,
            default=_tiled_transposed,
        )
        d_kernels = _tiled_outer(x, d_out, group_sizes).astype(kernels.dtype)
    return _within(d_x, group_sizes).astype(x.dtype), d_kernels, None


grouped_matmul.defvjp(_forward_rule, _backward_rule)


# --- TPU -----------------------------------------------------------------------------------------


def _ragged(x, kernels, group_sizes):
    return jax.lax.ragged_dot(x, kernels, group_sizes, preferred_element_type=jnp.float32)


def _ragged_transposed(d_out, kernels, group_sizes):
    return _ragged(d_out, kernels.swapaxes(1, 2), group_sizes)


# --- elsewhere -----------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """Tiles of rows, group after group; only the first `count` exist."""

    count: Int32[Array, ""]
    group: Int32[Array, " tiles"]
    first: Int32[Array, " tiles"]
    stop: Int32[Array, " tiles"]


def tile_rows(rows: int, groups: int) -> int:
    """Rows per tile of the loop: about those of an average group."""
    size = _SMALLEST_TILE
    while size < min(rows // groups, _LARGEST_TILE):
        size *= 2
    return min(size, rows)


def _tiles(group_sizes: Int32[Array, " groups"], rows: int, size: int) -> _Tiles:
    ends = jnp.cumsum(group_sizes)
    tiles = (group_sizes + size - 1) // size
    last_tiles = jnp.cumsum(tiles)
    index = jnp.arange(rows // size + group_sizes.shape[0], dtype=jnp.int32)
    group = jnp.searchsorted(last_tiles, index, side="right").astype(jnp.int32)
    group = jnp.minimum(group, group_sizes.shape[0] - 1)
    within = index - (last_tiles - tiles)[group]
    first = (ends - group_sizes)[group] + within * size
    return _Tiles(last_tiles[-1], group, first, jnp.minimum(first + size, ends[group]))


def _at(array: Array, index: Int32[Array, ""]) -> Array:
    return jax.lax.dynamic_index_in_dim(array, index, keepdims=False, allow_negative_indices=False)


def _slice(array: Array, first: Int32[Array, ""], size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, first, size, allow_negative_indices=False)


def _place(tiles: _Tiles, index, rows: int, size: int):
    """Where a tile is read, and which rows of that are its own.

    A tile that would run over the end of the array is read a little earlier instead.
    """
    first = jnp.minimum(_at(tiles.first, index), rows - size)
    row = first + jnp.arange(size, dtype=jnp.int32)
    own: Bool[Array, " size"] = (row >= _at(tiles.first, index)) & (row < _at(tiles.stop, index))
    return first, own[:, None]


def _multiply(a: Array, b: Array, contract: tuple[int, int]) -> Float32[Array, "m n"]:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _tiled(x, kernels, group_sizes):
    return _tiled_product(x, kernels, group_sizes, inner=0)


def _tiled_transposed(d_out, kernels, group_sizes):
    return _tiled_product(d_out, kernels, group_sizes, inner=1)


def _tiled_product(x, kernels, group_sizes, inner: int) -> Float32[Array, "rows out"]:
    """Rows times matrices, of which axis `inner` is summed over."""
    rows, size = x.shape[0], tile_rows(x.shape[0], kernels.shape[0])
    tiles = _tiles(group_sizes, rows, size)

    def visit(index, out):
        first, own = _place(tiles, index, rows, size)
        kernel = _at(kernels, _at(tiles.group, index))
        product = _multiply(_slice(x, first, size), kernel, (1, inner))
        block = jnp.where(own, product, _slice(out, first, size))
        return jax.lax.dynamic_update_slice_in_dim(out, block, first, 0)

    out = jnp.zeros((rows, kernels.shape[2 - inner]), jnp.float32)
    return jax.lax.fori_loop(0, tiles.count, visit, out)


def _tiled_outer(x, d_out, group_sizes) -> Float32[Array, "groups inner out"]:
    """Sum over each group's rows of their outer products."""
    rows, groups = x.shape[0], group_sizes.shape[0]
    size = tile_rows(rows, groups)
    tiles = _tiles(group_sizes, rows, size)

    def visit(index, sums):
        first, own = _place(tiles, index, rows, size)
        group = _at(tiles.group, index)
        x_block = jnp.where(own, _slice(x, first, size), 0)
        d_block = jnp.where(own, _slice(d_out, first, size), 0)
        total = _at(sums, group) + _multiply(x_block, d_block, (0, 0))
        return jax.lax.dynamic_update_index_in_dim(sums, total, group, 0)

    sums = jnp.zeros((groups, x.shape[1], d_out.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, tiles.count, visit, sums)
