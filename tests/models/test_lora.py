"""Adapters in the real model: their forward, their gradient, what is trained and what is not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.qwen3_reference import CASES, SMALL, case_tokens, seeded_params
from tests.models.test_remat import loss
from tw_jax.errors import UserError
from tw_jax.models import abstract_params, graphdef, unstack_layers
from tw_jax.models.lora import Adapter, AdapterConfig, bind_adapter, merged
from tw_jax.models.matrices import AdaptedMatrix, matmul

UNTIED, MIXTURE = CASES["untied"], CASES["moe"]
CONTROL = (3, 17, 60)


def adapter_on(config, **settings) -> Adapter:
    targets = ("attention",) if config.moe else ("attention", "mlp")
    block = 4 if config.moe else 16
    settings = {"rank": 4, "alpha": 6.0, "targets": targets, "block_size": block} | settings
    return bind_adapter(AdapterConfig(**settings), config, CONTROL)


def params_of(config):
    return jax.tree.map(jnp.asarray, seeded_params(config))


def parts(adapter, *, moved: bool = True):
    """What is trained, away from its start if `moved`, and the base."""
    params = params_of(adapter.model)
    trained = adapter.init(params, 0)
    if moved:
        rng = np.random.default_rng(1)
        trained = jax.tree.map(
            lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), trained
        )
    return trained, adapter.freeze(params)


@functools.partial(jax.jit, static_argnums=(0, 2))
def logits(config, params, unroll: bool = False):
    tokens = jnp.asarray(case_tokens(config, row_len=8)).at[0, :3].set(jnp.array(CONTROL))
    positions = jnp.broadcast_to(jnp.arange(8), tokens.shape)

    def causal(q, k, v, layer, carry):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True), carry

    model = nnx.merge(graphdef(config), params)
    layers = unstack_layers(params) if unroll else None
    hidden, _ = model.hidden_states(tokens, positions, causal, layers=layers)
    return model.logits(hidden)


def size(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# --- the forward pass -----------------------------------------------------------------------------


# Ties, tables and bases in all their values, though not in all their combinations.
COMBINATIONS = pytest.mark.parametrize(
    ("config", "embeddings", "base"),
    [
        (SMALL, "control", "same"),
        (UNTIED, "control", "nf4"),
        pytest.param(SMALL, "all", "int8", marks=pytest.mark.slow),
        pytest.param(UNTIED, "all", "same", marks=pytest.mark.slow),
        (MIXTURE, "frozen", "int8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)


@pytest.mark.parametrize(("config", "embeddings"), [(SMALL, "all"), (UNTIED, "control")])
def test_a_fresh_adapter_changes_no_bit(config, embeddings):
    adapter = adapter_on(config, embeddings=embeddings)
    trained, base = parts(adapter, moved=False)
    np.testing.assert_array_equal(
        logits(config, adapter.assemble(trained, base)), logits(config, params_of(config))
    )


@COMBINATIONS
def test_adapted_and_merged_compute_the_same(config, embeddings, base):
    adapter = adapter_on(config, base=base, embeddings=embeddings)
    trained, frozen = parts(adapter)
    assembled = adapter.assemble(trained, frozen)
    whole = merged(assembled)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), whole)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))
    found, expected = logits(config, assembled), logits(config, whole)
    assert np.abs(expected - logits(config, params_of(config))).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    if config is SMALL:  # as the rollout engine runs it
        unrolled = logits(config, assembled, True)
        np.testing.assert_allclose(unrolled, found, rtol=1e-5, atol=1e-5 * np.abs(found).max())


def test_merging_is_the_formula():
    adapter = adapter_on(UNTIED)
    trained, frozen = parts(adapter)
    params = params_of(UNTIED)
    whole = merged(adapter.assemble(trained, frozen))
    for parent, name in (("self_attn", "o_proj"), ("mlp", "gate_proj")):
        pair = jax.tree.map(np.asarray, trained["layers"][parent][name])
        expected = np.array(params["layers"][parent][name]["kernel"])
        for layer in range(UNTIED.num_hidden_layers):
            expected[layer] += 6.0 / 4 * pair["lora_a"][layer] @ pair["lora_b"][layer]
        np.testing.assert_allclose(
            whole["layers"][parent][name]["kernel"], expected, rtol=1e-5, atol=1e-6
        )
    for table, rows in (("embed_tokens", "embedding"), ("lm_head", "kernel")):
        turn = (lambda x: x) if rows == "embedding" else np.transpose
        expected = np.array(turn(params[table][rows]))
        expected[list(CONTROL)] += trained[table]["control_rows"]
        np.testing.assert_allclose(turn(whole[table][rows]), expected, rtol=1e-6)
    assert merged(params) == params  # ordinary ones stay what they are


def test_no_memory_policy_changes_a_gradient():
    adapter = adapter_on(SMALL, base="nf4")
    trained, base = parts(adapter)

    @jax.jit
    def gradients(trained):
        def of(**options):
            return jax.grad(lambda t: loss(SMALL, adapter.assemble(t, base), **options))(trained)

        policies = ("none", "dots", "block", "full", "offload")
        return [of(unroll=True), *(of(remat=remat) for remat in policies)]

    expected, *others = gradients(trained)
    for actual in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, expected
        )


# --- the gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [SMALL, pytest.param(UNTIED, marks=pytest.mark.slow)], ids=["tied", "untied"]
)
def test_gradients_are_projections_of_the_full_ones(config):
    """With W' = W + s A B: dA = s dW' B^T, dB = s A^T dW'; control rows: those of the tables."""
    adapter = adapter_on(config)
    trained, base = parts(adapter)
    found = jax.jit(jax.grad(lambda t: loss(config, adapter.assemble(t, base))))(trained)
    whole = merged(adapter.assemble(trained, base))
    full = jax.jit(jax.grad(lambda p: loss(config, p)))(whole)
    for parent, projections in found["layers"].items():
        for name, pair in projections.items():
            own = trained["layers"][parent][name]
            d_kernel = np.asarray(full["layers"][parent][name]["kernel"], np.float64)
            a, b = (np.asarray(own[half], np.float64) for half in ("lora_a", "lora_b"))
            d_a = 1.5 * np.einsum("lio,lro->lir", d_kernel, b)
            d_b = 1.5 * np.einsum("lir,lio->lro", a, d_kernel)
            for actual, expected in ((pair["lora_a"], d_a), (pair["lora_b"], d_b)):
                scale = np.abs(expected).max()
                np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5 * scale)
    for table in ("embed_tokens",) if config.tie_word_embeddings else ("embed_tokens", "lm_head"):
        (leaf,) = full[table].values()
        rows = np.asarray(leaf if table == "embed_tokens" else leaf.T)[list(CONTROL)]
        actual = found[table]["control_rows"]
        np.testing.assert_allclose(actual, rows, rtol=1e-4, atol=2e-5 * np.abs(rows).max())


