"""Applying gradients, and not applying bad ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tw_jax.train.optimizer import OptimizerConfig, make_optimizer
from tw_jax.train.state import apply_gradients, init_train_state

PARAMS = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(4, jnp.bfloat16)}
GRADS = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)
TX = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.1), 10)


@jax.jit
def step(state, grads):
    return apply_gradients(state, grads, TX)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def poisoned(value):
    return {**GRADS, "a": {"kernel": GRADS["a"]["kernel"].at[1, 2].set(value)}}


def test_a_good_gradient_is_applied():
    state = init_train_state(PARAMS, TX)
    updates, opt_state = TX.update(GRADS, state.opt_state, PARAMS, step=state.step)
    after, metrics = apply_gradients(state, GRADS, TX)
    assert bits(after.params) == bits(optax.apply_updates(PARAMS, updates))
    assert bits(after.opt_state) == bits(opt_state)
    assert int(after.step) == 1 and int(after.skipped_updates) == 0
    assert float(metrics["grad_norm"]) == pytest.approx(np.sqrt(10 * 0.25))
    assert float(metrics["update_skipped"]) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_a_bad_gradient_changes_nothing_but_the_counters(value):
    state, _ = step(init_train_state(PARAMS, TX), GRADS)
    after, metrics = step(state, poisoned(value))
    assert bits(after.params) == bits(state.params)
    assert bits(after.opt_state) == bits(state.opt_state)
    assert int(after.step) == 2 and int(after.skipped_updates) == 1
    assert not np.isfinite(metrics["grad_norm"])
    assert float(metrics["update_skipped"]) == 1


def test_the_schedule_stays_aligned_after_a_skip():
    sgd = make_optimizer(
        OptimizerConfig(learning_rate=1.0, warmup_steps=4, beta1=0.0, beta2=0.0, eps=1e-12), 10
    )
    state = init_train_state({"w": jnp.zeros((2, 2))}, sgd)
    moved = []
    for value in (1.0, np.nan, 1.0):
        before = state.params["w"]
        state, _ = apply_gradients(state, {"w": jnp.full((2, 2), value)}, sgd)
        moved.append(float((before - state.params["w"])[0, 0]))
    # Without moments an update is the learning rate: 1/5, skipped (2/5), then 3/5.
    assert moved == pytest.approx([0.2, 0.0, 0.6])


def test_types_and_structure_are_stable_under_donation():
    state = jax.jit(lambda p: init_train_state(p, TX))(PARAMS)
    donating = jax.jit(lambda s, g: apply_gradients(s, g, TX), donate_argnums=0)
    expected = state
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for value in (0.1, np.nan, 0.2):
        expected, _ = step(expected, poisoned(value))
    state = jax.tree.map(jnp.copy, state)
    for value in (0.1, np.nan, 0.2):
        state, metrics = donating(state, poisoned(value))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
        assert all(m.dtype == jnp.float32 and m.shape == () for m in metrics.values())
    assert bits(state) == bits(expected)


def test_plain_optax_optimizers_work_too():
    sgd = optax.sgd(0.5)
    state, _ = apply_gradients(init_train_state(PARAMS, sgd), GRADS, sgd)
    np.testing.assert_allclose(state.params["a"]["kernel"], PARAMS["a"]["kernel"] - 0.25)


def test_norm_of_half_precision_gradients_is_taken_in_float32():
    params = {"w": jnp.zeros((64, 64), jnp.float16)}
    sgd = optax.sgd(1.0)
    grads = {"w": jnp.full((64, 64), 100.0, jnp.float16)}  # squares overflow float16
    _, metrics = apply_gradients(init_train_state(params, sgd), grads, sgd)
    assert float(metrics["grad_norm"]) == pytest.approx(6400.0)
