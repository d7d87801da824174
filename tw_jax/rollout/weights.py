"""Parameters laid out for decoding, once per session: what a step reads, it should only read.

- Every layer by itself: one sliced out of the stacked parameters would be copied in every step.
- In the dtype of the products, not converted in every step.
- On CPU transposed, `[out, in]`, and multiplied as `matrix @ x^T`. XLA's products there rearrange
  their right factor first, which takes longer than a product with few rows; this way it is the
  small one.

Tried and left out, since a whole step was not faster: queries, keys and values, and gate and up,
as one product each.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tw_jax.models import Params, head_matrix, unstack_layers
from tw_jax.models.matrices import StoredMatrix

# The matrices of a layer; those of experts are stacks, and multiplied in groups.
_MATRICES = frozenset(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
# XLA's CPU backend multiplies a single bfloat16 row in another, much slower way.
_FEWEST_ROWS = 2
_ROW_MAJOR = Layout(major_to_minor=(0, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransposedMatrix(StoredMatrix):
    """A matrix that is held as `[out, in]`.

    Attributes:
      transposed: the array.
    """

    transposed: Float[Array, "out inner"]

    def product(self, x: Float[Array, "*b inner"], dtype: DTypeLike) -> Float[Array, "*b out"]:
        """See `matmul`."""
        rows = x.reshape(-1, x.shape[-1])
        count = len(rows)
        if x.dtype == jnp.bfloat16:
            rows = jnp.pad(rows, ((0, max(0, _FEWEST_ROWS - count)), (0, 0)))
        matrix = self.transposed.astype(x.dtype)
        # Without the constraints XLA would give the transpositions away for another order of the
        # product, which is several times slower, or in bfloat16 not there.
        columns = with_layout_constraint(rows.T, _ROW_MAJOR)
        out = jnp.matmul(matrix, columns, preferred_element_type=dtype)
        out = with_layout_constraint(out, _ROW_MAJOR).T
        return out[:count].reshape(*x.shape[:-1], -1)

    def dense(self) -> Float[Array, "inner out"]:
        """The matrix the usual way."""
        return self.transposed.T


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters as decoding reads them.

    Attributes:
      params: as training has them, but with no layers in the stack.
      layers: each layer's own.
      head: `[hidden, vocab]`.
    """

    params: Params
    layers: tuple[Params, ...]
    head: Any


def decoding_weights(params: Params, dtype: DTypeLike, *, transpose: bool) -> Weights:
    """Lays parameters out for the loop; jit it.

    Args:
      params: as training has them.
      dtype: of the products.
      transpose: hold the matrices as `[out, in]`.
    """

    def laid_out(matrix):
        if isinstance(matrix, StoredMatrix):  # with an adapter, or quantised
            return matrix
        matrix = matrix.astype(dtype)
        return TransposedMatrix(matrix.T) if transpose else matrix

    def kernels_laid_out(layer: Params) -> Params:
        return {
            part: {
                name: {"kernel": laid_out(leaf["kernel"])} if name in _MATRICES else leaf
                for name, leaf in inner.items()
            }
            for part, inner in layer.items()
        }

    no_layers = jax.tree.map(lambda leaf: leaf[:0], params["layers"])
    return Weights(
        params={**params, "layers": no_layers},
        layers=tuple(map(kernels_laid_out, unstack_layers(params))),
        head=laid_out(head_matrix(params)),
    )
