"""Where a run's arrays lie: the train state and the batches, on one device or on a mesh."""

import dataclasses

import jax
import optax

from tw_jax.data.packed_batch import PackedBatch
from tw_jax.models.config import Qwen3Config
from tw_jax.models.lora import Adapter
from tw_jax.models.param_shardings import adapter_shardings, param_shardings
from tw_jax.models.qwen3 import Params, abstract_params
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


def place_run(
    layout: Layout | None,
    config: Qwen3Config,
    optimizer: optax.GradientTransformation,
    adapter: Adapter | None = None,
) -> Placement:
    """Decides where everything lies, from shapes alone.

    Args:
      layout: the mesh; None on one device.
      config: the model.
      optimizer: whose state lies as the parameters do.
      adapter: what is trained of the model; None: all of it.

    Raises:
      UserError: a parameter does not divide over the mesh.
    """
    if layout is None:
        return Placement(None, None)
    if adapter is None:
        params, shapes = param_shardings(layout, config), abstract_params(config)
    else:
        params, shapes = adapter_shardings(layout, adapter), adapter.abstract()
    abstract = abstract_state(shapes, optimizer)
    return Placement(layout, state_shardings(abstract, params, optimizer, layout.replicated()))


def abstract_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of the train state before the first step, from those of its parameters."""
    return jax.eval_shape(lambda params: init_train_state(params, optimizer), params)


def placed_state(
    params: Params, optimizer: optax.GradientTransformation, placement: Placement
) -> TrainState:
    """The state before the first step, with parameters that lie as `placement` says already."""
    init = jax.jit(
        lambda params: init_train_state(params, optimizer), out_shardings=placement.state
    )
    return init(params)
