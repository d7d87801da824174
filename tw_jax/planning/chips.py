"""What accelerators can do at best, and how topologies are named.

Peaks are the vendors' published bfloat16 figures without sparsity. `hbm_gib` of a TPU is what its
compiler lets a program use (read from its out-of-memory messages); of a GPU, what the driver
reports. One entry describes one JAX device: half a chip of tpu7x, which shows two.
"""

import dataclasses
import difflib
import math
import re
from typing import Literal

from tw_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      name: as in a topology's name.
      kind: "tpu" is compiled for, "gpu" is only modelled.
      peak_flops: bfloat16 operations per second.
      hbm_gib: memory that a program may use, in GiB.
      hbm_bandwidth: bytes per second.
      link_bandwidth: bytes per second and direction of one TPU link, or of all of a GPU's links
        to the other GPUs of its node.
      torus_dims: dimensions of the TPU's network; 0 for a GPU.
      wraps_at: a torus dimension closes into a ring if its length is a multiple of this.
      devices_per_chip: JAX devices that share a place in the network.
      node_size: GPUs per node.
      network_bandwidth: bytes per second and direction of a GPU's share of its node's network.
    """

    name: str
    kind: Literal["tpu", "gpu"]
    peak_flops: float
    hbm_gib: float
    hbm_bandwidth: float
    link_bandwidth: float
    torus_dims: int = 0
    wraps_at: int = 1
    devices_per_chip: int = 1
    node_size: int = 8
    network_bandwidth: float = 0.0


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 197e12, 15.75, 819e9, 45e9, torus_dims=2, wraps_at=16),
        Chip("v6e", "tpu", 918e12, 31.25, 1640e9, 90e9, torus_dims=2, wraps_at=16),
        Chip("v5p", "tpu", 459e12, 95.74, 2765e9, 90e9, torus_dims=3, wraps_at=4),
        Chip(
            "tpu7x",
            "tpu",
            1153.5e12,
            94.75,
            3690e9,
            45e9,  # half of a link, which both devices of a chip share
            torus_dims=3,
            wraps_at=4,
            devices_per_chip=2,
        ),
        Chip("a100", "gpu", 312e12, 79.2, 2039e9, 300e9, network_bandwidth=25e9),
        Chip("h100", "gpu", 989e12, 79.6, 3350e9, 450e9, network_bandwidth=50e9),
        Chip("h200", "gpu", 989e12, 140.4, 4800e9, 450e9, network_bandwidth=50e9),
        Chip("b200", "gpu", 2250e12, 178.0, 8000e9, 900e9, network_bandwidth=50e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many devices of a kind, and how they are wired.

    Attributes:
      name: what the user wrote.
      chip: one device.
      shape: chips along every dimension of a TPU's torus; the number of GPUs.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        """JAX devices."""
        return math.prod(self.shape) * self.chip.devices_per_chip


def parse_topology(name: str) -> Topology:
    """Reads `v5p:4x4x4` or `h100:64`.

    Raises:
      UserError: no such chip, or a shape that it cannot have.
    """
    chip_name, _, size = name.partition(":")
    if chip_name not in CHIPS:
        close = difflib.get_close_matches(chip_name, CHIPS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"topology={name!r}: there is no chip {chip_name!r}; {hint}Known are "
            f"{', '.join(CHIPS)}, as in {', '.join(_examples())}"
        )
    chip = CHIPS[chip_name]
    dims = chip.torus_dims or 1
    if not re.fullmatch(r"\d+(x\d+)*", size) or len(shape := _sizes(size)) != dims:
        raise UserError(
            f"topology={name!r}: {chip_name} takes {dims} size{'s' * (dims > 1)}, as in "
            f"{next(e for e in _examples() if e.startswith(chip_name + ':'))}"
        )
    if chip.kind == "tpu" and (0 in shape or any(length % 2 for length in shape[:2])):
        raise UserError(
            f"topology={name!r}: hosts hold 2x2 chips, so the first two sizes must be even"
        )
    if chip.kind == "gpu" and (
        shape[0] < 1 or (shape[0] > chip.node_size and shape[0] % chip.node_size)
    ):
        raise UserError(
            f"topology={name!r}: a node holds {chip.node_size} GPUs; use up to "
            f"{chip.node_size}, or whole nodes"
        )
    return Topology(name, chip, shape)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))


def _examples() -> list[str]:
    sizes = {0: "8", 2: "4x4", 3: "4x4x4"}
    return [f"{chip.name}:{sizes[chip.torus_dims]}" for chip in CHIPS.values()]
