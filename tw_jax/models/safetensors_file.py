"""Reads what safetensors files say of themselves: names, dtypes, shapes and byte ranges.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes one
after another. Reading the header alone allows any slice of any tensor to be read later, without a
library that would load whole tensors. A checkpoint is one such file or several with an index.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tw_jax.errors import UserError
from tw_jax.models.weight_location import WeightFolder

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
}
_ITEM_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16}
_ITEM_BITS |= {"F16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_ITEM_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint.

    Attributes:
      name: its name.
      file: the file that holds it.
      dtype: its dtype as safetensors writes it, e.g. `BF16`.
      shape: its shape.
      start: first byte in the file.
      stop: byte behind its last one.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def list_tensors(folder: WeightFolder) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint, by name; reads headers only.

    Raises:
      UserError: there are no safetensors, a file is missing, torn or malformed, or the index does
        not say what the files hold.
    """
    files = _listed(folder)
    if INDEX_FILE in files:
        return _indexed(folder, files)
    if SINGLE_FILE in files:
        return read_header(folder, SINGLE_FILE)
    others = sorted(f for f in files if f.endswith((".bin", ".pt", ".pth", ".gguf", ".msgpack")))
    found = f"; {', '.join(others[:3])} cannot be read, convert to safetensors" if others else ""
    raise UserError(f"{folder.name}: holds neither {SINGLE_FILE} nor {INDEX_FILE}{found}")


def read_json(folder: WeightFolder, file: str) -> dict[str, Any]:
    """A JSON object stored in a file.

    Raises:
      UserError: there is no such file, or it holds no JSON object.
    """
    if file not in _listed(folder):
        raise UserError(
            f"{folder.name}: there is no {file}. A model's folder holds one; a run's, such as "
            "`sft` in that of a quickstart, holds `checkpoints`"
        )
    try:
        value = json.loads(folder.read(file, 0, folder.size(file)).tobytes())
    except ValueError as error:
        raise UserError(f"{folder.name}/{file}: is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{folder.name}/{file}: must hold a JSON object")
    return value


def read_header(folder: WeightFolder, file: str) -> dict[str, TensorEntry]:
    """The tensors of one file.

    Raises:
      UserError: the file is torn or no safetensors file.
    """
    where, size = f"{folder.name}/{file}", folder.size(file)
    if size < _LENGTH_BYTES:
        raise UserError(f"{where}: is truncated ({size} bytes); fetch it again")
    length = int.from_bytes(folder.read(file, 0, _LENGTH_BYTES).tobytes(), "little")
    data = _LENGTH_BYTES + length
    if length > _MAX_HEADER_BYTES:
        raise UserError(f"{where}: has no safetensors header (its length would be {length} bytes)")
    if data > size:
        raise UserError(f"{where}: is truncated within its header; fetch it again")
    try:
        header = json.loads(folder.read(file, _LENGTH_BYTES, data).tobytes())
        header.pop("__metadata__", None)
        entries = {name: _entry(name, file, fields, data) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: its safetensors header is malformed ({type(error).__name__}: {error}); "
            "fetch the file again"
        ) from error
    end = data
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != end:
            raise UserError(
                f"{where}: its safetensors header is malformed: tensor {entry.name!r} does not "
                "begin where the one before it ends; fetch the file again"
            )
        end = entry.stop
    if end != size:
        problem = "is truncated" if end > size else "has bytes that no tensor owns"
        raise UserError(
            f"{where}: {problem}: the header describes {end} bytes, the file has {size}; "
            "fetch it again"
        )
    return entries


def _listed(folder: WeightFolder) -> frozenset[str]:
    try:
        return folder.files()
    except OSError as error:
        raise UserError(f"{folder.name}: cannot be read ({error})") from error


def _entry(name: str, file: str, fields: Mapping[str, Any], data: int) -> TensorEntry:
    """One line of a header; raises ValueError, KeyError or TypeError for nonsense."""
    dtype, shape = fields["dtype"], tuple(int(n) for n in fields["shape"])
    start, stop = (int(offset) for offset in fields["data_offsets"])
    if min((start, *shape), default=0) < 0 or stop < start:
        raise ValueError(f"{name}: shape {list(shape)}, bytes {start}..{stop}")
    bits = _ITEM_BITS.get(dtype)  # a dtype we do not know is refused when its tensor is needed
    if bits and 8 * (stop - start) != math.prod(shape) * bits:
        raise ValueError(f"{name}: {dtype}{list(shape)} cannot take {stop - start} bytes")
    return TensorEntry(name, file, dtype, shape, data + start, data + stop)


def _indexed(folder: WeightFolder, files: frozenset[str]) -> dict[str, TensorEntry]:
    weight_map = read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder.name}/{INDEX_FILE}: has no `weight_map`; fetch it again")
    shards = sorted({str(file) for file in weight_map.values()})
    if missing := [shard for shard in shards if shard not in files]:
        raise UserError(
            f"{folder.name}: {len(missing)} of {len(shards)} weight files that {INDEX_FILE} names "
            f"are missing: {', '.join(missing[:5])}; fetch them again"
        )
    found: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in read_header(folder, shard).items():
            if weight_map.get(name, shard) == shard:  # the index decides between duplicates
                found[name] = entry
    if absent := [name for name in weight_map if name not in found]:
        raise UserError(
            f"{folder.name}/{INDEX_FILE}: says that {weight_map[absent[0]]} holds tensor "
            f"{absent[0]!r}, but it does not ({len(absent)} such); fetch index and files again"
        )
    return found
