"""Training's parameters become the weights of the devices that sample, array by array.

Each array is laid out where training holds it, one layer at a time, and only the result moves: in
the dtype of the products, without a visit to the host, and nothing is ever on a sampling device but
finished weights. On top of what it keeps, a training device holds a single array for a moment.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Int32

from tw_jax.models import Params, Qwen3Config
from tw_jax.models.matrices import AdaptedMatrix
from tw_jax.models.quantized import QuantizedMatrix
from tw_jax.models.qwen3 import param_axes
from tw_jax.parallel.layout import AxisNames, Layout
from tw_jax.rollout.weights import Form, Piece, Weights, WeightsFormat

Key = tuple[int, Form, int]


@dataclasses.dataclass(frozen=True)
class _Held:
    """A piece that has been handed over."""

    leaf: Array  # held so that its id stays its own
    copies: tuple[Array, ...]


class WeightHandOver:
    """Holds the weights of one or several copies of the model; makes them anew when told to.

    What was made of an array that comes again, such as a frozen base, is kept. The weights share no
    buffer with the parameters: an update may donate those while rollouts run on.
    """

    def __init__(
        self,
        config: Qwen3Config,
        weights_format: WeightsFormat,
        places: Sequence[Any],
    ) -> None:
        """Holds nothing yet.

        Args:
          config: the architecture.
          weights_format: of the engines that will read the weights.
          places: where each copy lies: a device of this process, or a `Layout` of several.
        """
        self._config, self._format, self._places = config, weights_format, tuple(places)
        self._held: dict[Key, _Held] = {}
        self.weights: tuple[Weights, ...] = ()

    def take(self, params: Params) -> None:
        """Replaces the weights; those of before are given up first.

        If `params` lie on a mesh that spans processes, all of them call this together.

        Raises:
          UserError: a parameter does not divide over the devices of a copy.
        """
        plan = self._format.plan(params)
        wanted = {piece.key: piece for piece in jax.tree.leaves(plan)}
        shardings = [self._shardings(place, params, wanted) for place in self._places]
        self.weights = ()
        self._held = {key: held for key, held in self._held.items() if key in wanted}
        for key, piece in wanted.items():
            if key not in self._held:
                self._held[key] = self.move(piece, [found[key] for found in shardings])
        self.weights = tuple(
            jax.tree.map(lambda piece, copy=copy: self._held[piece.key].copies[copy], plan)
            for copy in range(len(self._places))
        )

    def move(self, piece: Piece, shardings: Sequence[Sharding]) -> _Held:
        """Makes a piece and moves it to every copy."""
        make = _maker(_source(piece.leaf))
        made = make(piece.leaf, np.int32(piece.layer), form=piece.form)
        copies = tuple(jax.device_put(_near(made, place), place) for place in shardings)
        # Pieces that are still on their way would lie in memory together.
        jax.block_until_ready(copies)
        return _Held(piece.leaf, copies)

    def release(self) -> None:
        """Gives everything up."""
        self.weights, self._held = (), {}

    def _shardings(
        self, place: Any, params: Params, pieces: dict[Key, Piece]
    ) -> dict[Key, Sharding]:
        if not isinstance(place, Layout):
            return dict.fromkeys(pieces, SingleDeviceSharding(place))
        axes = _axes(params, param_axes(self._config))
        place.param_shardings(axes, params)  # refuses what does not divide
        names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
        by_leaf = {
            id(leaf): name for leaf, name in zip(jax.tree.leaves(params), names, strict=True)
        }
        return {
            key: place.sharding(_piece_axes(piece, by_leaf[id(piece.leaf)]))
            for key, piece in pieces.items()
        }


def _axes(params: Params, names: Params) -> Params:
    """Names of the axes of parameters, some of which may be held as stored matrices."""

    def of_matrix(names: tuple[str, ...], matrix):
        if isinstance(matrix, QuantizedMatrix):
            return dataclasses.replace(matrix, codes=names, scales=names)
        if isinstance(matrix, AdaptedMatrix):
            a, b = (*names[:-1], "lora_rank"), (*names[:-2], "lora_rank", names[-1])
            return dataclasses.replace(matrix, base=of_matrix(names, matrix.base), a=a, b=b)
        return names

    return jax.tree.map(of_matrix, names, params, is_leaf=lambda x: isinstance(x, tuple))


def _piece_axes(piece: Piece, names: AxisNames) -> AxisNames:
    names = names[1:] if piece.form.part == "layer" else names
    return names[::-1] if piece.form.transposed else names


def _source(leaf: Array) -> NamedSharding | None:
    """Where a piece of a leaf is made: whole on each device of its mesh, or on its one device."""
    if len(leaf.sharding.device_set) == 1:
        return None
    assert isinstance(leaf.sharding, NamedSharding)
    return NamedSharding(leaf.sharding.mesh, PartitionSpec())


@functools.cache
def _maker(out: NamedSharding | None):
    """The compiled maker of pieces; the number of the layer is no part of what is compiled."""

    def make(leaf: Array, layer: Int32[Array, ""], form: Form) -> Array:
        return form.of(leaf, layer)

    return jax.jit(make, static_argnames="form", out_shardings=out)


def _near(made: Array, place: Sharding) -> Array:
    """The part of this process that lies on one of a place's devices already, or any."""
    own = {shard.device: shard.data for shard in made.addressable_shards}
    return next((own[device] for device in place.device_set if device in own), [*own.values()][0])
