"""What a checkpoint says about itself: its arrays with checksums, the position in the data, meta.

The record is one JSON object beside the arrays. Reading it answers, before any array is loaded,
whether a checkpoint fits the run at hand; its checksums tell afterwards whether what was loaded is
what was saved. The storage format alone does not: a flipped bit in a weight reads back fine.
"""

import base64
import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from tw_jax.errors import UserError
from tw_jax.parallel.processes import gathered_bytes

FORMAT = 1
PARAMS = "params"
REST = "training"  # optimizer state, step and counters: what only further training needs

# Settings that do not change what the parameters mean, so a run may change them on the way.
_FREE_SETTINGS = ("compute_dtype", "initializer_range", "max_position_embeddings")


class CorruptCheckpoint(Exception):
    """A checkpoint that cannot be read, or whose content is not what was saved."""


@dataclasses.dataclass(frozen=True)
class ArrayEntry:
    """Shape, dtype name and checksum of one saved array."""

    shape: tuple[int, ...]
    dtype: str
    checksum: int

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class CheckpointRecord:
    """Everything in a checkpoint but the numbers.

    Attributes:
      step: training steps taken.
      data_states: for each process, the position of its data iterator: JSON or bytes.
      meta: what the caller wants kept (model settings, seed); JSON.
      arrays: entries by path, such as `params/layers/mlp/up_proj/kernel`.
    """

    step: int
    data_states: tuple[Any, ...]
    meta: dict[str, Any]
    arrays: Mapping[str, ArrayEntry]

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object that carries a checksum of itself."""
        record = {
            "format": FORMAT,
            "step": self.step,
            "data_states": [_encode_data_state(state) for state in self.data_states],
            "meta": self.meta,
            "arrays": {path: dataclasses.asdict(entry) for path, entry in self.arrays.items()},
        }
        record = _as_json(record)
        return {"crc32": _crc32(record), "record": record}

    @classmethod
    def from_json(cls, value: Any) -> "CheckpointRecord":
        """Reads what `to_json` wrote.

        Raises:
          CorruptCheckpoint: something is missing or altered.
          UserError: the checkpoint was written by a later version of this library.
        """
        if not isinstance(value, dict) or not isinstance(value.get("record"), dict):
            raise CorruptCheckpoint("its record is not a JSON object")
        record = value["record"]
        if _crc32(record) != value.get("crc32"):
            raise CorruptCheckpoint("its record does not match its checksum")
        if record["format"] != FORMAT:
            raise UserError(
                f"the checkpoint of step {record['step']} has format {record['format']}; this "
                f"version of tw_jax reads format {FORMAT}: install the version that wrote it"
            )
        return cls(
            step=record["step"],
            data_states=tuple(_decode_data_state(state) for state in record["data_states"]),
            meta=record["meta"],
            arrays={
                path: ArrayEntry(tuple(entry["shape"]), entry["dtype"], entry["checksum"])
                for path, entry in record["arrays"].items()
            },
        )

    def own_data_state(self) -> Any:
        """The data position for this process.

        Raises:
          UserError: positions differ between processes and the number of processes changed.
        """
        states = self.data_states
        if len(states) == jax.process_count():
            return states[jax.process_index()]
        if all(state == states[0] for state in states):
            return states[0]
        raise UserError(
            f"the checkpoint of step {self.step} holds the data positions of {len(states)} "
            f"processes, which differ, but this run has {jax.process_count()}: resume it with "
            f"{len(states)} processes, or start a new run from its parameters alone"
        )


# --- arrays -------------------------------------------------------------------------------------


def flatten_by_path(trees: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of named trees by path, such as `params/layers/mlp/up_proj/kernel`."""
    found = {}
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            found[f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}"] = leaf
    return found


def describe_arrays(leaves: Mapping[str, Any]) -> dict[str, ArrayEntry]:
    """Entries for arrays by path; checksums are computed where the arrays lie."""
    sums = jax.device_get(_checksums(list(leaves.values())))
    return {
        path: ArrayEntry(tuple(np.shape(leaf)), jnp.result_type(leaf).name, int(total))
        for (path, leaf), total in zip(leaves.items(), sums, strict=True)
    }


