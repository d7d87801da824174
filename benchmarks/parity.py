"""How far our logits and gradients are from transformers' (torch), float32, random weights.

Small models of every kind, and the `tiny` presets; each from its own `config.json`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.models.qwen3_reference import (
    CASES,
    case_tokens,
    seeded_params,
    torch_logits,
    torch_loss,
    torch_tensors,
)
from tw_jax.kernels import tree_attention
from tw_jax.models import PRESETS, Params, Qwen3Config, graphdef

MODELS: dict[str, Qwen3Config] = CASES | {
    "tiny": PRESETS["tiny"],
    "tiny-moe": PRESETS["tiny-moe"],
    "grouped_queries": dataclasses.replace(PRESETS["tiny"], num_key_value_heads=1),
}


def logits(config: Qwen3Config, params: Params, tokens: np.ndarray) -> jax.Array:
    """Our logits of causal rows, through the attention that training uses."""
    model = nnx.merge(graphdef(config), params)
    rows, row_len = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(row_len), (rows, row_len))
    visible_end = jnp.full((rows, row_len), row_len, jnp.int32)

    def attend(q, k, v, layer, carry):
        del layer
        return tree_attention(q, k, v, visible_end), carry

    hidden, _ = model.hidden_states(tokens, positions, attend)
    return model.logits(hidden)


def mean_nll(config: Qwen3Config, params: Params, tokens: np.ndarray) -> jax.Array:
    """Mean negative log-probability of every token but the first."""
    predicted = jax.nn.log_softmax(logits(config, params, tokens)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(predicted, tokens[:, 1:, None], axis=-1))


def gradient_error(config: Qwen3Config, params: Params, tokens: np.ndarray) -> float:
    """Largest difference of any gradient entry, relative to the largest of its tensor."""
    ours = jax.jit(jax.grad(lambda p: mean_nll(config, p, tokens)))(params)
    theirs = torch_loss(config, params, tokens).gradients
    ours = torch_tensors(config, jax.device_get(ours))
    assert set(ours) == set(theirs)
    return max(
        float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max())
        for name in theirs
    )


def compare(config: Qwen3Config) -> dict[str, float]:
    """Differences for one model."""
    params, tokens = seeded_params(config, seed=1), case_tokens(config)
    theirs = torch_logits(config, params, tokens)
    ours = jax.jit(lambda p: logits(config, p, tokens))(params)
    return {
        "max_abs_diff": float(np.abs(ours - theirs).max()),
        "max_abs_logit": float(np.abs(theirs).max()),
        "gradient_max_rel_diff": gradient_error(config, params, tokens),
    }


def run() -> dict[str, Any]:
    """Every model, and the largest differences over all."""
    models = {name: compare(config) for name, config in MODELS.items()}
    return {
        "max_abs_diff": max(model["max_abs_diff"] for model in models.values()),
        "gradient_max_rel_diff": max(model["gradient_max_rel_diff"] for model in models.values()),
        "models": models,
    }
