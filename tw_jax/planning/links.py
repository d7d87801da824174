"""How fast the devices of a mesh axis can talk: from where they sit in the network.

A ring collective uses all links of the physical dimensions that its group spans. On a TPU's torus
a dimension that closes into a ring offers both directions, an open one half of that. GPUs talk
over NVLink inside a node; a group that leaves the node goes at the speed of the network.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from tw_jax.planning.chips import Topology

Coordinates = Sequence[int]


def group_coordinates(mesh: Mesh, axes: Iterable[str]) -> list[Coordinates]:
    """Places in the torus of the first group of devices along these mesh axes."""
    names = list(mesh.shape)
    index = tuple(slice(None) if name in set(axes) else 0 for name in names)
    return [device.coords for device in np.ravel(mesh.devices[index])]


def torus_bandwidth(topology: Topology, group: Sequence[Coordinates]) -> float:
    """Bytes per second that each device of a group can send in a ring collective.

    Args:
      topology: the network.
      group: places of the devices that take part.
    """
    chip = topology.chip
    total = 0.0
    for dim, length in enumerate(topology.shape):
        if len({place[dim] for place in group}) > 1:
            spans_all = len({place[dim] for place in group}) == length
            closed = spans_all and length % chip.wraps_at == 0
            # A ring on an open line comes back over the links' other direction.
            total += chip.link_bandwidth * (2 if closed else 1)
    # Two devices on one chip: they share its memory, at least as fast as a ring of links.
    return total or 2 * chip.torus_dims * chip.link_bandwidth


def gpu_bandwidth(topology: Topology, sizes: Mapping[str, int], axes: Iterable[str]) -> float:
    """Bytes per second that each GPU of a group can send.

    Devices are numbered in the order of the mesh, node by node.

    Args:
      topology: the cluster.
      sizes: sizes of all mesh axes in order.
      axes: those that the group spans.
    """
    wanted = set(axes)
    strides = {}
    stride = 1
    for name in reversed(list(sizes)):
        strides[name] = stride
        stride *= sizes[name]
    reach = [range(0, sizes[a] * strides[a], strides[a]) if a in wanted else (0,) for a in sizes]
    members = [sum(offsets) for offsets in itertools.product(*reach)]
    one_node = len({member // topology.chip.node_size for member in members}) == 1
    chip = topology.chip
    return chip.link_bandwidth if one_node else chip.network_bandwidth


def axes_bandwidths(
    topology: Topology, mesh: Mesh, groups: Iterable[tuple[str, ...]]
) -> dict[tuple[str, ...], float]:
    """`torus_bandwidth` of every combination of mesh axes."""
    return {axes: torus_bandwidth(topology, group_coordinates(mesh, axes)) for axes in groups}
