import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax.parallel.embedding import embedding_rows


def test_rows_and_gradient_are_those_of_indexing():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((11, 6)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 11, (3, 20)), jnp.int32)
    weights = jnp.asarray(rng.standard_normal((3, 20, 6)), jnp.float32)

    def total(look_up):
        return jax.value_and_grad(lambda table: jnp.sum(look_up(table) * weights))(table)

    ours = total(lambda table: embedding_rows(table, tokens, jnp.float32))
    plain = total(lambda table: table[tokens])
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_a_frequent_token_loses_no_gradient(param_dtype):
    """4,096 addends of 1: in bfloat16 the sum would stop growing at 256."""
    table = jnp.zeros((2, 4), param_dtype)
    tokens = jnp.ones((1, 4096), jnp.int32)

    def loss(table):
        return embedding_rows(table, tokens, jnp.bfloat16).astype(jnp.float32).sum()

    gradient = jax.grad(loss)(table)
    assert gradient.dtype == param_dtype
    np.testing.assert_array_equal(gradient, [[0.0] * 4, [4096.0] * 4])
    lossy = jax.grad(lambda table: table[tokens].sum().astype(jnp.float32))
    assert float(lossy(table.astype(jnp.bfloat16))[1, 0]) < 4096
