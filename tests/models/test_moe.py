"""Mixture of experts: routing, the sum over experts, its memory, and the load-balancing loss."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.qwen3_reference import CASES, case_tokens, seeded_params, torch_loss
from tests.models.qwen3_reference import torch_tensors as by_torch_name
from tw_jax.models import MixtureOfExperts, graphdef, unstack_layers
from tw_jax.models.moe import (
    ExpertKernels,
    Routing,
    add_router_load,
    load_balancing_loss,
    no_router_load,
    route,
    run_experts,
)

MOE = MixtureOfExperts(6, 2, 10, norm_topk_prob=True, router_aux_loss_coef=0.0)
HIDDEN = 8


def random_layer(tokens: int, seed: int = 0, skew: float = 1.0):
    """Tokens, their routing and the experts' kernels."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    count, inner = MOE.num_experts, MOE.moe_intermediate_size
    logits = normal(tokens, count) + skew * np.arange(count, dtype=np.float32)
    kernels = ExpertKernels(
        normal(count, HIDDEN, inner), normal(count, HIDDEN, inner), normal(count, inner, HIDDEN)
    )
    return normal(tokens, HIDDEN), route(logits, MOE), kernels


def one_by_one(x, routing, kernels):
    """The definition, token by token, in float64."""
    out = np.zeros((len(x), HIDDEN))
    gate, up, down = (np.asarray(kernel, np.float64) for kernel in kernels)
    for t, token in enumerate(np.asarray(x, np.float64)):
        for expert, weight in zip(routing.experts[t], routing.weights[t], strict=True):
            g, u = token @ gate[expert], token @ up[expert]
            out[t] += float(weight) * ((g / (1 + np.exp(-g)) * u) @ down[expert])
    return out


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1.0, 30.0]))
def test_every_token_gets_the_weighted_sum_of_its_experts(seed, skew):
    x, routing, kernels = random_layer(23, seed, skew)
    out = jax.jit(run_experts)(x, routing, kernels)
    np.testing.assert_allclose(out, one_by_one(x, routing, kernels), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_a_few_tokens_as_in_decoding(tokens):
    x, routing, kernels = random_layer(tokens)
    out = jax.jit(run_experts)(x, routing, kernels)
    np.testing.assert_allclose(out, one_by_one(x, routing, kernels), rtol=1e-4, atol=1e-4)


def test_a_tokens_result_does_not_depend_on_the_others():
    """Nothing is dropped, and no capacity is shared."""
    x, routing, kernels = random_layer(40, skew=0.0)
    together = jax.jit(run_experts)(x, routing, kernels)
    alone = [
        jax.jit(run_experts)(x[i : i + 1], Routing(*(r[i : i + 1] for r in routing)), kernels)
        for i in range(3)
    ]
    np.testing.assert_allclose(np.concatenate(alone), together[:3], rtol=1e-5, atol=1e-5)


def test_parts_of_the_experts_add_up():
    """What a device with some of the experts computes, and what the sum over devices gives."""
    x, routing, kernels = jax.tree.map(jnp.asarray, random_layer(30))
    whole = run_experts(x, routing, kernels)

    @jax.jit
    def part(first):
        mine = ExpertKernels(*(jax.lax.dynamic_slice_in_dim(k, first, 2) for k in kernels))
        return run_experts(x, routing, mine, first)

    parts = sum(part(first) for first in (0, 2, 4))
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-4)


def test_route_takes_the_likeliest_and_rescales_on_demand():
    logits = np.array([[0.0, 3.0, 1.0, 2.0, -1.0, 0.5]], np.float32)
    probability = np.exp(logits) / np.exp(logits).sum()
    routing = route(logits, dataclasses.replace(MOE, norm_topk_prob=False))
    np.testing.assert_array_equal(routing.experts, [[1, 3]])
    np.testing.assert_allclose(routing.weights[0], probability[0, [1, 3]], rtol=1e-6)
    np.testing.assert_allclose(routing.probabilities, probability, rtol=1e-6)
    rescaled = route(logits, MOE)
    np.testing.assert_allclose(rescaled.weights[0], [np.e / (1 + np.e), 1 / (1 + np.e)], rtol=1e-6)


def test_the_router_is_float32_in_a_bfloat16_model():
    config = dataclasses.replace(CASES["moe"], compute_dtype="bfloat16")
    seen = []

    def observe(routing, carry):
        seen.append((routing.weights.dtype, routing.probabilities.dtype))
        return carry

    hidden, _ = jax.eval_shape(lambda p: forward(config, p, observe=observe), params_of(config))
    assert hidden.dtype == jnp.bfloat16
    assert seen == [(jnp.float32, jnp.float32)]


def causal(q, k, v, layer, carry):
    del layer
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), carry


