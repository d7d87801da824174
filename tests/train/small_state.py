"""A small train state and runs of it, for the checkpoint tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.train.checkpoint import Checkpointer
from tw_jax.train.optimizer import OptimizerConfig, make_optimizer
from tw_jax.train.state import TrainState, init_train_state

WIDTH = 8
META = {"model": {"hidden_size": WIDTH, "rope_theta": 1e4, "compute_dtype": "float32"}, "seed": 3}
TX = make_optimizer(OptimizerConfig(learning_rate=1e-2), 100)


@functools.cache
def abstract_state(width: int) -> TrainState:
    params = {
        "embed_tokens": {"embedding": jnp.zeros((16, width))},
        "layers": {
            "mlp": {"kernel": jnp.zeros((2, width, 12), jnp.bfloat16)},
            "norm": {"scale": jnp.zeros((2, width))},
        },
    }
    return jax.eval_shape(lambda p: init_train_state(p, TX), params)


def make_state(width: int = WIDTH, seed: int = 0) -> TrainState:
    """A state whose every array holds random bits, made without compiling anything."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 100, x.dtype), abstract_state(width)
    )


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype and x.shape == y.shape, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def save_steps(directory, steps, *, keep=5, width=WIDTH):
    states = {step: make_state(width, seed=step) for step in steps}
    with Checkpointer(directory, keep=keep) as checkpointer:
        for step, state in states.items():
            checkpointer.save(step, state, data_state={"next": step}, meta=META)
    return states
