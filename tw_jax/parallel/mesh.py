"""From a configuration to a mesh of devices.

    parallel.preset=fsdp                 weights, gradients and optimizer spread over all devices
    parallel.preset=fsdp_tensor          the same, each layer also split over a few close devices
    parallel.preset=tensor               layers split over all devices
    parallel.preset=expert               experts of a mixture spread over all devices
    parallel.preset=context              tokens of a row spread over all devices

Each preset names the mesh axis that takes all devices which no other axis has been given, e.g.
`parallel.preset=fsdp_tensor parallel.tensor=8 parallel.data=2`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from tw_jax.config_checks import require_at_least
from tw_jax.errors import UserError
from tw_jax.parallel.layout import Layout, ShardingRules

# From the farthest apart to the closest together: tensor parallelism talks most.
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
PRESETS = {
    "fsdp": "fsdp",
    "fsdp_tensor": "fsdp",
    "tensor": "tensor",
    "expert": "expert",
    "context": "context",
}
_FSDP_TENSOR_DEFAULT = 2


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over devices. On one device none of it matters.

    Attributes:
      preset: which axis of the mesh takes the devices that the sizes below leave over:
        fsdp (also for fsdp_tensor), tensor, expert or context.
      data: whole copies of the model; null for 1, or what is left if the preset's axis has a size.
      fsdp: devices that share one copy of weights, gradients and optimizer state.
      expert: devices that share the experts of a mixture.
      context: devices that share the tokens of each row.
      tensor: devices that share each layer's heads and feed-forward width; fsdp_tensor takes 2
        unless told otherwise.
      sequence_parallel: between layers, split tokens over the tensor axis too; saves memory.
    """

    preset: Literal["fsdp", "fsdp_tensor", "tensor", "expert", "context"] = "fsdp"
    data: int | None = None
    fsdp: int | None = None
    expert: int | None = None
    context: int | None = None
    tensor: int | None = None
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, data=1, fsdp=1, expert=1, context=1, tensor=1)

    def sizes(self, devices: int) -> dict[str, int]:
        """Size of every mesh axis for this many devices.

        Raises:
          UserError: the given sizes do not multiply to the number of devices.
        """
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        if self.preset == "fsdp_tensor" and sizes["tensor"] is None:
            sizes["tensor"] = _FSDP_TENSOR_DEFAULT
        rest = PRESETS[self.preset]
        if sizes[rest] is not None:
            rest = "data"
        given = int(np.prod([s for axis, s in sizes.items() if s is not None and axis != rest]))
        if sizes[rest] is None:
            sizes[rest] = max(devices // given, 1)
        full = {axis: size or 1 for axis, size in sizes.items()}
        if int(np.prod(list(full.values()))) != devices:
            asked = " x ".join(f"{axis} {size}" for axis, size in full.items() if size > 1)
            axis = PRESETS[self.preset]
            free = f", or leave parallel.{axis} out and it takes what the others leave"
            raise UserError(
                f"parallel: the mesh {asked or 'of 1 device'} does not use the {devices} devices "
                f"that there are: choose sizes whose product is {devices}"
                + (free if getattr(self, axis) is not None else "")
            )
        return full

    def rules(self) -> ShardingRules:
        """The sharding rules that this configuration asks for."""
        if self.sequence_parallel:
            return ShardingRules(residual_length=("context", "tensor"))
        return ShardingRules()


def make_layout(
    config: ParallelConfig, devices: Sequence[Any] | None = None, *, always: bool = False
) -> Layout | None:
    """The mesh over `devices` (all of them if absent) and its rules.

    Args:
      config: see `ParallelConfig`.
      devices: jax devices, or the devices of a topology description.
      always: make a layout for a single device as well.

    Returns:
      The layout; None on a single device, where plain code is faster.

    Raises:
      UserError: the mesh does not fit the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if len(devices) == 1 and not always:
        return None
    sizes = config.sizes(len(devices))
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    mesh = Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return Layout(mesh, config.rules())
