"""Rollouts as bytes, for processes that exchange them: small structure as JSON, arrays as they are.

Reading millions of tokens as JSON would take every process longer than sampling a few.
"""

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.rollout_file import rollout_fields, rollout_from_json

_HEADER_LEN = struct.Struct("<Q")


def rollouts_to_bytes(rollouts: Sequence[Rollout]) -> bytes:
    """Rollouts in order; nothing is lost."""
    arrays: list[np.ndarray] = []

    def put_aside(fields: dict[str, Any], name: str, dtype: str) -> None:
        array = np.asarray(fields[name], dtype)
        arrays.append(array)
        fields[name] = len(array)

    structure = []
    for rollout in rollouts:
        fields = rollout_fields(rollout)
        put_aside(fields["trajectory"], "tokens", "<i4")
        for unit in fields["units"]:
            put_aside(unit, "completion", "<i4")
            put_aside(unit, "logprobs", "<f4")
        structure.append(fields)
    header = json.dumps(structure).encode()
    return b"".join((_HEADER_LEN.pack(len(header)), header, *(a.tobytes() for a in arrays)))


def rollouts_from_bytes(data: bytes) -> list[Rollout]:
    """The rollouts that `rollouts_to_bytes` was given."""
    (header_len,) = _HEADER_LEN.unpack_from(data)
    at = _HEADER_LEN.size + header_len

    def take(fields: dict[str, Any], name: str, dtype: str) -> None:
        nonlocal at
        array = np.frombuffer(data, dtype, count=fields[name], offset=at)
        at += array.nbytes
        fields[name] = array

    rollouts = []
    for fields in json.loads(data[_HEADER_LEN.size : at]):
        take(fields["trajectory"], "tokens", "<i4")
        for unit in fields["units"]:
            take(unit, "completion", "<i4")
            take(unit, "logprobs", "<f4")
        rollouts.append(rollout_from_json(fields))
    return rollouts
