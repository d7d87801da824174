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
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from tw_jax.models import Params, head_matrix
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
      params: as training has them, but with nothing in the stack of layers and in the head.
      layers: each layer's own.
      head: `[hidden, vocab]`.
    """

    params: Params
    layers: tuple[Params, ...]
    head: Any


@dataclasses.dataclass(frozen=True)
class Form:
    """How an array that decoding reads follows from one of the parameters.

    Attributes:
      part: all of it, one of the layers stacked in it, or nothing of it.
      dtype: to convert to; None leaves it as it is.
      transposed: the other way round.
    """

    part: Literal["all", "layer", "nothing"] = "all"
    dtype: str | None = None
    transposed: bool = False

    def of(self, leaf: Array, layer: int | Int32[Array, ""]) -> Array:
        """The array.

        Args:
          leaf: of the parameters.
          layer: which one; any number where it is not one of the layers.
        """
        if self.part == "nothing":
            return leaf[:0]
        part = leaf[layer] if self.part == "layer" else leaf
        part = part if self.dtype is None else part.astype(self.dtype)
        return part.T if self.transposed else part


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """An array that decoding reads, not made yet. In a plan it stands in the array's place.

    Attributes:
      leaf: the array of the parameters that it follows from.
      form: how.
      layer: which of the layers.
    """

    leaf: Array
    form: Form = Form()
    layer: int = 0

    @property
    def key(self) -> tuple[int, Form, int]:
        """Equal for pieces that are the same array, while the leaves are there."""
        return id(self.leaf), self.form, self.layer

    @property
    def T(self) -> "Piece":
        """The piece transposed."""
        form = dataclasses.replace(self.form, transposed=not self.form.transposed)
        return dataclasses.replace(self, form=form)

    def astype(self, dtype: DTypeLike) -> "Piece":
        """The piece in a dtype."""
        changes = self.leaf.dtype != jnp.dtype(dtype)
        form = dataclasses.replace(self.form, dtype=jnp.dtype(dtype).name if changes else None)
        return dataclasses.replace(self, form=form)


@dataclasses.dataclass(frozen=True)
class WeightsFormat:
    """How an engine wants its weights.

    Attributes:
      dtype: of the products.
      transpose: hold the matrices as `[out, in]`.
    """

    dtype: DTypeLike
    transpose: bool

    def plan(self, params: Params) -> Weights:
        """The weights with a `Piece` in the place of every array; costs nothing."""
        stacked = params["layers"]
        others = {name: jax.tree.map(Piece, leaf) for name, leaf in params.items()}
        head = self._laid_out(head_matrix(others))
        # What is read from elsewhere is there in name only.
        for name in ("layers", "lm_head"):
            if name in others:
                others[name] = jax.tree.map(lambda leaf: Piece(leaf, Form("nothing")), params[name])
        count = jax.tree.leaves(stacked)[0].shape[0]
        return Weights(others, tuple(self._layer(stacked, i) for i in range(count)), head)

    def _layer(self, stacked: Params, index: int) -> Params:
        layer = jax.tree.map(lambda leaf: Piece(leaf, Form("layer"), index), stacked)
        return {
            part: {
                name: {"kernel": self._laid_out(leaf["kernel"])} if name in _MATRICES else leaf
                for name, leaf in inner.items()
            }
            for part, inner in layer.items()
        }

    def _laid_out(self, matrix: Any) -> Any:
        if isinstance(matrix, StoredMatrix):  # with an adapter, or quantised
            return matrix
        matrix = matrix.astype(self.dtype)
        return TransposedMatrix(matrix.T) if self.transpose else matrix


def decoding_weights(params: Params, dtype: DTypeLike, *, transpose: bool) -> Weights:
    """Lays parameters out for the loop, where they lie; jit it.

    Args:
      params: as training has them.
      dtype: of the products.
      transpose: hold the matrices as `[out, in]`.
    """
    plan = WeightsFormat(dtype, transpose).plan(params)
    return jax.tree.map(lambda piece: piece.form.of(piece.leaf, piece.layer), plan)