def params_of(config):
    return seeded_params(config, seed=2)


def forward(config, params, carry=None, observe=None, **options):
    tokens = case_tokens(config)
    model = nnx.merge(graphdef(config), params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.hidden_states(tokens, positions, causal, carry, observe_router=observe, **options)


def router_loss(config, params, counted, **options):
    def observe(routing, load):
        return add_router_load(load, routing, counted.reshape(-1))

    _, load = forward(config, params, no_router_load(config.moe), observe, **options)
    return load_balancing_loss(load)


@pytest.mark.parametrize(("name", "padded"), [("moe", False), ("moe_unnormalised", True)])
def test_load_balancing_loss_and_gradient_are_those_of_transformers(name, padded):
    pytest.importorskip("torch")
    config = CASES[name]
    params, tokens = params_of(config), case_tokens(config)
    counted = np.ones(tokens.shape, np.float32)
    if padded:
        counted[0, 15:] = 0
    aux = 3.0

    @jax.jit
    def loss_and_gradient(params):
        def loss(params):
            hidden, _ = forward(config, params)
            logits = nnx.merge(graphdef(config), params).logits(hidden)
            logprob = jax.nn.log_softmax(logits[:, :-1])
            chosen = jnp.take_along_axis(logprob, tokens[:, 1:, None], -1)[..., 0]
            nll = -jnp.sum(chosen * counted[:, 1:]) / jnp.sum(counted[:, 1:])
            balance = router_loss(config, params, counted)
            return nll + aux * balance, (nll, balance)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (nll, balance)), gradient = loss_and_gradient(params)
    expected = torch_loss(config, params, tokens, aux_weight=aux, mask=counted)
    assert nll == pytest.approx(expected.nll, rel=1e-5)
    assert balance == pytest.approx(expected.aux, rel=1e-5)
    ours = by_torch_name(config, jax.device_get(gradient))
    for key, theirs in expected.gradients.items():
        assert np.abs(ours[key] - theirs).max() <= 1e-4 * np.abs(theirs).max(), key


def test_the_load_survives_remat_and_unrolling():
    config = CASES["moe"]
    params, counted = params_of(config), jnp.ones(case_tokens(config).shape)

    @jax.jit
    def gradients(params):
        def of(**options):
            return jax.value_and_grad(lambda p: router_loss(config, p, counted, **options))(params)

        return [of(), of(remat="full"), of(remat="dots", unroll=True)]

    expected, *others = gradients(params)
    for other in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other, expected
        )


def test_a_balanced_router_has_the_least_loss():
    rng = np.random.default_rng(0)
    counted = jnp.ones(64)

    def loss(logits):
        return load_balancing_loss(
            add_router_load(no_router_load(MOE), route(logits, MOE), counted)
        )

    even = loss(1e-3 * rng.standard_normal((64, MOE.num_experts)).astype(np.float32))
    skewed = loss(np.tile(5.0 * np.arange(MOE.num_experts, dtype=np.float32), (64, 1)))
    assert even == pytest.approx(MOE.num_experts_per_tok, rel=1e-2)
    assert skewed > 2 * even


def test_decoding_with_separate_layers_is_the_same_forward():
    config = CASES["moe"]
    params = params_of(config)
    scanned, _ = jax.jit(lambda p: forward(config, p))(params)
    apart, _ = jax.jit(lambda p: forward(config, p, layers=unstack_layers(p)))(params)
    np.testing.assert_allclose(apart, scanned, rtol=1e-5, atol=1e-5)


def test_no_buffer_has_a_token_and_an_expert_axis_and_a_width():
    """Every array of value and gradient at 16 experts, of which each token sees two."""
    tokens, experts, hidden, inner = 1024, 16, 64, 32
    moe = MixtureOfExperts(experts, 2, inner, norm_topk_prob=True, router_aux_loss_coef=0.0)

    def loss(x, kernels, logits):
        return jnp.sum(run_experts(x, route(logits, moe), kernels) ** 2)

    shape = jax.ShapeDtypeStruct
    compiled = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        .lower(
            shape((tokens, hidden), jnp.float32),
            ExpertKernels(
                shape((experts, hidden, inner), jnp.float32),
                shape((experts, hidden, inner), jnp.float32),
                shape((experts, inner, hidden), jnp.float32),
            ),
            shape((tokens, experts), jnp.float32),
        )
        .compile()
    )
    found = re.findall(r"\b(?:f32|s32|pred)\[([\d,]+)\]", compiled.as_text())
    sizes = {math.prod(map(int, shape.split(","))) for shape in found}
    # One row per pair of token and chosen expert; all experts would be eight times as much.
    assert max(sizes) == tokens * moe.num_experts_per_tok * hidden
