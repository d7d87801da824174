"""Where a run's arrays lie: the train state and the batches, on one device or on a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding

from tw_jax.data.packed_batch import PackedBatch
from tw_jax.models.qwen3 import Params
from tw_jax.parallel.layout import Layout
from tw_jax.train.state import TrainState, init_train_state, state_shardings


@dataclasses.dataclass(frozen=True)
class Placement:
    """Shardings of one run.

    Attributes:
      layout: the mesh and its rules; None on one device.
      state: shardings of the train state; None on one device.
    """

    layout: Layout | None
    state: TrainState | None

    def batch(self, batch: PackedBatch) -> PackedBatch:
        """Spreads a host batch over the mesh."""
        return batch if self.layout is None else self.layout.place_batch(batch)

    def copy_params(self, params: Params) -> Params:
        """Parameters of their own for a run that donates them."""
        if self.state is None:
            return jax.tree.map(jnp.copy, params)
        copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=self.state.params)
        return copy(jax.tree.map(np.asarray, params))

    def on_one_device(self, params: Params) -> Params:
        """Whole parameters on this process's first device, where rollouts run."""
        if self.layout is None:
            return params
        return jax.device_put(params, SingleDeviceSharding(jax.local_devices()[0]))


def place_run(
    layout: Layout | None,
    abstract_params: Params,
    param_axes: Any,
    optimizer: optax.GradientTransformation,
) -> Placement:
    """Decides where everything lies, from shapes alone.

    Args:
      layout: the mesh; None on one device.
      abstract_params: the parameters or their shapes.
      param_axes: names of their axes (`tw_jax.models.qwen3.param_axes`).
      optimizer: whose state lies as the parameters do.

    Raises:
      UserError: a parameter does not divide over the mesh.
    """
    if layout is None:
        return Placement(None, None)
    params = layout.param_shardings(param_axes, abstract_params)
    abstract = abstract_state(abstract_params, optimizer)
    return Placement(layout, state_shardings(abstract, params, optimizer, layout.replicated()))


def abstract_state(abstract_params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of the train state before the first step."""
    return jax.eval_shape(lambda params: init_train_state(params, optimizer), abstract_params)


def placed_state(
    params: Params, optimizer: optax.GradientTransformation, placement: Placement
) -> TrainState:
    """The state before the first step, with parameters that lie as `placement` says already."""
    init = jax.jit(
        lambda params: init_train_state(params, optimizer), out_shardings=placement.state
    )
    return init(params)
