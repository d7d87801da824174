"""What a training run carries from step to step, and how gradients change it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The arrays of a training run.

    Attributes:
      step: training steps taken so far, skipped updates included; also the position in the data
        and in the learning-rate schedule.
      params: the model's parameters, a pure nested dict of arrays.
      opt_state: the optimizer's state.
      skipped_updates: how many of the steps changed nothing, because a gradient was not finite.
      reference: a tree like `params`, in RL whose KL term has a reference that moves
        (`tw_jax.train.reference`); else None.
    """

    step: Int32[Array, ""]
    params: Any
    opt_state: Any
    skipped_updates: Int32[Array, ""]
    reference: Any = None


def init_train_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step. Jit it to give the optimizer's state params' shardings."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        skipped_updates=jnp.zeros((), jnp.int32),
    )


def state_shardings(
    abstract: TrainState, params: Any, tx: optax.GradientTransformation, other: Any
) -> TrainState:
    """Shardings of a train state: the optimizer's moments lie as their parameters do.

    Args:
      abstract: the state's shapes, `jax.eval_shape` of `init_train_state`.
      params: a tree of shardings like the parameters.
      tx: the optimizer.
      other: the sharding of everything else, counters mostly.
    """
    moments = optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        abstract.opt_state,
        params,
        transform_non_params=lambda _: other,
    )
    return TrainState(step=other, params=params, opt_state=moments, skipped_updates=other)


def apply_gradients(
    state: TrainState, grads: Any, tx: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Float32[Array, ""]]]:
    """Takes one optimizer step, or skips it if a gradient is not finite.

    A skipped update leaves parameters and optimizer state bit for bit as they were; `step` advances
    all the same, so that data and learning rate stay aligned with a run that skipped nothing. Both
    outcomes are computed and selected element by element: no branch, and donated buffers are
    written in place.

    Args:
      state: the state before the step.
      grads: gradients, a tree like `state.params`.
      tx: the optimizer; gets the keyword `step` if it takes extra arguments.

    Returns:
      The next state, and the metrics `grad_norm` (global L2 norm before clipping) and
      `update_skipped` (1 or 0).
    """
    # One test covers every element: any inf or nan makes the norm inf or nan. So do finite
    # gradients whose squares overflow float32, which clipping would turn into zeros anyway.
    grad_norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    finite = jnp.isfinite(grad_norm)

    updates, opt_state = optax.with_extra_args_support(tx).update(
        grads, state.opt_state, state.params, step=state.step
    )
    params = optax.apply_updates(state.params, updates)

    def if_finite(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    next_state = TrainState(
        step=state.step + 1,
        params=if_finite(params, state.params),
        opt_state=if_finite(opt_state, state.opt_state),
        skipped_updates=state.skipped_updates + jnp.where(finite, 0, 1).astype(jnp.int32),
        reference=state.reference,
    )
    return next_state, {
        "grad_norm": grad_norm.astype(jnp.float32),
        "update_skipped": jnp.where(finite, 0.0, 1.0).astype(jnp.float32),
    }
