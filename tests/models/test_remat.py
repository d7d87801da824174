"""Memory policies change no gradient, and are refused where they cannot work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.qwen3_reference import CASES, SMALL, case_tokens, seeded_params
from tw_jax.errors import UserError
from tw_jax.kernels import tree_attention
from tw_jax.models import graphdef, remat
from tw_jax.models.remat import rematerialised

RECOMPUTING = ("dots", "block", "full", "offload")
TOKENS = case_tokens(SMALL, row_len=8)


def loss(config, params, **options):
    """Something of all logits, through the attention that names its residuals."""
    model = nnx.merge(graphdef(config), params)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    visible_end = jnp.full(TOKENS.shape, TOKENS.shape[1], jnp.int32)

    def attend(q, k, v, layer, carry):
        del layer
        return tree_attention(q, k, v, visible_end), carry

    hidden, _ = model.hidden_states(TOKENS, positions, attend, **options)
    return jnp.mean(model.logits(hidden) ** 2)


def check_gradients(config, **options):
    @jax.jit
    def gradients(params):
        return [
            jax.grad(lambda p, r=r: loss(config, p, remat=r, **options))(params)
            for r in ("none", *RECOMPUTING)
        ]

    expected, *others = gradients(seeded_params(config))
    for actual in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, expected
        )


def test_no_policy_changes_a_gradient():
    check_gradients(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moe", "untied"])
@pytest.mark.parametrize("unroll", [False, True])
def test_no_policy_changes_a_gradient_of_other_models(name, unroll):
    check_gradients(CASES[name], unroll=unroll)


def kept_layer_inputs(policy):
    """Types of what the forward scan hands to the backward one in the stream's shape."""
    traced = jax.make_jaxpr(jax.grad(lambda p: loss(SMALL, p, remat=policy)))(seeded_params(SMALL))
    shape = (SMALL.num_hidden_layers, *TOKENS.shape, SMALL.hidden_size)
    forward = next(e for e in traced.jaxpr.eqns if e.primitive.name == "scan")
    return [str(v.aval) for v in forward.outvars if v.aval.shape == shape]


def test_the_layers_inputs_and_nothing_else_go_to_the_hosts_memory():
    on_device, on_host = kept_layer_inputs("full"), kept_layer_inputs("offload")
    assert len(on_device) == len(on_host) == 1
    assert "<host>" in on_host[0] and "<host>" not in on_device[0]


def test_offload_needs_host_memory(monkeypatch):
    monkeypatch.setattr(remat, "_HOST", "a_memory_that_no_device_has")
    with pytest.raises(UserError, match="memory.remat=offload.*choose full"):
        jax.make_jaxpr(lambda p: loss(SMALL, p, remat="offload"))(seeded_params(SMALL))


def test_an_unknown_policy_names_the_known_ones():
    with pytest.raises(UserError, match="remat='some': choose one of none, dots, block, full"):
        rematerialised(lambda x: x, "some", in_scan=True)
