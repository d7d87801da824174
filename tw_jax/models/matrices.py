"""Products with matrices, whichever way they are held: as one array, quantised, with an adapter."""

import abc
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32


class StoredMatrix(abc.ABC):
    """A matrix that is held as something else than one array.

    It is a pytree, so that it may take an array's place in the tree of parameters: there its arrays
    are stacked on axis 0, and whatever slices the stack makes it the matrix of one layer.
    """

    @abc.abstractmethod
    def product(self, x: Float[Array, "*b inner"], dtype: DTypeLike) -> Float[Array, "*b out"]:
        """`x @ matrix`, as `matmul` defines it."""

    @abc.abstractmethod
    def dense(self) -> Float[Array, "*stack inner out"]:
        """The matrix, or the stack of matrices, as one array."""


def matmul(
    x: Float[Array, "*b inner"],
    kernel: Float[Array, "inner out"] | StoredMatrix,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*b out"]:
    """`x @ kernel` with inputs in x's dtype, accumulated in float32.

    A float32 result is asked for explicitly: for a bfloat16 one, XLA's CPU backend would convert
    the inputs to float32 first, at half the speed. Off a mesh the product is made two-dimensional,
    since for the kernel's gradient that backend would otherwise write transposed copies of the
    activations (a third of a training step). On a mesh the axes stay apart: they may be sharded.

    Args:
      x: the left factor.
      kernel: the right one.
      dtype: of the result, and of the parts of a sum that devices of a mesh send each other.
    """
    if isinstance(kernel, StoredMatrix):
        return kernel.product(x, dtype)
    tokens = x.shape[:-1]
    if not on_a_mesh():
        x = x.reshape(-1, x.shape[-1])
    out = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=dtype)
    return out.reshape(*tokens, -1)


def on_a_mesh() -> bool:
    """Whether the code that is being traced is for a mesh."""
    return not jax.sharding.get_abstract_mesh().empty


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b"],
    meta_fields=["scale"],
)
@dataclasses.dataclass(frozen=True)
class AdaptedMatrix(StoredMatrix):
    """`base + scale * a @ b`, or a stack of these; the sum is made by `dense` only.

    Attributes:
      base: a matrix that a low-rank product changes.
      a: from the inner axis to the rank.
      b: from the rank to the outer axis.
      scale: weight of the change.
    """

    base: Float[Array, "*stack inner out"] | StoredMatrix
    a: Float[Array, "*stack inner rank"]
    b: Float[Array, "*stack rank out"]
    scale: float

    def product(self, x: Float[Array, "*b inner"], dtype: DTypeLike) -> Float[Array, "*b out"]:
        """`x @ base + scale * (x @ a) @ b`."""
        with jax.named_scope("adapter"):
            change = matmul(matmul(x, self.a, dtype).astype(x.dtype), self.b, dtype)
        return matmul(x, self.base, dtype) + self.scale * change

    def rows(self, index: Int32[Array, "*b"], look_up: Callable) -> Float32[Array, "*b out"]:
        """Rows of the matrix, as of an embedding; `look_up(table, index)` finds the base's."""
        change = jnp.matmul(self.a[index], self.b, precision="highest")
        return look_up(self.base, index).astype(jnp.float32) + self.scale * change

    def dense(self) -> Float[Array, "*stack inner out"]:
        """The sum, in the dtype of the base."""
        base = self.base.dense() if isinstance(self.base, StoredMatrix) else self.base
        change = jnp.matmul(self.a, self.b, precision="highest")
        return (base.astype(jnp.float32) + self.scale * change).astype(base.dtype)

    @property
    def T(self) -> "AdaptedMatrix":
        """The matrix transposed."""
        assert not isinstance(self.base, StoredMatrix)
        return AdaptedMatrix(self.base.T, self.b.T, self.a.T, self.scale)
