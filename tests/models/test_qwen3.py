import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.qwen3_reference import CASES, SMALL, case_tokens, seeded_params, torch_logits
from tests.models.write_golden_logits import GOLDEN, weight_sum
from tw_jax.models import (
    PRESETS,
    MixtureOfExperts,
    Qwen3Config,
    RopeScaling,
    check_positions,
    graphdef,
    head_matrix,
    init_params,
    preset,
    unstack_layers,
)


def causal(q, k, v, layer, carry):
    """Plain causal attention that counts its calls."""
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return out, carry if carry is None else carry + layer


def forward(config, params, tokens, **options):
    """Logits of causal rows."""
    model = nnx.merge(graphdef(config), params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model.hidden_states(tokens, positions, causal, **options)
    return model.logits(hidden)


@pytest.mark.parametrize("name", CASES)
def test_logits_match_the_golden_file(name):
    golden = np.load(GOLDEN)
    config = Qwen3Config.from_dict(json.loads(str(golden[f"{name}/config"])))
    assert config == CASES[name], "run tests/models/write_golden_logits.py again"
    params = seeded_params(config)
    assert weight_sum(params) == pytest.approx(float(golden[f"{name}/weight_sum"]), rel=1e-9)
    logits = jax.jit(lambda p, t: forward(config, p, t))(params, golden[f"{name}/tokens"])
    assert np.abs(logits - golden[f"{name}/logits"]).max() <= 2e-5


@pytest.mark.parametrize("name", CASES)
def test_logits_match_torch(name):
    pytest.importorskip("torch", reason="the reference model needs torch; the golden file does not")
    config = CASES[name]
    params, tokens = seeded_params(config, seed=1), case_tokens(config)
    logits = jax.jit(lambda p, t: forward(config, p, t))(params, tokens)
    assert np.abs(logits - torch_logits(config, params, tokens)).max() <= 2e-5


def test_scan_unroll_and_separate_layers_agree():
    params, tokens = seeded_params(SMALL), case_tokens(SMALL)

    @jax.jit
    def every_way(params):
        layers, head = unstack_layers(params), head_matrix(params)
        model = nnx.merge(graphdef(SMALL), params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        decoding, _ = model.hidden_states(tokens, positions, causal, layers=layers)
        return (
            forward(SMALL, params, tokens),
            forward(SMALL, params, tokens, unroll=True),
            model.logits(decoding, head),
        )

    scanned, *others = every_way(params)
    for other in others:
        np.testing.assert_allclose(other, scanned, rtol=1e-5, atol=1e-5)


def test_the_carry_passes_through_every_layer():
    params, tokens = seeded_params(SMALL), case_tokens(SMALL)
    start = jnp.zeros((), jnp.int32)

    def last_carry(params, unroll):
        model = nnx.merge(graphdef(SMALL), params)
        return model.hidden_states(tokens, tokens, causal, start, unroll=unroll)[1]

    for unroll in (False, True):
        carry = jax.jit(last_carry, static_argnums=1)(params, unroll)
        assert carry == sum(range(SMALL.num_hidden_layers))


def test_params_are_a_pure_dict_of_stacked_arrays():
    params = init_params(SMALL, seed=3)
    shapes = jax.tree.map(np.shape, params)
    assert shapes == jax.tree.map(np.shape, seeded_params(SMALL))
    assert isinstance(params["layers"]["mlp"]["up_proj"]["kernel"], jax.Array)
    again, other = init_params(SMALL, seed=3), init_params(SMALL, seed=4)
    kernel = params["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, again["layers"]["self_attn"]["q_proj"]["kernel"])
    assert not np.array_equal(kernel, other["layers"]["self_attn"]["q_proj"]["kernel"])
    assert not np.array_equal(kernel[0], kernel[1]), "each layer draws its own weights"
    np.testing.assert_allclose(kernel.std(), SMALL.initializer_range, rtol=0.1)


def test_bfloat16_computes_close_to_float32():
    config = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    params, tokens = seeded_params(SMALL), case_tokens(SMALL)
    model = nnx.merge(graphdef(config), params)
    hidden, _ = jax.eval_shape(lambda: model.hidden_states(tokens, tokens, causal))
    assert hidden.dtype == jnp.bfloat16
    logits, exact = (jax.jit(lambda p, c=c: forward(c, p, tokens))(params) for c in (config, SMALL))
    assert logits.dtype == jnp.float32
    assert np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


# Every field of the config, changed on its own, and what must then be different.
CHANGES = {
    "vocab_size": (62, "shapes"),
    "hidden_size": (40, "shapes"),
    "intermediate_size": (72, "shapes"),
    "num_hidden_layers": (3, "shapes"),
    "num_attention_heads": (2, "shapes"),
    "num_key_value_heads": (1, "shapes"),
    "head_dim": (8, "shapes"),
    "tie_word_embeddings": (False, "shapes"),
    "param_dtype": ("bfloat16", "shapes"),
    "initializer_range": (0.5, "initial values"),
    "rope_theta": (1e6, "logits"),
    "rope_scaling": (RopeScaling("linear", 2.0, *[None] * 7), "logits"),
    "moe": (MixtureOfExperts(4, 2, 24, True, router_aux_loss_coef=0.0), "shapes"),
    "rms_norm_eps": (0.1, "logits"),
    "compute_dtype": ("bfloat16", "logits"),
    "max_position_embeddings": (8, "accepted positions"),
}


def consequence(config, what):
    """The part of the model's behaviour that a field should change."""
    if what == "shapes":
        abstract = jax.eval_shape(lambda: init_params(config, 0))
        return str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract))
    if what == "initial values":
        return float(jnp.abs(init_params(config, 0)["embed_tokens"]["embedding"]).sum())
    if what == "logits":
        params, tokens = seeded_params(SMALL), case_tokens(SMALL, rows=1)
        return jax.jit(lambda p: forward(config, p, tokens))(params).tolist()
    try:
        check_positions(config, 24)
    except ValueError:
        return "refused"
    return "accepted"


def test_every_field_is_listed():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(Qwen3Config)}


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_is_consumed(field):
    value, what = CHANGES[field]
    changed = dataclasses.replace(SMALL, **{field: value})
    assert consequence(changed, what) != consequence(SMALL, what)


