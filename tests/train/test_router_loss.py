"""The router's load-balancing loss in the training loss: transformers' value, off by default."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.models.qwen3_reference import (
    CASES,
    case_tokens,
    seeded_params,
    torch_loss,
    torch_tensors,
)
from tw_jax.data.packed_batch import PackedBatch
from tw_jax.models import graphdef
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.policy_sum import policy_sum
from tw_jax.train.scoring import score_tokens
from tw_jax.train.update import MemoryConfig, nll_sum

OFF = CASES["moe"]
ON = dataclasses.replace(OFF, moe=dataclasses.replace(OFF.moe, router_aux_loss_coef=0.5))
MEMORY = MemoryConfig(remat="block", head_chunk=16)
TEXT = (24, 17)  # tokens of the two rows; the rest is padding


def packed(seed: int = 0) -> tuple[PackedBatch, np.ndarray]:
    """Two causal rows, the second one padded, and the mask of real tokens."""
    tokens = case_tokens(OFF)
    index = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    length = np.array(TEXT, np.int32)[:, None]
    real = index < length
    weight = (real & (index > 0)).astype(np.float32)
    nothing_hidden = np.zeros((0, *tokens.shape), np.int32)
    rng = np.random.default_rng(seed)
    batch = PackedBatch(
        tokens=np.where(real, tokens, seed),
        positions=np.where(real, index, 0),
        parent=np.where(real, np.maximum(index - 1, 0), index),
        visible_end=np.where(real, length, index + 1),
        hidden_start=nothing_hidden,
        hidden_end=nothing_hidden,
        loss_weight=weight,
        advantage=rng.standard_normal(tokens.shape).astype(np.float32),
        sampler_logprob=-np.ones(tokens.shape, np.float32),
    )
    return batch, real.astype(np.float32)


def test_sft_loss_and_gradient_are_those_of_transformers():
    pytest.importorskip("torch")
    params = seeded_params(ON)
    batch, real = packed()
    loss = nll_sum(graphdef(ON), MEMORY)
    (total, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    weight = sums["weight"]
    expected = torch_loss(ON, params, case_tokens(ON), aux_weight=0.5, mask=real)
    assert total / weight == pytest.approx(expected.nll + 0.5 * expected.aux, rel=1e-5)
    assert sums["loss"] == total
    ours = torch_tensors(ON, jax.device_get(gradient))
    for name, theirs in expected.gradients.items():
        assert np.abs(ours[name] / weight - theirs).max() <= 1e-4 * np.abs(theirs).max(), name


@jax.jit
def score_on(params, batch):
    return score_tokens(graphdef(ON), params, batch, head_chunk=4096, remat="none")


def test_padding_does_not_count():
    params = seeded_params(ON)
    one, other = (score_on(params, packed(seed)[0]) for seed in (0, 5))
    assert one.router_loss == pytest.approx(float(other.router_loss), rel=1e-6)
    assert one.router_loss >= 0.5 * OFF.moe.num_experts_per_tok * 0.9


def test_it_is_added_to_the_policy_loss_too():
    params, (batch, _) = seeded_params(ON), packed()

    def total(config):
        loss = policy_sum(graphdef(config), ObjectiveConfig(), MEMORY)
        return jax.jit(loss)(params, batch)

    (off, sums), (on, _) = total(OFF), total(ON)
    router = score_on(params, batch).router_loss
    assert on - off == pytest.approx(float(sums["weight"] * router), rel=1e-4)


def test_without_a_coefficient_nothing_is_computed():
    params, (batch, _) = seeded_params(OFF), packed()

    def program(config):
        loss = nll_sum(graphdef(config), MEMORY)
        return str(jax.make_jaxpr(loss)(params, batch))

    counts = f"f32[{OFF.moe.num_experts}]"
    assert counts not in program(OFF)
    assert counts in program(ON)
    assert score_tokens(graphdef(OFF), params, batch, head_chunk=64, remat="none").router_loss == 0