def check_content(record: CheckpointRecord, loaded: Mapping[str, Any]) -> None:
    """Compares loaded arrays with the checksums taken when they were saved.

    Raises:
      CorruptCheckpoint: names the first array that differs.
    """
    for path, entry in describe_arrays(loaded).items():
        if entry.checksum != record.arrays[path].checksum:
            raise CorruptCheckpoint(f"array {path} does not match its checksum")


@jax.jit
def _checksums(arrays: list[Array]) -> list[UInt32[Array, ""]]:
    return [_checksum(array) for array in arrays]


def _checksum(array: Array) -> UInt32[Array, ""]:
    """Sum modulo 2**32 of each element's bits times an odd weight that depends on its index.

    Integer sums have no order, so the result is the same on any number of devices and any sharding.
    An odd weight can be divided out again: no change of a single element goes unseen, and two
    elements that trade places are seen too.
    """
    if array.dtype == jnp.bool_:
        words = array.astype(jnp.uint32)
    else:
        word_type = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(array, word_type).astype(jnp.uint32)
    index = jax.lax.iota(jnp.uint32, words.size).reshape(words.shape)
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)


# --- does it fit this run? ----------------------------------------------------------------------


def check_fits(
    record: CheckpointRecord,
    wanted: Mapping[str, Any],
    expected_meta: Mapping[str, Any],
    where: str,
) -> None:
    """Refuses a checkpoint whose arrays or settings are not the ones of this run.

    Args:
      record: the checkpoint's record.
      wanted: arrays of this run, or their abstract values, by path.
      expected_meta: settings that the checkpoint's meta must have; empty to ask for none.
      where: the checkpoint, in words.

    Raises:
      UserError: names the first array that differs, both shapes, and every setting that differs.
    """
    array = _first_difference(record, wanted)
    settings = _setting_differences(record.meta, _as_json(dict(expected_meta)))
    if array is None and not settings:
        return
    sentences = [f"{where} does not fit this run"]
    if array:
        sentences.append(f"First array that differs: {array}")
    if settings:
        sentences.append(f"Settings that differ: {'; '.join(settings)}")
    if not settings and array and array.startswith(f"{REST}/"):
        sentences.append(
            "The optimizer is another one: use the settings that the checkpoint was trained with, "
            "or start a new run from its parameters alone"
        )
    else:
        sentences.append(
            "Use the settings that the checkpoint was trained with, or give the new run another "
            "directory"
        )
    raise UserError(". ".join(sentences))


def _first_difference(record: CheckpointRecord, wanted: Mapping[str, Any]) -> str | None:
    roots = {path.partition("/")[0] for path in wanted}
    saved = {p: entry for p, entry in record.arrays.items() if p.partition("/")[0] in roots}
    for path in [*wanted, *saved]:
        there = str(saved[path]) if path in saved else "absent"
        here = "absent"
        if path in wanted:
            here = f"{jnp.result_type(wanted[path]).name}{list(np.shape(wanted[path]))}"
        if here != there:
            return f"{path} (checkpoint: {there}, this run: {here})"
    return None


def _setting_differences(saved: Any, expected: Any, prefix: str = "") -> list[str]:
    """Expected values that are not the saved ones, as `model.hidden_size (checkpoint: ...)`.

    A setting that is null here may be absent there: it did not exist when the checkpoint was made.
    """
    differences = []
    for name, here in expected.items():
        there = saved.get(name, None if here is None else "absent")
        if isinstance(here, dict) and isinstance(there, dict):
            differences += _setting_differences(there, here, f"{prefix}{name}.")
        elif here != there and name not in _FREE_SETTINGS:
            differences.append(f"{prefix}{name} (checkpoint: {there}, this run: {here})")
    return differences


# --- positions in the data ----------------------------------------------------------------------


def gather_data_states(state: Any) -> tuple[Any, ...]:
    """Every process's data position, in the order of processes; all of them must call it."""
    if jax.process_count() == 1:
        return (state,)
    gathered = gathered_bytes(json.dumps(_encode_data_state(state)).encode())
    return tuple(_decode_data_state(json.loads(data)) for data in gathered)


def _encode_data_state(state: Any) -> dict[str, Any]:
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    return {"json": state}


def _decode_data_state(value: Mapping[str, Any]) -> Any:
    return base64.b64decode(value["base64"]) if "base64" in value else value["json"]


def _as_json(value: Any) -> Any:
    """The value as it will read back: tuples become lists, keys text."""
    return json.loads(json.dumps(value))


def _crc32(record: Any) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
