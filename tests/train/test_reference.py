"""References that move: what they are after each step, and in the state of a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tw_jax.train.reference import ReferenceConfig, next_reference
from tw_jax.train.state import apply_gradients, init_train_state


def walk(config, steps):
    """The references after each step, with parameters 1, 2, 3, ..."""
    reference = None if not config.moves else {"w": jnp.zeros(2)}
    seen = []
    for step in range(1, steps + 1):
        params = {"w": jnp.full(2, step, jnp.float32)}
        reference = next_reference(config, reference, params, step)
        seen.append(None if reference is None else float(reference["w"][0]))
    return seen


def test_frozen_stays_what_it_was():
    assert walk(ReferenceConfig(), 3) == [None] * 3


def test_copies_at_multiples():
    assert walk(ReferenceConfig("copy", every_steps=2), 5) == [0, 2, 2, 4, 4]


def test_average():
    assert walk(ReferenceConfig("average", decay=0.75), 3) == [0.25, 0.6875, 1.265625]


def test_a_small_step_is_not_lost_in_bfloat16_arithmetic():
    config = ReferenceConfig("average", decay=0.5)
    old, new = ({"w": jnp.asarray([x], jnp.bfloat16)} for x in (1.0, 1.0078125))
    both = next_reference(config, old, {"w": new["w"] + jnp.bfloat16(0.0078125)}, 1)
    assert both["w"].dtype == jnp.bfloat16
    assert float(both["w"][0]) == 1.0078125


def test_a_copy_outlives_donated_parameters():
    params = {"w": jnp.ones(3)}
    reference = next_reference(
        ReferenceConfig("copy", every_steps=1), {"w": jnp.zeros(3)}, params, 1
    )
    jax.jit(lambda p: jax.tree.map(jnp.negative, p), donate_argnums=0)(params)
    np.testing.assert_array_equal(reference["w"], 1)


def test_an_update_hands_the_reference_on():
    optimizer = optax.sgd(0.1)
    state = init_train_state({"w": jnp.ones(2)}, optimizer)
    assert state.reference is None
    after, _ = apply_gradients(state, {"w": jnp.ones(2)}, optimizer)
    assert after.reference is None
    held = dataclasses.replace(state, reference={"w": jnp.full(2, 7.0)})
    after, _ = apply_gradients(held, {"w": jnp.ones(2)}, optimizer)
    np.testing.assert_array_equal(after.reference["w"], 7)
    assert not np.array_equal(after.params["w"], state.params["w"])


def test_settings():
    with pytest.raises(ValueError, match="decay"):
        ReferenceConfig("average", decay=1.0)
    with pytest.raises(ValueError, match="every_steps"):
        ReferenceConfig("copy", every_steps=0)
