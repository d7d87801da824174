"""Names of axes: every parameter's, and those of the activations that the caller may place."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from tw_jax.models import PRESETS, abstract_params, graphdef, init_params, param_axes, preset

# No two widths alike, so that a wrong name cannot fit by chance.
DENSE = preset(
    "tiny",
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    tie_word_embeddings=False,
)
MOE = dataclasses.replace(
    DENSE, moe=dataclasses.replace(PRESETS["tiny-moe"].moe, num_experts=5, moe_intermediate_size=12)
)


def sizes(config):
    return {
        "layers": config.num_hidden_layers,
        "embed": config.hidden_size,
        "heads": config.num_attention_heads * config.head_dim,
        "kv_heads": config.num_key_value_heads * config.head_dim,
        "head_dim": config.head_dim,
        "mlp": config.moe.moe_intermediate_size if config.moe else config.intermediate_size,
        "vocab": config.vocab_size,
        **({"experts": config.moe.num_experts} if config.moe else {}),
    }


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_every_parameter_names_its_axes(config):
    axes, shapes = param_axes(config), abstract_params(config)
    size, seen = sizes(config), set()

    def check(path, names, shape):
        # A norm is as wide as what it norms.
        norm = size["head_dim" if "self_attn" in jax.tree_util.keystr(path) else "embed"]
        assert tuple(norm if name == "norm" else size[name] for name in names) == shape.shape
        seen.update(names)

    jax.tree_util.tree_map_with_path(
        check, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    assert seen == set(size) - {"head_dim"} | {"norm"}


def test_abstract_params_are_those_that_init_makes():
    for config in (DENSE, MOE):
        made = jax.tree.map(lambda x: (x.shape, x.dtype), init_params(config, 0))
        assert made == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))


def test_fixed_names_and_shapes_of_experts():
    mlp = jax.tree.map(lambda x: x.shape, abstract_params(MOE))["layers"]["mlp"]
    assert mlp == {
        "router": {"kernel": (3, 48, 5)},
        "experts": {
            "gate_proj": {"kernel": (3, 5, 48, 12)},
            "up_proj": {"kernel": (3, 5, 48, 12)},
            "down_proj": {"kernel": (3, 5, 12, 48)},
        },
    }


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("unroll", [False, True])
def test_activations_are_offered_for_placement(config, unroll):
    offered = []

    def constrain(x, axes):
        offered.append((axes, x.shape))
        return x * 1.0

    def attend(q, k, v, layer, carry):
        del layer
        return jax.nn.dot_product_attention(q, k, v, is_causal=True), carry

    tokens = np.zeros((2, 7), np.int32)
    positions = np.broadcast_to(np.arange(7), tokens.shape)

    def forward(params, **options):
        model = nnx.merge(graphdef(config), params)
        return model.hidden_states(tokens, positions, attend, unroll=unroll, **options)[0]

    params = init_params(config, 0)
    placed = jax.jit(lambda p: forward(p, constrain=constrain))(params)
    np.testing.assert_array_equal(placed, jax.jit(forward)(params))

    stream = (("batch", "residual_length", "embed"), (2, 7, 48))
    layer = [
        (("batch", "length", "heads", "head_dim"), (2, 7, 4, 10)),
        (("batch", "length", "kv_heads", "head_dim"), (2, 7, 2, 10)),
        (("batch", "length", "kv_heads", "head_dim"), (2, 7, 2, 10)),
        *([] if config.moe else [(("batch", "length", "mlp"), (2, 7, 80))]),
        stream,
    ]
    assert offered == [stream] + layer * (3 if unroll else 1)
