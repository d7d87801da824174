"""Our parameters -> a folder as it is published: safetensors shards, index, config, tokenizer.

Shapes fix every byte's place before any weight is touched, so the tensors are streamed one at a
time, in blocks that several threads transpose, convert and write where they belong. The folder
appears under its name only when it is complete.

In a run of several processes all of them call `export_model`; the first one writes. Parameters that
are spread over the processes are gathered layer by layer, which takes all of them.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tw_jax.errors import UserError
from tw_jax.models import qwen3
from tw_jax.models.config import Qwen3Config
from tw_jax.models.hf_config import config_to_hf
from tw_jax.models.matrix_copy import copy_rows
from tw_jax.models.safetensors_file import FLOAT_DTYPES, INDEX_FILE, SINGLE_FILE
from tw_jax.models.weight_names import Piece, pieces_of
from tw_jax.parallel.processes import is_first_process, led_by_first_process

_BLOCK_BYTES = 4 << 20  # written at once
_CODES = {str(dtype): code for code, dtype in FLOAT_DTYPES.items()}
_NOTHING = np.empty(0)


def export_model(
    out: str | os.PathLike[str],
    params: qwen3.Params,
    config: Qwen3Config,
    tokenizer: Any,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    generation_config: Mapping[str, Any] | None = None,
) -> list[str]:
    """Writes a model as transformers, vLLM and SGLang load it.

    Args:
      out: the new folder; nothing may be there yet.
      params: the parameters; on a mesh over several processes, or whole in each.
      config: their architecture.
      tokenizer: a Hugging Face tokenizer; its end-of-text and padding tokens go into the settings.
      dtype: of the written tensors; None keeps `config.param_dtype`.
      max_shard_bytes: largest size of one file, tensors that are larger themselves excepted.
      generation_config: settings of generation; None writes the tokenizer's tokens only.

    Returns:
      Names of the weight files.

    Raises:
      UserError: `out` exists or cannot be written, or the tokenizer has more tokens than the model
        rows; in every process.
    """
    config = dataclasses.replace(config, param_dtype=dtype or config.param_dtype)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{out}: the tokenizer has {len(tokenizer)} tokens but the model only "
            f"{config.vocab_size} rows; export it with the tokenizer that it was trained with"
        )
    tokens = {
        name: value
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if (value := getattr(tokenizer, name)) is not None
    }
    written_dtype = FLOAT_DTYPES[_CODES[config.param_dtype]]
    files = _plan_files(_tensors(params), written_dtype, max_shard_bytes)
    with led_by_first_process() as check:
        if not is_first_process():
            _help_gathering(files, check)
            return list(files)
        with new_folder(pathlib.Path(out)) as folder:
            _write_weights(folder, files, written_dtype, check)
            tokenizer.save_pretrained(str(folder))
            _make_readable_by_transformers_4(folder / "tokenizer_config.json")
            # Version 4 mistrusts the tokenizer of a config.json that does not say who wrote it.
            writer = {"transformers_version": importlib.metadata.version("transformers")}
            write_json(folder / "config.json", config_to_hf(config) | tokens | writer)
            generation = {**tokens, **(generation_config or {})}
            write_json(folder / "generation_config.json", generation)
    return list(files)


# --- the folder -----------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder that takes the name `out` when the block ends well, and else vanishes.

    Raises:
      UserError: `out` exists or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; remove it or export to another folder")
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"{out}: cannot write ({error}); nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_readable_by_transformers_4(path: pathlib.Path) -> None:
    """Uses the names of transformers 4, which serving engines build on; version 5 reads both."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(tokens := fields.pop("extra_special_tokens", None), list):
        fields["additional_special_tokens"] = tokens
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, fields)


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object as published folders hold it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


# --- weights --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor to write: a matrix of a parameter."""

    piece: Piece
    leaf: jax.Array

    def size(self, dtype: np.dtype) -> int:
        return math.prod(self.piece.tensor_shape) * dtype.itemsize


# File name -> the tensors in it, in order.
_Files = Mapping[str, Sequence[_Tensor]]


