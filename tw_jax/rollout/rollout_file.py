"""Finished rollouts as JSON lines, so that sampling that was killed goes on where it stopped.

One line holds `{"key", "rollout"}`. The key depends on the request and on what answers it, so a
changed prompt, budget, seed or model is sampled again. A line is written with one call:
what a crash tore is the last line at most, which is dropped when the file is opened again.
Unknown log-probabilities are null.
"""

import collections
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tw_jax.errors import UserError
from tw_jax.rollout.request import Request
from tw_jax.rollout.rollout import Rollout, RolloutUnit
from tw_jax.trajectory.trajectory import OutlineSpan, ParallelBlock, ThreadSpan, Trajectory

OnFinish = Callable[[int, Rollout], None]
Generate = Callable[[Sequence[Request], OnFinish], Any]

# Ended from outside: sampled again by whoever asks again.
_UNFINISHED = ("cancelled", "deadline")


def generate_resumably(
    path: str | os.PathLike[str],
    requests: Sequence[Request],
    generate: Generate,
    *,
    source: str,
    on_finish: OnFinish | None = None,
) -> list[Rollout]:
    """Samples what a file does not hold yet, and appends every rollout as it finishes.

    Rollouts that a deadline or the caller ended are returned, but not written.

    Args:
      path: the file; made where there is none.
      requests: what to sample.
      generate: samples requests and hands (index, rollout) over as they finish:
        `RolloutEngine.generate` with its parameters, or `RolloutClient.generate`.
      source: what answers: a run and its step, a server's model. Rollouts of another are not taken.
      on_finish: called with (index, rollout), first for those that the file holds.

    Returns:
      Rollouts in the order of the requests.

    Raises:
      UserError: the file cannot be read or written, or what `generate` raises.
    """
    keys = request_keys(requests, source)
    with RolloutFile(path) as file:
        return generate_into(file, keys, requests, generate, on_finish=on_finish)


def generate_into(
    file: "RolloutFile",
    keys: Sequence[str],
    requests: Sequence[Request],
    generate: Generate,
    *,
    on_finish: OnFinish | None = None,
    parts: bool = True,
) -> list[Rollout]:
    """`generate_resumably` with an open file and the requests' keys.

    Args:
      file: what was sampled before, and takes the rest.
      keys: of the requests (`request_keys`).
      requests: what to sample.
      generate: see `generate_resumably`.
      on_finish: see `generate_resumably`.
      parts: write every rollout as it finishes. Else all at the end, and unless the file holds all
        of them, all are sampled: what is sampled together decides their last bits.
    """
    rollouts = {i: file.done[key] for i, key in enumerate(keys) if key in file.done}
    if not parts and len(rollouts) < len(keys):
        rollouts = {}
    for index, rollout in rollouts.items():
        if on_finish is not None:
            on_finish(index, rollout)
    missing = [i for i in range(len(requests)) if i not in rollouts]

    def write(index: int) -> None:
        if rollouts[index].finish_reason not in _UNFINISHED:
            file.append(keys[index], rollouts[index])

    def keep(position: int, rollout: Rollout) -> None:
        index = missing[position]
        rollouts[index] = rollout
        if parts:
            write(index)
        if on_finish is not None:
            on_finish(index, rollout)

    if missing:
        generate([requests[i] for i in missing], keep)
        for index in () if parts else missing:
            write(index)
    return [rollouts[index] for index in range(len(requests))]


def request_keys(requests: Sequence[Request], source: str) -> list[str]:
    """A key per request; equal requests differ by their number."""
    seen: collections.Counter[str] = collections.Counter()
    keys = []
    for request in requests:
        said = {
            "source": source,
            "prompt": [int(token) for token in request.prompt],
            "forced_prefix": [int(token) for token in request.forced_prefix],
            "seed": request.seed,
            "mode": request.mode,
            "sampling": dataclasses.asdict(request.sampling),
        }
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:24]
        keys.append(f"{digest}-{seen[digest]}")
        seen[digest] += 1
    return keys