def test_positions_out_of_range_are_refused():
    config = dataclasses.replace(SMALL, max_position_embeddings=24)
    check_positions(config, 24)
    check_positions(config, np.arange(24))
    for positions in (25, np.array([[3, 24]]), np.array([-1])):
        with pytest.raises(ValueError, match="model's range 0..23"):
            check_positions(config, positions)
    model = nnx.merge(graphdef(config), seeded_params(config))
    tokens = case_tokens(config)
    with pytest.raises(ValueError, match="model's range"):
        model.hidden_states(tokens, np.full_like(tokens, 24), causal)


def test_bad_configs_name_the_field():
    with pytest.raises(ValueError, match="num_attention_heads=3 is not a multiple"):
        preset("tiny", num_attention_heads=3)
    with pytest.raises(ValueError, match="head_dim=7"):
        preset("tiny", head_dim=7)
    with pytest.raises(ValueError, match="compute_dtype='int8': choose one of"):
        preset("tiny", compute_dtype="int8")
    with pytest.raises(ValueError, match="rope_theta=0"):
        preset("tiny", rope_theta=0)
    with pytest.raises(ValueError, match="choose one of tiny, tiny-long, tiny-moe, qwen3-0.6b"):
        preset("qwen3-9b")
    with pytest.raises(ValueError, match="no model field depth"):
        preset("tiny", depth=2)


def test_presets_have_the_published_number_of_parameters():
    """Billions of parameters, a tied head counted once, as the model cards say."""
    published = {"0.6b": 0.596, "1.7b": 1.72, "4b": 4.02, "8b": 8.19, "14b": 14.77, "32b": 32.76}
    assert {"tiny", "tiny-long", "tiny-moe", *(f"qwen3-{size}" for size in published)} <= set(
        PRESETS
    )
    for size, billions in published.items():
        abstract = jax.eval_shape(lambda size=size: init_params(PRESETS[f"qwen3-{size}"], 0))
        count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
        assert count / 1e9 == pytest.approx(billions, rel=2e-3)
