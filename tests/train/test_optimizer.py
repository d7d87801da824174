"""AdamW, its schedule and its mask, against numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.config import load_config, to_yaml
from tw_jax.errors import UserError
from tw_jax.train.optimizer import (
    OptimizerConfig,
    decayed,
    learning_rate_schedule,
    make_optimizer,
)


def test_cosine_with_warmup():
    config = OptimizerConfig(learning_rate=2.0, final_learning_rate_fraction=0.1, warmup_steps=3)
    schedule = learning_rate_schedule(config, total_steps=11)
    # Warm-up: a quarter, a half, three quarters; the peak; half way down the cosine at step 7:
    # 2 * (0.1 + 0.9 / 2) = 1.1; the floor at step 11 and after it.
    expected = {0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0, 7: 1.1, 11: 0.2, 12: 0.2, 1000: 0.2}
    # A quarter of the way: 2 * (0.1 + 0.9 * (1 + sqrt(1/2)) / 2).
    expected[5] = 2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-6), step


def test_constant_with_warmup():
    config = OptimizerConfig(learning_rate=0.3, warmup_steps=1, schedule="constant")
    schedule = learning_rate_schedule(config, total_steps=5)
    assert [float(schedule(t)) for t in range(6)] == pytest.approx([0.15, *[0.3] * 5])


def test_schedule_takes_traced_steps():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=4), 10)
    traced = jax.jit(schedule)(jnp.int32(2))
    assert traced.dtype == jnp.float32
    assert float(traced) == pytest.approx(0.6)


@given(
    warmup=st.integers(0, 20),
    extra=st.integers(1, 50),
    fraction=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "constant"]),
)
def test_rates_rise_to_the_peak_and_never_pass_it(warmup, extra, fraction, schedule):
    config = OptimizerConfig(
        learning_rate=1e-3,
        final_learning_rate_fraction=fraction,
        warmup_steps=warmup,
        schedule=schedule,
    )
    steps = np.arange(80)  # of one length, so that little is compiled
    rates = np.asarray(learning_rate_schedule(config, warmup + extra)(steps))[: warmup + extra]
    assert np.all(rates[: warmup + 1] > 0) and np.all(np.diff(rates[: warmup + 1]) > 0)
    assert rates.max() == rates[warmup] == np.float32(1e-3)
    assert np.all(np.diff(rates[warmup:]) <= 0)
    assert np.all(rates[warmup:] >= np.float32(1e-3 * fraction) * (1 - 1e-6))


def test_warmup_must_fit_into_the_run():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    with pytest.raises(UserError, match="warmup_steps=10 must be smaller than .* 10: shorten"):
        make_optimizer(config, 10)


@pytest.mark.parametrize(
    "field, value",
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("final_learning_rate_fraction", 1.5),
        ("warmup_steps", -1),
        ("schedule", "linear"),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("clip_norm", 0.0),
    ],
)
def test_values_that_make_no_sense_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        OptimizerConfig(**{"learning_rate": 1.0, field: value})


def test_configuration_survives_yaml(tmp_path):
    config = OptimizerConfig(learning_rate=1e-5, clip_norm=float("inf"), schedule="constant")
    path = tmp_path / "optimizer.yaml"
    path.write_text(to_yaml(config))
    assert load_config(OptimizerConfig, path) == config


def first_update(tx, grads, params, step=0):
    update = jax.jit(lambda g, p, t: tx.update(g, tx.init(p), p, step=t)[0])
    return update(grads, params, jnp.int32(step))


PARAMS = {
    "embed_tokens": {"embedding": jnp.full((5, 4), 2.0)},
    "layers": {
        "mlp": {"kernel": jnp.full((3, 4, 6), 2.0)},
        "q_norm": {"scale": jnp.full((3, 4), 2.0)},
    },
    "norm": {"scale": jnp.full(4, 2.0)},
    "lm_head": {"kernel": jnp.full((4, 5), 2.0)},
}
IS_MATRIX = {
    "embed_tokens": {"embedding": True},
    "layers": {"mlp": {"kernel": True}, "q_norm": {"scale": False}},
    "norm": {"scale": False},
    "lm_head": {"kernel": True},
}


def test_matrices_are_told_from_stacked_vectors():
    assert decayed(PARAMS) == IS_MATRIX


def test_only_matrices_decay():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant")
    tx = make_optimizer(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates = first_update(tx, zeros, PARAMS)
    # No gradient, so all that moves is the decay: 0.1 * 0.5 * 2.0.
    expected = jax.tree.map(
        lambda p, matrix: jnp.full_like(p, -0.1 if matrix else 0.0), PARAMS, IS_MATRIX
    )
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-6), updates, expected)


def test_two_updates_by_hand():
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="constant",
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    tx = make_optimizer(config, 10)
    w = np.array([[3.0, -1.0]])
    params = {"w": jnp.asarray(w, jnp.float32)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    mean, square = np.zeros_like(w), np.zeros_like(w)
    for t, grad in enumerate([np.array([[3.0, 4.0]]), np.array([[0.3, -0.4]])], start=1):
        clipped = grad * min(1.0, 1.0 / np.linalg.norm(grad))  # norms 5 and 0.5
        mean = 0.9 * mean + 0.1 * clipped
        square = 0.99 * square + 0.01 * clipped**2
        step = (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.99**t)) + 1e-8)
        w = w - 0.1 * (step + 0.01 * w)
        grads = {"w": jnp.asarray(grad, jnp.float32)}
        updates, state = update(grads, state, params, step=jnp.int32(t - 1))
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], w, rtol=1e-6)


def test_infinite_clip_norm_does_not_clip():
    free = make_optimizer(OptimizerConfig(learning_rate=0.1, eps=1.0, clip_norm=float("inf")), 10)
    tight = make_optimizer(OptimizerConfig(learning_rate=0.1, eps=1.0, clip_norm=1.0), 10)
    params = {"w": jnp.zeros((2, 2))}
    grads = {"w": jnp.full((2, 2), 100.0)}

    def size(tx):
        return float(np.abs(first_update(tx, grads, params)["w"]).max())

    # Adam's first update is g / (|g| + eps): 100/101 unclipped, 0.5/1.5 clipped to norm 1.
    assert size(free) == pytest.approx(0.1 * 100 / 101)
    assert size(tight) == pytest.approx(0.1 * 0.5 / 1.5)


def test_rate_follows_the_given_step_not_the_count_of_updates():
    tx = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_steps=3), 10)
    params = {"w": jnp.ones((2, 2))}
    first = first_update(tx, params, params, step=0)
    later = first_update(tx, params, params, step=3)
    np.testing.assert_allclose(later["w"], 4 * first["w"], rtol=1e-6)
