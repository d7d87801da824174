"""Which array axis lies on which mesh axis: one table, applied to every parameter and activation.

Model code names the axes of its arrays ("batch", "embed", "heads", ...) and nothing else. The
table below turns those names into mesh axes. A name may list several mesh axes; within one array a
mesh axis is used once, by the first name that asks for it, so that "embed" is sharded in a weight
but whole in an activation whose "batch" has taken the same mesh axes already.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from tw_jax.errors import UserError

AxisNames = Sequence[str | None]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axes of every logical axis.

    Weights are fully sharded over `fsdp`, and over `context` and `expert` too where those are in
    use, since the devices along them would otherwise hold equal copies; each layer's weights are
    gathered when the layer runs. Heads, feed-forward width and vocabulary are split over `tensor`
    and stay split.

    Attributes:
      batch: rows.
      length: tokens of a row.
      residual_length: tokens of a row in the residual stream between layers; `tensor` here is
        sequence parallelism.
      embed: width of the residual stream.
      heads: query heads.
      kv_heads: key and value heads.
      head_dim: width of a head.
      mlp: inner width of a feed-forward layer.
      experts: experts of a mixture.
      vocab: rows of the vocabulary.
      layers: stacked layers.
      norm: scales of norms.
      lora_rank: inner width of adapters.
    """

    batch: tuple[str, ...] = ("data", "fsdp", "expert")
    length: tuple[str, ...] = ("context",)
    residual_length: tuple[str, ...] = ("context",)
    embed: tuple[str, ...] = ("fsdp", "context", "expert")
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("tensor",)
    experts: tuple[str, ...] = ("expert",)
    vocab: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()
    lora_rank: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that place arrays on it.

    Attributes:
      mesh: devices, with the axes of `tw_jax.parallel.mesh.MESH_AXES`.
      rules: see `ShardingRules`.
    """

    mesh: Mesh
    rules: ShardingRules

    def size(self, axis: str) -> int:
        """Devices along everything that a logical axis is spread over."""
        return int(np.prod([self.mesh.shape[name] for name in getattr(self.rules, axis)]))

    def mesh_axes(self, axes: AxisNames) -> list[tuple[str, ...]]:
        """The mesh axes that each axis of an array is spread over."""
        taken: set[str] = set()
        found = []
        for axis in axes:
            wanted = () if axis is None else getattr(self.rules, axis)
            used = tuple(a for a in wanted if self.mesh.shape[a] > 1 and a not in taken)
            taken.update(used)
            found.append(used)
        return found

    def spec(self, axes: AxisNames) -> P:
        """The partition of an array whose axes have these names; None is never split."""
        return P(*(used or None for used in self.mesh_axes(axes)))

    def sharding(self, axes: AxisNames) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(axes))

    def constrain(self, x: Array, axes: AxisNames) -> Array:
        """Tells the compiler how an intermediate array lies; for use inside jit."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))

    def param_shardings(self, axes: Any, abstract: Any) -> Any:
        """Shardings of a parameter tree.

        Args:
          axes: tree of tuples of axis names (`tw_jax.models.qwen3.param_axes`).
          abstract: tree of arrays or shapes with the same structure.

        Raises:
          UserError: an axis does not divide over its devices; names the first such parameter.
        """

        def one(path: Any, leaf: Any, names: tuple[str | None, ...]) -> NamedSharding:
            for axis, size, used in zip(names, leaf.shape, self.mesh_axes(names), strict=True):
                devices = int(np.prod([self.mesh.shape[a] for a in used]))
                if size % devices:
                    name = jax.tree_util.keystr(path, simple=True, separator="/")
                    raise UserError(
                        f"parameter {name} has {size} along its axis {axis!r}, which does not "
                        f"divide over {devices} devices ({' x '.join(used)}): choose a smaller "
                        "mesh axis, or another model"
                    )
            return self.sharding(names)

        return jax.tree_util.tree_map_with_path(one, abstract, axes)

    def replicated(self) -> NamedSharding:
        """Every device holds all of it."""
        return NamedSharding(self.mesh, P())

    def check_rows(self, rows: int, row_len: int) -> None:
        """Refuses batches that do not divide over the mesh, before anything is compiled.

        Raises:
          UserError: rows or their length do not divide.
        """
        if rows % self.size("batch"):
            raise UserError(
                f"rows={rows} do not divide over the {self.size('batch')} devices of the mesh "
                f"axes {' x '.join(self.rules.batch)} ({self.describe()}): make rows a multiple "
                f"of {self.size('batch')}"
            )
        parts = self.size("residual_length")
        if row_len % parts:
            raise UserError(
                f"row_len={row_len} does not divide over {parts} devices ({self.describe()}): "
                f"make row_len a multiple of {parts}"
            )

    def describe(self) -> str:
        """The mesh in words, such as `fsdp 4 x tensor 2`."""
        sizes = [f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1]
        return " x ".join(sizes) or "1 device"

    def place_batch(self, batch: Any) -> Any:
        """Spreads packed rows `[..., rows, row_len]` over the mesh.

        Every process holds the same host arrays and hands over the parts of its own devices.
        """

        def place(array: np.ndarray) -> Array:
            array = np.asarray(array)
            axes = (*[None] * (array.ndim - 2), "batch", "length")
            return jax.make_array_from_callback(
                array.shape, self.sharding(axes), lambda index: array[index]
            )

        return jax.tree.map(place, batch)


def on_mesh(layout: Layout | None) -> contextlib.AbstractContextManager:
    """Tells traced code which mesh it is for; nothing on one device."""
    if layout is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh)
