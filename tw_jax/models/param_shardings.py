"""Where a model's parameters lie on a mesh."""

from tw_jax.models.config import Qwen3Config
from tw_jax.models.lora import Adapter
from tw_jax.models.qwen3 import Params, abstract_params, param_axes
from tw_jax.parallel.layout import Layout


def param_shardings(layout: Layout | None, config: Qwen3Config) -> Params | None:
    """A tree of shardings like the parameters; None on one device.

    Raises:
      UserError: a parameter does not divide over the mesh.
    """
    if layout is None:
        return None
    return layout.param_shardings(param_axes(config), abstract_params(config))


def adapter_shardings(layout: Layout | None, adapter: Adapter) -> Params | None:
    """The same for what an adapter trains."""
    if layout is None:
        return None
    return layout.param_shardings(adapter.axes(), adapter.abstract())


def base_shardings(layout: Layout | None, adapter: Adapter) -> Params | None:
    """The same for the base under an adapter."""
    if layout is None:
        return None
    return layout.param_shardings(adapter.base_axes(), adapter.abstract_base())
