"""Where the engine's state lies when the model is spread over a mesh, perhaps of many processes.

The cache is split like the heads that fill it; everything else is small and lies everywhere, so
that each process reads what it needs from a device of its own. Results of the engine's programs
are told to lie where their inputs did: the compiler would choose otherwise here and there, and the
next call would be compiled anew.

Several processes run the same programs in the same order. What decides the order are requests and
cancellations, so every process must be given the same ones; `Agreement` finds out if not, before
the processes wait for each other for ever.
"""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tw_jax.errors import UserError
from tw_jax.parallel.layout import Layout
from tw_jax.rollout.program import Program
from tw_jax.rollout.state import EngineState, new_state


@dataclasses.dataclass(frozen=True)
class Placement:
    """Shardings of the engine's results.

    Attributes:
      state: of the state, in a tree like it.
      everywhere: of whatever the host reads.
    """

    state: EngineState
    everywhere: NamedSharding

    @property
    def spans_processes(self) -> bool:
        """Whether other processes hold a part of the engine."""
        return not self.everywhere.is_fully_addressable


def engine_placement(layout: Layout, program: Program) -> Placement:
    """The placement of an engine on a mesh.

    Raises:
      UserError: the heads of the cache do not divide over the mesh.
    """
    devices = layout.size("kv_heads")
    if program.kv_heads % devices:
        raise UserError(
            f"the model has {program.kv_heads} key/value heads, which do not divide over the "
            f"{devices} devices that share them ({layout.describe()}): make parallel.tensor a "
            f"divisor of {program.kv_heads}"
        )
    everywhere = layout.replicated()
    shapes = jax.eval_shape(lambda: new_state(program))
    heads = layout.sharding((None, "kv_heads", None, None))
    cache = jax.tree.map(lambda _: heads, shapes.cache)
    state = jax.tree.map(lambda _: everywhere, shapes)
    return Placement(dataclasses.replace(state, cache=cache), everywhere)


def results(placement: Placement | None, *parts: str) -> dict[str, Any]:
    """The argument of `jax.jit` that places results, each named by a field of `Placement`."""
    if placement is None:
        return {}
    places = tuple(getattr(placement, part) for part in parts)
    return {"out_shardings": places[0] if len(places) == 1 else places}


def check_on_one_device(params: Any) -> None:
    """Refuses parameters on a mesh that the engine was not made for.

    Raises:
      UserError: they lie on several devices.
    """
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
            raise UserError(
                f"the parameters lie on {len(leaf.sharding.device_set)} devices: make the "
                "RolloutEngine with the layout of their mesh, or move them to one device"
            )


class Agreement:
    """Whether the processes of a mesh have been told the same things, in the same order."""

    def __init__(self, placement: Placement) -> None:
        """Nothing has been told yet."""
        mesh = placement.everywhere.mesh
        self._told = hashlib.sha256()
        self._shape = (mesh.size, self._told.digest_size)
        self._places = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._equal = jax.jit(_rows_equal, out_shardings=placement.everywhere)

    def tell(self, *facts: Any) -> None:
        """Notes facts that every process must be told."""
        self._told.update(repr(facts).encode())

    def check(self) -> None:
        """Compares; all processes call it, and all of them raise.

        Raises:
          UserError: another process has been told something else.
        """
        digest = np.frombuffer(self._told.digest(), np.uint8)
        own = np.broadcast_to(digest, self._shape)
        told = jax.make_array_from_callback(self._shape, self._places, lambda index: own[index])
        if not self._equal(told):
            raise UserError(
                "the processes of this engine were given different requests or cancellations: all "
                "of them must submit and cancel the same, in the same order, between two polls"
            )


def _rows_equal(rows: jax.Array) -> jax.Array:
    return (rows == rows[:1]).all()
