"""Frozen matrices in 8 or 4 bits, made whole again layer by layer where they are used.

Consecutive rows of a column form a block, which shares a scale: its largest absolute value. A value
is stored as the number of the code point in [-1, 1] nearest to value / scale:

    int8   255 points, evenly spaced
    nf4    16 points, the quantiles of a normal distribution (QLoRA, arXiv 2305.14314, section 3),
           two values to a byte

Scales are float32, so a block of 64 takes 8.5 or 4.5 bits per parameter. The paper's second
quantisation, that of the scales, is not made: it would save another 0.37 bits.
"""

import dataclasses
import functools
import statistics
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8, UInt8

from tw_jax.models.matrices import StoredMatrix, matmul

Kind = Literal["int8", "nf4"]
_LARGEST = 127


def _normal_float_points() -> tuple[float, ...]:
    """The 16 code points of NF4, ascending.

    Quantiles of the standard normal at evenly spaced probabilities, 8 levels from 0 up and 7 from 0
    down, scaled to [-1, 1]; both halves share the 0 (section 3 and appendix E). The outermost
    probability is the mean of those that a split into 30 or 32 equal shares would give.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    quantile = statistics.NormalDist().inv_cdf

    def half(levels: int) -> list[float]:
        return [quantile(0.5 + (outermost - 0.5) * i / levels) for i in range(1, levels + 1)]

    up, down = half(8), half(7)
    return (*(-q / down[-1] for q in reversed(down)), 0.0, *(q / up[-1] for q in up))


NF4_POINTS = _normal_float_points()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales"],
    meta_fields=["kind", "block_size", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix(StoredMatrix):
    """A matrix in few bits, or a stack of them. It is never differentiated.

    Attributes:
      codes: numbers of code points; nf4 packs rows 2i and 2i + 1 into the low and high half of one.
      scales: largest absolute value of each block.
      kind: which code points.
      block_size: rows that share a scale.
      dtype: of the matrix before it was quantised, and of `dense`.
    """

    codes: Int8[Array, "*stack inner out"] | UInt8[Array, "*stack half out"]
    scales: Float32[Array, "*stack blocks out"]
    kind: Kind
    block_size: int
    dtype: str

    def product(self, x: Float[Array, "*b inner"], dtype: DTypeLike) -> Float[Array, "*b out"]:
        """`x @ matrix`; the backward pass makes the matrix anew instead of keeping it."""
        return cast(Array, _product(x, self, dtype))

    def dense(self) -> Float[Array, "*stack inner out"]:
        """The code points times their scales."""
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: DTypeLike) -> Float[Array, "*stack inner out"]:
        """`dense` in a dtype of choice."""
        codes = self.codes
        if self.kind == "int8":
            points = codes.astype(jnp.float32) / _LARGEST
        else:
            *stack, half, out = codes.shape
            pairs = jnp.stack([codes & 15, codes >> 4], axis=-2)
            pairs = pairs.reshape(*stack, 2 * half, out)
            points = jnp.asarray(NF4_POINTS, jnp.float32)[pairs]
        blocks = points.reshape(*self.scales.shape[:-1], self.block_size, points.shape[-1])
        return (blocks * self.scales[..., None, :]).astype(dtype).reshape(points.shape)


def quantize(
    matrix: Float[Array, "*stack inner out"], kind: Kind, block_size: int
) -> QuantizedMatrix:
    """Rounds every value to its block's nearest code point; a stack is worked off one by one.

    Args:
      matrix: one matrix or a stack of them.
      kind: which code points.
      block_size: rows that share a scale.

    Raises:
      ValueError: the rows are no multiple of `block_size`, or that is odd.
    """
    if matrix.shape[-2] % block_size or block_size % 2:
        raise ValueError(f"{matrix.shape[-2]} rows are no multiple of an even {block_size}")
    one = functools.partial(_quantize_one, kind=kind, block_size=block_size)
    codes, scales = jax.lax.map(one, matrix) if matrix.ndim > 2 else one(matrix)
    return QuantizedMatrix(codes, scales, kind, block_size, str(matrix.dtype))


def _quantize_one(
    matrix: Float[Array, "*stack inner out"], *, kind: Kind, block_size: int
) -> tuple[Array, Float32[Array, "*stack blocks out"]]:
    *stack, inner, out = matrix.shape
    blocks = matrix.astype(jnp.float32).reshape(*stack, inner // block_size, block_size, out)
    scales = jnp.max(jnp.abs(blocks), axis=-2)
    shares = blocks / jnp.where(scales > 0, scales, 1.0)[..., None, :]
    shares = shares.reshape(matrix.shape)
    if kind == "int8":
        return jnp.round(shares * _LARGEST).astype(jnp.int8), scales
    points = np.asarray(NF4_POINTS, np.float32)
    codes = jnp.zeros(shares.shape, jnp.uint8)
    for border in (points[1:] + points[:-1]) / 2:
        codes += (shares > border).astype(jnp.uint8)
    pairs = codes.reshape(*stack, inner // 2, 2, out)
    return pairs[..., 0, :] | (pairs[..., 1, :] << 4), scales


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, matrix: QuantizedMatrix, dtype: DTypeLike):
    return matmul(x, matrix.dequantized(x.dtype), dtype)


def _forward(x, matrix, dtype):
    # The empty array carries the dtype of x.
    return _product(x, matrix, dtype), (matrix, jnp.zeros(0, x.dtype))


def _backward(dtype, kept, gradient):
    matrix, like = kept
    whole = matrix.dequantized(like.dtype)
    back = matmul(gradient.astype(like.dtype), whole.T, dtype)
    return back.astype(like.dtype), None  # what is frozen has no gradient


_product.defvjp(_forward, _backward)