def _write_weights(
    folder: pathlib.Path, files: _Files, dtype: np.dtype, check: Callable[[], None]
) -> None:
    """Writes all files; `check` comes before each."""
    with concurrent.futures.ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 1))) as pool:
        for name, tensors in files.items():
            check()
            matrices = _matrices(tensors)
            try:
                _write_file(folder / name, tensors, matrices, dtype, pool)
            except Exception:
                if jax.process_count() > 1:
                    _exhaust(matrices)  # the others gather the rest of this file
                raise
    if len(files) > 1:
        weight_map = {t.piece.tensor: name for name, tensors in files.items() for t in tensors}
        total = sum(tensor.size(dtype) for tensors in files.values() for tensor in tensors)
        index = {
            "metadata": {"total_parameters": total // dtype.itemsize, "total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(folder / INDEX_FILE, index)


def _help_gathering(files: _Files, check: Callable[[], None]) -> None:
    """What the other processes do while the first one writes the weights."""
    for tensors in files.values():
        check()
        _exhaust(_matrices(tensors))


def _exhaust(matrices: Iterator[np.ndarray]) -> None:
    collections.deque(matrices, maxlen=0)


def _tensors(params: qwen3.Params) -> list[_Tensor]:
    """All tensors to write, layer by layer, as published files are ordered."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found += [_Tensor(piece, leaf) for piece in pieces_of(name, leaf.shape)]
    return sorted(found, key=lambda tensor: tensor.piece.stack[:1] or (-1,))


def _plan_files(tensors: Sequence[_Tensor], dtype: np.dtype, max_shard_bytes: int) -> _Files:
    shards: list[list[_Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.size(dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def _write_file(
    path: pathlib.Path,
    tensors: Sequence[_Tensor],
    matrices: Iterator[np.ndarray],
    dtype: np.dtype,
    pool: concurrent.futures.Executor,
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size(dtype)
        header[tensor.piece.tensor] = {
            "dtype": _CODES[str(dtype)],
            "shape": tensor.piece.tensor_shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        data = file.tell()
        file.truncate(data + end)
        for tensor in tensors:
            at = data + header[tensor.piece.tensor]["data_offsets"][0]
            # Taken in the call, so that it is gone when the next one is made.
            transpose = tensor.piece.transpose
            _write_matrix(file.fileno(), at, next(matrices), transpose, dtype, pool)


def _write_matrix(
    descriptor: int,
    at: int,
    matrix: np.ndarray,
    transpose: bool,
    dtype: np.dtype,
    pool: concurrent.futures.Executor,
) -> None:
    """Writes a matrix `[in, out]` to a place in a file, transposed or not."""
    matrix = matrix.T if transpose else matrix
    row_bytes = math.prod(matrix.shape[1:]) * dtype.itemsize

    def write(first: int) -> None:
        rows = matrix[first : first + step]
        block = np.empty(rows.shape, dtype)
        copy_rows(block, rows)
        _write_all(descriptor, block, at + first * row_bytes)

    step = max(1, _BLOCK_BYTES // row_bytes)
    for _ in pool.map(write, range(0, len(matrix), step)):
        pass  # raises what the thread raised


def _write_all(descriptor: int, block: np.ndarray, at: int) -> None:
    view = block.view(np.uint8).reshape(-1).data
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


# --- from devices to the host ---------------------------------------------------------------------


def _matrices(tensors: Sequence[_Tensor]) -> Iterator[np.ndarray]:
    """The matrices of tensors, one after another, for the first process.

    Parameters that are spread over processes are gathered a layer at a time, all experts of the
    layer together. All processes take part, in step; the others get empty arrays.
    """
    first = is_first_process()
    for (_, layer), group in itertools.groupby(tensors, lambda t: (id(t.leaf), t.piece.stack[:1])):
        gathered = None
        for tensor in group:
            leaf, stack = tensor.leaf, tensor.piece.stack
            if not leaf.is_fully_addressable:
                gathered = _gather(leaf, layer) if gathered is None else gathered
                leaf, stack = gathered, stack[1:]
            yield _on_host(leaf, stack) if first else _NOTHING


def _gather(leaf: jax.Array, layer: tuple[int, ...]) -> jax.Array:
    """`leaf[layer]`, whole on a device of this process; takes all processes."""
    assert isinstance(leaf.sharding, NamedSharding)
    whole = _replicate(leaf.sharding.mesh)(leaf, layer)
    return whole.block_until_ready().addressable_data(0)


@functools.cache
def _replicate(mesh: jax.sharding.Mesh) -> Callable[..., jax.Array]:
    return jax.jit(
        lambda leaf, index: leaf[index],
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def _on_host(leaf: jax.Array, stack: tuple[int, ...]) -> np.ndarray:
    """`leaf[stack]`, a matrix: a view where one CPU device holds it, else put together."""
    parts: dict[tuple, np.ndarray] = {}
    for shard in leaf.addressable_shards:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True))
        if bounds in parts or not all(
            start <= i < stop for i, (start, stop) in zip(stack, bounds, strict=False)
        ):
            continue  # a replica, or other layers
        local = tuple(i - b[0] for i, b in zip(stack, bounds, strict=False))
        on_cpu = shard.device.platform == "cpu"  # there, indexing would copy, and a view is free
        parts[bounds] = np.asarray(shard.data)[local] if on_cpu else np.asarray(shard.data[local])
    if len(parts) == 1:
        return next(iter(parts.values()))
    whole = np.empty(leaf.shape[len(stack) :], leaf.dtype)
    for bounds, part in parts.items():
        whole[tuple(slice(*b) for b in bounds[len(stack) :])] = part
    return whole
