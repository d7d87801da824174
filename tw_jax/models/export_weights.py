"""Our parameters -> a folder as it is published: safetensors shards, index, config, tokenizer.

Shapes fix every byte's place before any weight is touched, so the tensors are streamed one at a
time, in blocks that several threads transpose, convert and write where they belong. The folder
appears under its name only when it is complete.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tw_jax.errors import UserError
from tw_jax.models import qwen3
from tw_jax.models.config import Qwen3Config
from tw_jax.models.hf_config import config_to_hf
from tw_jax.models.matrix_copy import copy_rows
from tw_jax.models.safetensors_file import FLOAT_DTYPES, INDEX_FILE, SINGLE_FILE
from tw_jax.models.weight_names import Piece, pieces_of

_BLOCK_BYTES = 8 << 20  # written at once
_CODES = {str(dtype): code for code, dtype in FLOAT_DTYPES.items()}


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
      params: the parameters, all of them on devices of this process.
      config: their architecture.
      tokenizer: a Hugging Face tokenizer; its end-of-text and padding tokens go into the settings.
      dtype: of the written tensors; None keeps `config.param_dtype`.
      max_shard_bytes: largest size of one file, tensors that are larger themselves excepted.
      generation_config: settings of generation; None writes the tokenizer's tokens only.

    Returns:
      Names of the weight files.

    Raises:
      UserError: `out` exists or cannot be written, the tokenizer has more tokens than the model
        rows, or the parameters are spread over several processes.
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
    with _new_folder(pathlib.Path(out)) as folder:
        files = _write_weights(folder, params, config.param_dtype, max_shard_bytes)
        tokenizer.save_pretrained(str(folder))
        _make_readable_by_transformers_4(folder / "tokenizer_config.json")
        # Version 4 mistrusts the tokenizer of a config.json that does not say who wrote it.
        writer = {"transformers_version": importlib.metadata.version("transformers")}
        _write_json(folder / "config.json", config_to_hf(config) | tokens | writer)
        generation = {**tokens, **(generation_config or {})}
        _write_json(folder / "generation_config.json", generation)
    return files


# --- the folder -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _new_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder that takes the name `out` when the block ends well, and else vanishes."""
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
    _write_json(path, fields)


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
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


def _write_weights(
    folder: pathlib.Path, params: qwen3.Params, dtype_name: str, max_shard_bytes: int
) -> list[str]:
    dtype = FLOAT_DTYPES[_CODES[dtype_name]]
    shards = _shards(_tensors(params), dtype, max_shard_bytes)
    count = len(shards)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    files = [SINGLE_FILE] if count == 1 else files
    with concurrent.futures.ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 1))) as pool:
        for file, shard in zip(files, shards, strict=True):
            _write_shard(folder / file, shard, dtype, pool)
    if count > 1:
        tensors = [tensor for shard in shards for tensor in shard]
        weight_map = {t.piece.tensor: f for f, s in zip(files, shards, strict=True) for t in s}
        total = sum(tensor.size(dtype) for tensor in tensors)
        index = {
            "metadata": {"total_parameters": total // dtype.itemsize, "total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(folder / INDEX_FILE, index)
    return files


def _tensors(params: qwen3.Params) -> list[_Tensor]:
    """All tensors to write, layer by layer, as published files are ordered."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if not leaf.is_fully_addressable:
            raise UserError("parameters are spread over several processes; export from one process")
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found += [_Tensor(piece, leaf) for piece in pieces_of(name, leaf.shape)]
    return sorted(found, key=lambda tensor: tensor.piece.stack[:1] or (-1,))


def _shards(
    tensors: Sequence[_Tensor], dtype: np.dtype, max_shard_bytes: int
) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.size(dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _write_shard(
    path: pathlib.Path,
    tensors: Sequence[_Tensor],
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
            _write_tensor(file.fileno(), at, tensor, dtype, pool)


def _write_tensor(
    descriptor: int,
    at: int,
    tensor: _Tensor,
    dtype: np.dtype,
    pool: concurrent.futures.Executor,
) -> None:
    matrix = _on_host(tensor)
    matrix = matrix.T if tensor.piece.transpose else matrix
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


def _on_host(tensor: _Tensor) -> np.ndarray:
    """The tensor's matrix `[in, out]`: a view where one CPU device holds it, else gathered."""
    stack, leaf = tensor.piece.stack, tensor.leaf
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