class RolloutFile:
    """The file, open for appending; use it as `with RolloutFile(path) as file`.

    Attributes:
      done: the rollouts it holds, by key.
    """

    def __init__(self, path: str | os.PathLike[str], *, sync: bool = True) -> None:
        """Reads the file and drops a torn last line.

        Args:
          path: the file; made where there is none.
          sync: wait until what is written is on the disk.

        Raises:
          UserError: it cannot be opened, or holds a line that is no rollout.
        """
        self._path, self._sync = pathlib.Path(path), sync
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            data = self._path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.ftruncate(self._descriptor, whole)
        except OSError as error:
            raise UserError(f"rollouts {path}: cannot be opened ({error.strerror})") from error
        self.done: dict[str, Rollout] = {}
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self.done[entry["key"]] = rollout_from_json(entry["rollout"])
            except (ValueError, KeyError, TypeError) as error:
                os.close(self._descriptor)
                raise UserError(
                    f"{self._path}:{number}: not a rollout ({type(error).__name__}: {error}); "
                    "delete the line, and it is sampled again"
                ) from error

    def __enter__(self) -> "RolloutFile":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def append(self, key: str, rollout: Rollout) -> None:
        """Writes one rollout for good.

        Raises:
          UserError: the file cannot be written.
        """
        line = json.dumps({"key": key, "rollout": rollout_to_json(rollout)}, allow_nan=False)
        data = line.encode() + b"\n"
        try:
            written = os.write(self._descriptor, data)
            if written < len(data):
                raise OSError(None, f"{written} of {len(data)} bytes written; is the disk full?")
            if self._sync:
                os.fsync(self._descriptor)
        except OSError as error:
            raise UserError(f"rollouts {self._path}: cannot write ({error.strerror})") from error


def rollout_to_json(rollout: Rollout) -> dict[str, Any]:
    """A rollout as plain JSON; nothing is lost."""
    fields = rollout_fields(rollout)
    tokens = fields["trajectory"]["tokens"].tolist()
    units = []
    for unit in fields["units"]:
        logprobs = [None if math.isnan(p) else p for p in unit["logprobs"].tolist()]
        units.append({**unit, "completion": unit["completion"].tolist(), "logprobs": logprobs})
    return {**fields, "trajectory": {**fields["trajectory"], "tokens": tokens}, "units": units}


def rollout_fields(rollout: Rollout) -> dict[str, Any]:
    """A rollout as plain dicts and lists, with its arrays as they are."""
    trajectory = rollout.trajectory
    return {
        **vars(rollout),
        "trajectory": {
            **vars(trajectory),
            "blocks": [dataclasses.asdict(block) for block in trajectory.blocks],
        },
        "units": [dict(vars(unit)) for unit in rollout.units],
    }


def rollout_from_json(value: Mapping[str, Any]) -> Rollout:
    """The rollout that `rollout_to_json` wrote, or `rollout_fields`.

    Raises:
      KeyError: a field is missing.
      TypeError: a field is of another type or unknown.
    """
    trajectory = value["trajectory"]
    units = tuple(
        RolloutUnit(
            **{
                **unit,
                "completion": np.array(unit["completion"], np.int32),
                "logprobs": np.array(unit["logprobs"], np.float32),  # null becomes NaN
            }
        )
        for unit in value["units"]
    )
    blocks = tuple(_block(block) for block in trajectory["blocks"])
    tokens = np.array(trajectory["tokens"], np.int32)
    whole = Trajectory(**{**trajectory, "tokens": tokens, "blocks": blocks})
    return Rollout(**{**value, "trajectory": whole, "units": units})


def _block(value: Mapping[str, Any]) -> ParallelBlock:
    outlines = tuple(OutlineSpan(**outline) for outline in value["outlines"])
    threads = tuple(
        ThreadSpan(**{**thread, "replaced": tuple(thread["replaced"])})
        for thread in value["threads"]
    )
    return ParallelBlock(**{**value, "outlines": outlines, "threads": threads})
