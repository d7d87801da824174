"""Tree attention in float64: gradients against finite differences.

Float32 is too coarse for this: a difference of 1e-6 in an input drowns in its rounding.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.forests import forest_row, native_row, side_by_side
from tests.kernels.test_tree_attention import close, random_inputs, run_dense, run_tiled, tiled

ROW_LEN = 37  # two tiles and a part of one
TREES = side_by_side(
    forest_row([(0, 6), (3, 7), (7, 8)], 21)[1],
    forest_row([], 3)[1],
    forest_row([(0, 4), (2, 9)], 13)[1],
)
CAUSAL = np.full(ROW_LEN, ROW_LEN, np.int32)
NESTED = [3, ([2, ([4], [3]), 1], [8], [5]), 11]
DEPTH = 2


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def case(name):
    """`(visible_end, hidden)` of a batch of two rows."""
    if name == "trees":
        return np.stack([TREES, CAUSAL]), None
    start, stop, where = native_row(NESTED, DEPTH)
    assert len(where) == ROW_LEN
    nothing = np.zeros_like(start)
    hidden = tuple(np.stack([bound, nothing], axis=1) for bound in (start, stop))
    return np.stack([CAUSAL, TREES]), hidden


CASES = ["trees", "hidden"]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name):
    end, hidden = case(name)
    q, k, v, _ = random_inputs(row_len=ROW_LEN, dtype=jnp.float64)

    @jax.jit
    def attend(q, k, v):
        return tiled(q, k, v, end, hidden)

    assert attend(q, k, v).dtype == jnp.float64
    check_grads(attend, (q, k, v), order=1, modes=["rev"], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_float64_inputs_have_a_float64_softmax(name):
    """To a precision that no float32 step on the way would leave."""
    end, hidden = case(name)
    inputs = random_inputs(row_len=ROW_LEN, dtype=jnp.float64)
    found, wanted = run_tiled(*inputs, end, hidden), run_dense(*inputs, end, hidden)
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves((found, wanted)))
    close(found, wanted, 1e-13)


def test_float32_inputs_keep_a_float32_softmax():
    """Also where float64 is on: no step may become wider by accident."""
    end, hidden = case("hidden")
    inputs = random_inputs(row_len=ROW_LEN, dtype=jnp.float32)
    text = str(jax.make_jaxpr(lambda q, k, v: tiled(q, k, v, end, hidden))(*inputs[:3]))
    assert re.search(r"f32\[\d", text)
    assert not re.search(r"f64\[\d", text)  # constants without a shape adapt to what they meet
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(run_tiled(*inputs, end, hidden)))
