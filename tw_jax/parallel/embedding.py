"""Token embedding, on one device and on a mesh.

The gradient of the table is added up in float32 whatever the dtypes are, since a frequent token's
gradient has thousands of addends, of which bfloat16 would lose most. On a mesh the table is
gathered once, in the dtype of the rows, and each device looks up its own tokens; the gradient is
then added up over devices and scattered to them.
"""

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from tw_jax.parallel.gather import gathered, scattered_sum
from tw_jax.parallel.layout import Layout


def embedding_rows(
    table: Float[Array, "vocab part"],
    tokens: Int32[Array, "*b len"],
    dtype: DTypeLike,
    width_axes: tuple[str, ...] = (),
) -> Array:
    """The rows `[*b, len, width]` of a table's tokens, in `dtype`.

    Args:
      table: the embedding table; inside shard_map, a part of its width.
      tokens: token ids.
      dtype: of the result.
      width_axes: mesh axes over which the table's width is spread.
    """
    return cast(Array, _rows(table, tokens, dtype, width_axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rows(table: Array, tokens: Array, dtype: DTypeLike, width_axes: tuple[str, ...]):
    return gathered(table.astype(dtype), width_axes, axis=1)[tokens]


def _rows_fwd(table: Array, tokens: Array, dtype: DTypeLike, width_axes: tuple[str, ...]):
    # The empty array carries the table's dtype and number of rows.
    return _rows(table, tokens, dtype, width_axes), (tokens, table[:, :0])


def _rows_bwd(dtype: DTypeLike, width_axes: tuple[str, ...], saved, d_rows: Array):
    del dtype
    tokens, like = saved
    vocab, width = like.shape[0], d_rows.shape[-1]
    tokens, d_rows = tokens.reshape(-1), d_rows.reshape(-1, width).astype(jnp.float32)
    if width_axes:
        # Width first: the TPU compiler scatters sums along the first axis only.
        d_table = jnp.zeros((width, vocab), jnp.float32).at[:, tokens].add(d_rows.T)
        d_table = scattered_sum(d_table, width_axes, axis=0).T
    else:
        d_table = jnp.zeros((vocab, width), jnp.float32).at[tokens].add(d_rows)
    return d_table.astype(like.dtype), None


_rows.defvjp(_rows_fwd, _rows_bwd)


def embedding_on(layout: Layout, dtype: DTypeLike) -> Callable[[Array, Array], Array]:
    """`embedding_rows` of a table that is spread over a mesh."""
    vocab_axes, width_axes = layout.mesh_axes(("vocab", "embed"))

    def local(
        table: Float[Array, "part width_part"], tokens: Int32[Array, "rows len"]
    ) -> Float[Array, "rows len width"]:
        if not vocab_axes:
            return embedding_rows(table, tokens, dtype, width_axes)
        own = tokens - jax.lax.axis_index(vocab_axes) * table.shape[0]
        here = (0 <= own) & (own < table.shape[0])
        rows = embedding_rows(table, jnp.where(here, own, 0), dtype, width_axes)
        return jax.lax.psum(rows * here[..., None].astype(rows.dtype), vocab_axes)

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(layout.spec(("vocab", "embed")), layout.spec(("batch", "length"))),
        out_specs=layout.spec(("batch", "length", None)),
        check_vma=False,
    )
