"""Published safetensors -> our parameters, streamed straight to where they will live.

One parameter at a time: a host buffer for each slice that this host's devices hold is filled from
the files, block by block in several threads, and handed to `jax.make_array_from_callback`. A block
that no local device needs is never read, one that several need is read once, and layers and
experts are stacked by being written to their place. The peak of host memory is what the devices of
this host hold, plus one parameter.

Everything that can be wrong with the files is found from their headers, before the first byte of a
weight is read.
"""

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tw_jax.errors import UserError
from tw_jax.models import qwen3
from tw_jax.models.config import Qwen3Config
from tw_jax.models.matrix_copy import aligned_empty, copy_rows
from tw_jax.models.safetensors_file import FLOAT_DTYPES, TensorEntry, list_tensors
from tw_jax.models.weight_location import WeightFolder, open_folder
from tw_jax.models.weight_names import RULES, Piece, pieces_of

_BLOCK_BYTES = 8 << 20  # read at once; also what a request over the network asks for
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_OBSOLETE = "rotary_emb.inv_freq"  # a constant that old files carry along

Bounds = tuple[tuple[int, int], ...]  # (start, stop) on each axis


def load_params(
    location: str | WeightFolder, config: Qwen3Config, shardings: Any = None
) -> qwen3.Params:
    """Loads published weights.

    Args:
      location: a local folder, hub id or URL; see `weight_location.open_folder`.
      config: the architecture; the parameters come in its `param_dtype`.
      shardings: a tree like the parameters, of `jax.sharding.Sharding`; None puts all of it on this
        process's first device.

    Returns:
      The parameters.

    Raises:
      UserError: files are missing, torn or malformed, or do not hold this architecture's tensors:
        names the first tensor at fault, what was expected and the remedy.
    """
    folder = open_folder(location) if isinstance(location, str) else location
    abstract = qwen3.abstract_params(config)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda leaf: shardings, abstract)
    tensors = list_tensors(folder)
    plan = _plan(folder, tensors, abstract)
    if config.tie_word_embeddings and _HEAD in tensors:
        _check_tied(folder, tensors)
    with concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
        leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
        arrays = []
        for (path, leaf), sharding in zip(leaves, tree.flatten_up_to(shardings), strict=True):
            work = _Parameter(folder, tensors, plan[_name(path)], leaf.shape, leaf.dtype)
            arrays.append(work.load(sharding, pool))
    return tree.unflatten(arrays)


# --- checks ---------------------------------------------------------------------------------------


def _plan(
    folder: WeightFolder, tensors: Mapping[str, TensorEntry], abstract: qwen3.Params
) -> dict[str, list[Piece]]:
    """Finds the pieces of every parameter and checks that the files hold exactly them."""
    plan, used = {}, set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
        plan[_name(path)] = pieces_of(_name(path), leaf.shape, tensors)
        for piece in plan[_name(path)]:
            _check_tensor(folder, tensors, piece)
            used.add(piece.tensor)
    left_over = [n for n in tensors if n not in used and not n.endswith(_OBSOLETE) and n != _HEAD]
    if left_over:
        raise UserError(
            f"{folder.name}: tensor {left_over[0]!r} and {len(left_over) - 1} more are no part of "
            "this architecture; check config.json (num_hidden_layers, num_experts, "
            "attention_bias) and that the model is a Qwen3"
        )
    return plan


def _check_tensor(folder: WeightFolder, tensors: Mapping[str, TensorEntry], piece: Piece) -> None:
    entry = tensors.get(piece.tensor)
    if entry is None:
        hint = "; config.json says tie_word_embeddings: false" if piece.tensor == _HEAD else ""
        raise UserError(
            f"{folder.name}: tensor {piece.tensor!r} {list(piece.tensor_shape)} is missing{hint}; "
            "config.json and weights must come from the same model"
        )
    where = f"{folder.name}/{entry.file}: tensor {piece.tensor!r}"
    if entry.dtype not in FLOAT_DTYPES:
        raise UserError(
            f"{where} is {entry.dtype}; {', '.join(FLOAT_DTYPES)} can be read: take the "
            "release of the model that is not quantised"
        )
    if entry.shape != piece.tensor_shape:
        raise UserError(
            f"{where} has shape {list(entry.shape)}, config.json asks for "
            f"{list(piece.tensor_shape)}; both must come from the same model"
        )


