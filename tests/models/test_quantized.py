"""Matrices in few bits against a slow oracle: code points, error bounds, bytes, gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax.models.matrices import matmul
from tw_jax.models.quantized import NF4_POINTS, QuantizedMatrix, quantize

KINDS = ("int8", "nf4")
# QLoRA, appendix E.
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def points_of(kind: str) -> np.ndarray:
    return np.asarray(PUBLISHED) if kind == "nf4" else np.arange(-127, 128) / 127


def oracle(matrix: np.ndarray, kind: str, block: int) -> np.ndarray:
    """Every value on its own: the code point nearest to it, times the largest of its block."""
    points, out = points_of(kind), np.zeros_like(matrix)
    for column in range(matrix.shape[1]):
        for first in range(0, matrix.shape[0], block):
            scale = max(abs(float(x)) for x in matrix[first : first + block, column])
            for row in range(first, first + block):
                value = float(matrix[row, column])
                nearest = min(points, key=lambda p, v=value, s=scale: abs(p * s - v))
                out[row, column] = nearest * scale
    return out


def random_matrix(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal(shape, np.float32) * np.exp(rng.standard_normal(shape[-1:]))
    return matrix.astype(np.float32)


def test_the_code_points_are_those_of_the_paper():
    np.testing.assert_allclose(NF4_POINTS, PUBLISHED, rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [8, 32])
def test_every_value_becomes_the_nearest_code_point(kind, block):
    matrix = random_matrix(64, 5)
    matrix[:block, 0] = 0.0  # a block without a scale
    matrix[block, 1] = 1e4  # an outlier
    found = quantize(jnp.asarray(matrix), kind, block)
    np.testing.assert_allclose(found.dense(), oracle(matrix, kind, block), rtol=1e-6, atol=1e-9)
    # Half of the widest gap between neighbours, times the scale, bounds the error.
    bound = np.diff(points_of(kind)).max() / 2 * np.repeat(found.scales, block, axis=0)
    assert (np.abs(found.dense() - matrix) <= bound * (1 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_are_worked_off_one_by_one(kind):
    stack = random_matrix(2, 3, 32, 5)
    found = quantize(jnp.asarray(stack), kind, 16).dense()
    assert found.shape == stack.shape
    for layer in range(2):
        for expert in range(3):
            one = quantize(jnp.asarray(stack[layer, expert]), kind, 16)
            np.testing.assert_array_equal(found[layer, expert], one.dense())


@pytest.mark.parametrize(("kind", "most"), [("int8", 1.1), ("nf4", 0.6)])
def test_bytes_per_parameter(kind, most):
    matrix = jnp.zeros((128, 256), jnp.bfloat16)
    found = quantize(matrix, kind, 64)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(found)) / matrix.size <= most
    assert found.dense().dtype == jnp.bfloat16


def test_the_error_of_normal_weights():
    """What the kinds are good for: their relative errors on normally distributed weights."""
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((512, 64), np.float32))
    errors = {
        kind: float(jnp.linalg.norm(quantize(matrix, kind, 64).dense() - matrix))
        / float(jnp.linalg.norm(matrix))
        for kind in KINDS
    }
    assert errors["int8"] < 0.006
    assert errors["nf4"] < 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_and_their_gradient(kind, dtype):
    matrix = quantize(jnp.asarray(random_matrix(32, 7)), kind, 16)
    x = jnp.asarray(random_matrix(2, 3, 32, seed=1), dtype)
    np.testing.assert_array_equal(matmul(x, matrix), matmul(x, matrix.dense()))

    def loss(x, kernel):
        return jnp.sum(jnp.sin(matmul(x, kernel)))

    found, expected = jax.grad(loss)(x, matrix), jax.grad(loss)(x, matrix.dense())
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_no_stack_of_whole_matrices_exists_in_a_scan(kind):
    """The backward pass would keep every layer's matrix if the product's rule were not our own."""
    layers, width = 5, 64
    stack = quantize(jnp.asarray(random_matrix(layers, width, width)), kind, 16)

    def loss(x, stack: QuantizedMatrix):
        return jnp.sum(jax.lax.scan(lambda x, m: (jnp.tanh(matmul(x, m)), None), x, stack)[0])

    program = jax.jit(jax.grad(loss)).lower(jnp.ones((3, width)), stack).compile().as_text()
    floats = set(re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", program))
    assert f"{width},{width}" in floats
    assert f"{layers},{width},{width}" not in floats


def test_blocks_must_divide():
    with pytest.raises(ValueError, match="48 rows are no multiple of an even 32"):
        quantize(jnp.zeros((48, 4)), "nf4", 32)
    with pytest.raises(ValueError, match="45 rows are no multiple of an even 15"):
        quantize(jnp.zeros((45, 4)), "nf4", 15)
