"""The tiled grouped product against one product per row, in every corner of the group sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tw_jax.kernels.grouped_matmul import grouped_matmul

ROWS, GROUPS, INNER, OUT = 40, 4, 3, 5


@st.composite
def group_sizes(draw):
    """Sizes of `GROUPS` groups, some empty, that cover all rows or fewer."""
    cuts = sorted(draw(st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS)))
    return np.diff([0, *cuts]).astype(np.int32)


def row_by_row(x, kernels, sizes):
    """The definition, in float64."""
    out = np.zeros((len(x), kernels.shape[2]))
    group = np.repeat(np.arange(len(sizes)), sizes)
    for row, g in enumerate(group):
        out[row] = x[row].astype(np.float64) @ kernels[g].astype(np.float64)
    return out


@jax.jit
def value_and_gradients(x, kernels, sizes, cotangent):
    out, transpose = jax.vjp(lambda x, k: grouped_matmul(x, k, sizes), x, kernels)
    return out, *transpose(cotangent)


@settings(max_examples=60, deadline=None)
@given(group_sizes(), st.integers(0, 1000))
def test_values_and_gradients(sizes, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ROWS, INNER)).astype(np.float32)
    kernels = rng.standard_normal((GROUPS, INNER, OUT)).astype(np.float32)
    cotangent = rng.standard_normal((ROWS, OUT)).astype(np.float32)
    out, d_x, d_kernels = value_and_gradients(x, kernels, sizes, cotangent)
    np.testing.assert_allclose(out, row_by_row(x, kernels, sizes), atol=1e-5)
    expected = row_by_row(cotangent, kernels.swapaxes(1, 2), sizes)
    np.testing.assert_allclose(d_x, expected, atol=1e-5)
    group = np.repeat(np.arange(GROUPS), sizes)
    for g in range(GROUPS):
        rows = np.flatnonzero(group == g)
        np.testing.assert_allclose(d_kernels[g], x[rows].T @ cotangent[rows], atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "groups"), [(1, 1), (1, 7), (3, 2), (8, 8), (9, 2), (700, 1), (1300, 2)]
)
def test_any_number_of_rows_and_groups(rows, groups):
    rng = np.random.default_rng(rows)
    sizes = rng.multinomial(rows, np.ones(groups) / groups).astype(np.int32)
    x = rng.standard_normal((rows, INNER)).astype(np.float32)
    kernels = rng.standard_normal((groups, INNER, OUT)).astype(np.float32)
    out = jax.jit(grouped_matmul)(x, kernels, sizes)
    np.testing.assert_allclose(out, row_by_row(x, kernels, sizes), atol=1e-5)


def test_rows_behind_the_groups_are_never_looked_at():
    """Not even if they hold no numbers."""
    x = np.full((16, INNER), np.nan, np.float32)
    x[:5] = 1
    kernels, sizes = np.ones((2, INNER, OUT), np.float32), np.array([2, 3], np.int32)
    out, d_x, d_kernels = value_and_gradients(x, kernels, sizes, np.ones((16, OUT), np.float32))
    np.testing.assert_array_equal(out, [[INNER] * OUT] * 5 + [[0] * OUT] * 11)
    np.testing.assert_array_equal(d_x, [[OUT] * INNER] * 5 + [[0] * INNER] * 11)
    np.testing.assert_array_equal(d_kernels[:, 0, 0], [2, 3])


def test_bfloat16_inputs_are_accumulated_in_float32():
    x = jnp.ones((8, 1024), jnp.bfloat16)
    kernels = jnp.full((1, 1024, 2), 1 + 2**-7, jnp.float32)
    out = jax.jit(grouped_matmul)(x, kernels, jnp.array([8], jnp.int32))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 1024 * (1 + 2**-7))


def test_no_buffer_has_a_row_for_every_pair_of_group_and_row():
    rows, groups, inner, out = 512, 16, 64, 64
    shapes = (
        jax.ShapeDtypeStruct((rows, inner), jnp.float32),
        jax.ShapeDtypeStruct((groups, inner, out), jnp.float32),
        jax.ShapeDtypeStruct((groups,), jnp.int32),
        jax.ShapeDtypeStruct((rows, out), jnp.float32),
    )
    compiled = value_and_gradients.lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < groups * rows * inner * 4 / 2


def test_the_tpu_program_holds_the_compilers_own_operation():
    """Traced here for the platform `tpu`: a ragged dot for the value and two for the gradients."""
    shapes = (
        jax.ShapeDtypeStruct((64, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((4, 128, 256), jnp.bfloat16),
        jax.ShapeDtypeStruct((4,), jnp.int32),
        jax.ShapeDtypeStruct((64, 256), jnp.float32),
    )
    text = value_and_gradients.trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("ragged_dot") >= 3
    assert "stablehlo.while" not in text