# --- what is trained ------------------------------------------------------------------------------


def test_the_trained_tree():
    adapter = adapter_on(UNTIED, targets=("q_proj", "down_proj"))
    trained, _ = parts(adapter, moved=False)
    assert jax.tree.map(lambda x: x.shape, trained) == {
        "layers": {
            "self_attn": {"q_proj": {"lora_a": (2, 48, 4), "lora_b": (2, 4, 64)}},
            "mlp": {"down_proj": {"lora_a": (2, 80, 4), "lora_b": (2, 4, 48)}},
        },
        "embed_tokens": {"control_rows": (3, 48)},
        "lm_head": {"control_rows": (3, 48)},
    }
    a = trained["layers"]["mlp"]["down_proj"]["lora_a"]
    assert float(a.std()) == pytest.approx(80**-0.5, rel=0.1)
    assert not np.any(trained["layers"]["mlp"]["down_proj"]["lora_b"])
    # Every matrix has draws of its own, and another seed has others.
    other = adapter.init(params_of(UNTIED), 1)["layers"]["mlp"]["down_proj"]["lora_a"]
    assert not np.any(a == other) and not np.any(a[0] == a[1])


@COMBINATIONS
def test_every_array_names_its_axes(config, embeddings, base):
    adapter = adapter_on(config, embeddings=embeddings, base=base)
    for axes, shapes in (
        (adapter.axes(), adapter.abstract()),
        (adapter.base_axes(), adapter.abstract_base()),
    ):
        lengths = jax.tree.map(lambda leaf, names: len(names) - len(leaf.shape), shapes, axes)
        assert not any(jax.tree.leaves(lengths))
    trained, frozen = parts(adapter, moved=False)
    for made, abstract in ((trained, adapter.abstract()), (frozen, adapter.abstract_base())):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
            lambda x: (x.shape, x.dtype), abstract
        )


