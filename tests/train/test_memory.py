"""What a training step keeps in memory, read off the compiled programs, and in which dtypes."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from tw_jax.data.packed_batch import PackedBatch
from tw_jax.models import abstract_params, graphdef, preset
from tw_jax.train.update import MemoryConfig, nll_sum

ROWS, ROW_LEN = 2, 1024
SIZES = dict(
    vocab_size=4000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=8192,
)
DENSE, MOE = preset("tiny", **SIZES), preset("tiny-moe", **SIZES)


def abstract_batch(row_len: int) -> PackedBatch:
    integers = jax.ShapeDtypeStruct((ROWS, row_len), jnp.int32)
    nothing_hidden = jax.ShapeDtypeStruct((0, ROWS, row_len), jnp.int32)
    weights = jax.ShapeDtypeStruct((ROWS, row_len), jnp.float32)
    return PackedBatch(*[integers] * 4, nothing_hidden, nothing_hidden, weights)


@functools.cache
def compiled(remat: str, row_len: int = ROW_LEN, config=DENSE):
    """The gradient of the SFT loss."""
    loss = nll_sum(graphdef(config), MemoryConfig(remat=remat, head_chunk=256))
    lowered = jax.jit(jax.grad(loss, has_aux=True)).lower(
        abstract_params(config), abstract_batch(row_len)
    )
    return lowered.compile()


def temporary(remat: str, row_len: int = ROW_LEN) -> int:
    """Bytes of temporary memory."""
    return compiled(remat, row_len).memory_analysis().temp_size_in_bytes


def shapes(program) -> set[tuple[int, ...]]:
    """Every array's shape in the compiled program, inside of fusions included."""
    found = re.findall(r"\b(?:f32|bf16|f16|s32|u32|pred|s8|u8)\[([\d,]+)\]", program.as_text())
    return {tuple(map(int, dims.split(","))) for dims in found}


@pytest.mark.parametrize(
    ("config", "remat"), [(DENSE, "block"), pytest.param(MOE, "none", marks=pytest.mark.slow)]
)
def test_no_array_of_tokens_by_tokens_or_by_vocabulary(config, remat):
    program = compiled(remat, config=config)
    found = shapes(program)
    assert (config.num_hidden_layers, ROWS, ROW_LEN, config.hidden_size) in found, "not parsed"
    assert not [s for s in found if sum(dim >= ROW_LEN for dim in s) > 1]
    # Nor one with its axes merged: everything is smaller than one row's square.
    assert max(map(math.prod, found)) < ROW_LEN**2


@pytest.mark.slow
def test_policies_take_less_memory_in_order():
    none, dots, block, full, offload = map(temporary, ("none", "dots", "block", "full", "offload"))
    assert none > 1.5 * dots and dots > 1.5 * block and block > full
    # The CPU's own memory is the host's: nothing is saved there, and nothing may be lost.
    assert offload <= full
    # Block keeps one more array of the residual stream's size per layer, and the log-sum-exps.
    stream = DENSE.num_hidden_layers * ROWS * ROW_LEN * DENSE.hidden_size * 4
    log_sums = stream * DENSE.num_attention_heads // DENSE.hidden_size
    assert block - full == pytest.approx(stream + log_sums, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block", "full"])
def test_memory_is_linear_in_the_row_length(remat):
    short, middle, long = (temporary(remat, row_len) for row_len in (1024, 2048, 4096))
    assert (long - middle) / (middle - short) == pytest.approx(2, rel=0.03)


@pytest.mark.slow
def test_experts_take_no_memory_per_token_and_expert():
    """Four times the experts, the same tokens: only weights and probabilities grow."""
    more = dataclasses.replace(MOE, moe=dataclasses.replace(MOE.moe, num_experts=32))
    few, many = compiled("none", config=MOE), compiled("none", config=more)
    weights = sum(
        (b.size - a.size) * 4
        for a, b in zip(
            jax.tree.leaves(abstract_params(MOE)),
            jax.tree.leaves(abstract_params(more)),
            strict=True,
        )
    )
    probabilities = 24 * ROWS * ROW_LEN * 4 * SIZES["num_hidden_layers"]
    growth = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    assert growth < 2 * weights + 4 * probabilities


def equations(jaxpr: Jaxpr):
    """All equations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(value, ClosedJaxpr):
                yield from equations(value.jaxpr)
            elif isinstance(value, Jaxpr):
                yield from equations(value)


def floats(variables) -> set[str]:
    """Names of the floating dtypes of some variables."""
    dtypes = {str(v.aval.dtype) for v in variables if hasattr(v.aval, "dtype")}
    return {d for d in dtypes if "float" in d}


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_bfloat16_only_where_it_is_harmless(name):
    """Norms, rotation, softmax and loss read float32."""
    config = preset(name, compute_dtype="bfloat16", vocab_size=64)
    loss = nll_sum(graphdef(config), MemoryConfig(remat="full", head_chunk=64))
    traced = jax.make_jaxpr(jax.grad(loss, has_aux=True))(
        abstract_params(config), abstract_batch(128)
    )
    sensitive = {"rsqrt", "cos", "sin", "exp", "log", "reduce_sum", "reduce_max", "div", "cumsum"}
    seen = set()
    for equation in equations(traced.jaxpr):
        primitive = equation.primitive.name
        if primitive in sensitive and floats(equation.invars):
            seen.add(primitive)
            assert floats(equation.invars) == {"float32"}, equation
    assert {"rsqrt", "cos", "sin", "exp", "log", "reduce_max"} <= seen


def test_bfloat16_products_are_the_rule():
    """In the forward pass, every matrix product reads bfloat16 and returns float32."""
    config = preset("tiny-moe", compute_dtype="bfloat16", vocab_size=64)
    loss = nll_sum(graphdef(config), MemoryConfig(head_chunk=4096))
    traced = jax.make_jaxpr(loss)(abstract_params(config), abstract_batch(128))
    products = [e for e in equations(traced.jaxpr) if "dot_general" in e.primitive.name]
    assert len(products) >= 4 + 1 + 3 + 2 + 1  # attention, router, experts, tree attention, head
    for product in products:
        assert floats(product.invars) == {"bfloat16"}, product
        assert floats(product.outvars) == {"float32"}, product