def _check_tied(folder: WeightFolder, tensors: Mapping[str, TensorEntry]) -> None:
    """A file may repeat the embedding as the head, but not disagree with it."""
    head, embedding = tensors[_HEAD], tensors[_EMBEDDING]
    same = head.dtype == embedding.dtype and head.shape == embedding.shape
    for at in range(0, head.stop - head.start if same else 0, _BLOCK_BYTES):
        a, b = (
            folder.read(t.file, t.start + at, min(t.start + at + _BLOCK_BYTES, t.stop))
            for t in (head, embedding)
        )
        same = same and np.array_equal(a, b)
    if not same:
        raise UserError(
            f"{folder.name}: config.json says tie_word_embeddings: true, but {_HEAD!r} is not "
            f"{_EMBEDDING!r}; set it to false to keep the head"
        )


# --- reading --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Block:
    """Some rows of a piece, as published."""

    piece: Piece
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """One parameter to load: where its pieces lie, and what it shall be."""

    folder: WeightFolder
    tensors: Mapping[str, TensorEntry]
    pieces: list[Piece]
    shape: tuple[int, ...]
    dtype: np.dtype

    def load(self, sharding: jax.sharding.Sharding, pool: concurrent.futures.Executor) -> jax.Array:
        """Fills a buffer for each distinct slice on this host, and puts it on its devices."""
        slices = sharding.addressable_devices_indices_map(self.shape).values()
        buffers: dict[Bounds, np.ndarray] = {}
        for bounds in {_bounds(index, self.shape) for index in slices}:
            size = tuple(stop - start for start, stop in bounds)
            buffers[bounds] = aligned_empty(size, self.dtype)
        for _ in pool.map(lambda block: self._read(block, buffers), self._blocks()):
            pass  # raises what the thread raised
        array = jax.make_array_from_callback(
            self.shape,
            sharding,
            lambda index: buffers[_bounds(index, self.shape)],
            dtype=self.dtype,
        )
        return array.block_until_ready()  # or the host would hold the next one beside it

    def _blocks(self) -> Iterator[_Block]:
        for piece in self.pieces:
            row_bytes = math.prod(piece.row_shape) * self._item(piece).itemsize
            step = max(1, _BLOCK_BYTES // row_bytes)
            for first in range(0, piece.rows, step):
                yield _Block(piece, first, min(first + step, piece.rows))

    def _item(self, piece: Piece) -> np.dtype:
        return FLOAT_DTYPES[self.tensors[piece.tensor].dtype]

    def _read(self, block: _Block, buffers: Mapping[Bounds, np.ndarray]) -> None:
        """Reads a block once and writes it into every buffer that it touches."""
        piece, entry = block.piece, self.tensors[block.piece.tensor]
        wanted = [(b, overlap) for b in buffers if (overlap := _overlap(block, b))]
        if not wanted:
            return
        first = min(rows.start for _, (rows, _) in wanted)
        last = max(rows.stop for _, (rows, _) in wanted)
        row_bytes = math.prod(piece.row_shape) * self._item(piece).itemsize
        start = entry.start + (piece.first_row + first) * row_bytes
        raw = self.folder.read(entry.file, start, start + (last - first) * row_bytes)
        source = raw.view(self._item(piece)).reshape(last - first, *piece.row_shape)
        for bounds, (rows, columns) in wanted:
            stack = tuple(at - b[0] for at, b in zip(piece.stack, bounds, strict=False))
            target = buffers[bounds][stack] if stack else buffers[bounds]
            target = target.T if piece.transpose else target
            at = _published(piece, bounds)[0][0]
            part = slice(rows.start - first, rows.stop - first)
            here = source[part, columns] if piece.row_shape else source[part]
            copy_rows(target[rows.start - at : rows.stop - at], here)


def _overlap(block: _Block, bounds: Bounds) -> tuple[slice, slice] | None:
    """Rows and columns of the published matrix that a buffer takes from a block, if any."""
    piece = block.piece
    if not all(b[0] <= at < b[1] for at, b in zip(piece.stack, bounds, strict=False)):
        return None
    (top, bottom), columns = _published(piece, bounds)
    rows = slice(max(top, block.first), min(bottom, block.last))
    return (rows, slice(*columns)) if rows.start < rows.stop else None


def _published(piece: Piece, bounds: Bounds) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bounds of a buffer on the rows and columns of the matrix as published."""
    matrix = bounds[len(piece.stack) :]
    matrix = matrix[::-1] if piece.transpose else matrix
    return matrix[0], (matrix[1] if len(matrix) > 1 else (0, 1))


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Bounds:
    """A device's slice, written out."""
    index = index or (slice(None),) * len(shape)
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _threads() -> int:
    """Enough to keep a disk or a network busy, and every core in transposing."""
    return max(4, min(16, os.cpu_count() or 1))


def _name(path: Any) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert name in RULES, f"weight_names.RULES lacks {name}"
    return name
