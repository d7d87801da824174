"""Parameters laid out for decoding give what the model gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.rollout.tiny_language import CONFIG
from tw_jax.models import graphdef, init_params
from tw_jax.models.matrices import matmul
from tw_jax.models.quantized import quantize
from tw_jax.rollout.weights import TransposedMatrix, decoding_weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 16), (2, 16), (5, 16), (2, 3, 16)])
def test_a_transposed_matrix_multiplies_as_the_matrix_does(shape, dtype):
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    matrix = jax.random.normal(jax.random.key(1), (16, 24), dtype)
    held = TransposedMatrix(matrix.T)
    expected = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
    out = jax.jit(matmul)(x, held)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(held.dense(), matrix)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.06)])
def test_logits_are_those_of_the_parameters(rows, tied, dtype, tolerance):
    config = dataclasses.replace(CONFIG, compute_dtype=dtype, tie_word_embeddings=tied)
    params = init_params(config, 0)
    weights = jax.jit(lambda p: decoding_weights(p, dtype, transpose=True))(params)
    for layer in weights.layers:
        for kernel in (layer["self_attn"]["o_proj"]["kernel"], layer["mlp"]["up_proj"]["kernel"]):
            assert isinstance(kernel, TransposedMatrix) and kernel.transposed.dtype == dtype
    tokens = jnp.arange(rows)[:, None]

    def logits(params, layers, head):
        model = nnx.merge(graphdef(config), params)
        hidden, _ = model.hidden_states(
            tokens, jnp.zeros_like(tokens), lambda q, k, v, *_: (q, None), layers=layers
        )
        return model.logits(hidden, head)

    ours = jax.jit(logits)(weights.params, weights.layers, weights.head)
    expected = jax.jit(logits)(params, None, None)
    np.testing.assert_allclose(ours, expected, atol=tolerance * float(jnp.abs(expected).max()))


def test_quantised_matrices_stay_as_they_are():
    params = init_params(CONFIG, 0)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    params["layers"]["mlp"]["up_proj"]["kernel"] = quantize(kernel, "int8", 16)
    weights = decoding_weights(params, "float32", transpose=True)
    assert not isinstance(weights.layers[0]["mlp"]["up_proj"]["kernel"], TransposedMatrix)
    assert isinstance(weights.layers[0]["mlp"]["down_proj"]["kernel"], TransposedMatrix)