def test_bytes_of_a_quantised_base():
    config = dataclasses.replace(SMALL, hidden_size=64, intermediate_size=128)
    params = seeded_params(config)
    kernels = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["layers"])
        if path[-1].key == "kernel"
    ]
    norms = size(params["layers"]) - size(kernels)
    for base, most in (("int8", 1.1), ("nf4", 0.6)):
        adapter = adapter_on(config, base=base, block_size=64)
        frozen = jax.tree.map(jnp.asarray, adapter.freeze(jax.tree.map(jnp.asarray, params)))
        assert size(frozen["layers"]) - norms <= most * sum(leaf.size for leaf in kernels)
        # Norms, embedding and head stay as they are.
        np.testing.assert_array_equal(
            frozen["embed_tokens"]["embedding"], params["embed_tokens"]["embedding"]
        )
        scale = params["layers"]["self_attn"]["q_norm"]["scale"]
        np.testing.assert_array_equal(frozen["layers"]["self_attn"]["q_norm"]["scale"], scale)


def test_the_router_of_a_mixture_is_not_quantised():
    _, frozen = parts(adapter_on(MIXTURE, base="nf4"))
    mlp = frozen["layers"]["mlp"]
    assert isinstance(mlp["router"]["kernel"], jax.Array)
    assert mlp["experts"]["up_proj"]["kernel"].codes.dtype == jnp.uint8


def test_the_rows_of_an_adapted_table():
    rng = np.random.default_rng(0)
    base, a, b = (rng.standard_normal(s, np.float32) for s in ((9, 4), (9, 2), (2, 4)))
    table = AdaptedMatrix(*map(jnp.asarray, (base, a, b)), 0.5)
    index = np.array([[0, 8], [3, 3]])
    np.testing.assert_allclose(
        table.rows(index, lambda base, index: base[index]), (base + 0.5 * a @ b)[index], rtol=1e-5
    )
    x = rng.standard_normal((3, 4), np.float32)
    np.testing.assert_allclose(matmul(x, table.T), x @ (base + 0.5 * a @ b).T, rtol=1e-4, atol=1e-5)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0: must be at least 1"),
        ({"alpha": 0.0}, "alpha=0.0: must be positive"),
        ({"targets": ("attention", "q_prj")}, "targets: 'q_prj' given, choose from attention, mlp"),
        ({"targets": ()}, "targets: none given"),
        ({"block_size": 33}, "block_size=33: must be even"),
    ],
)
def test_configurations_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**settings)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (SMALL, {"rank": 33}, "adapter.rank=33 exceeds 32, the smaller side of k_proj"),
        (SMALL, {"base": "nf4", "block_size": 64}, "block_size=64 does not divide the 80 rows of"),
        (MIXTURE, {"targets": ("attention", "up_proj")}, "experts of a mixture cannot be adapted"),
    ],
)
def test_adapters_that_do_not_fit_the_model(config, settings, message):
    with pytest.raises(UserError, match=message):
        adapter_on(config, **settings)
