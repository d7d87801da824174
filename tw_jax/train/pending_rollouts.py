"""Rollouts that no checkpoint covers yet, kept on disk as they finish: `pending/` of a run.

A run that is killed goes on from its last checkpoint, and the steps behind that one need not be
sampled again: their rollouts and grades are here. So the updates that are made again see what the
first ones saw, bit for bit, whatever was sampled together with whatever else.

    pending/000021/rollouts.0.jsonl     of step 21, of process 0 (`tw_jax.rollout.rollout_file`)
    pending/000021/grades.0.jsonl       how they were judged

A rollout is taken only for the same request to the same policy: the key of a line says which
training step's parameters were to sample, and under which settings they came about.
"""

import dataclasses
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from tw_jax.errors import UserError
from tw_jax.rewards.graders import Grade
from tw_jax.rollout.request import Request
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.rollout_file import (
    Generate,
    OnFinish,
    RolloutFile,
    generate_into,
    request_keys,
)

FOLDER = "pending"
_logger = logging.getLogger(__name__)


class PendingRollouts:
    """The folder of one run."""

    def __init__(self, run_dir: pathlib.Path, settings: str, process: int) -> None:
        """Opens nothing yet.

        Args:
          run_dir: of the run.
          settings: says under which settings parameters come about; rollouts of others are not
            taken.
          process: index of this process, which keeps what it samples itself.
        """
        self._folder, self._settings, self._process = run_dir / FOLDER, settings, process

    def step(self, step: int) -> "PendingStep":
        """What is kept of a step, counted from 0."""
        return PendingStep(self._folder / f"{step:06d}", self._settings, self._process)

    def forget_before(self, step: int) -> None:
        """Removes what a checkpoint at the beginning of `step` covers."""
        if not self._folder.is_dir():
            return
        for folder in self._folder.iterdir():
            if folder.name.isdigit() and int(folder.name) < step:
                shutil.rmtree(folder, ignore_errors=True)  # another process may be faster


class PendingStep:
    """Rollouts of one step that this process samples."""

    def __init__(self, folder: pathlib.Path, settings: str, process: int) -> None:
        """See `PendingRollouts.step`."""
        self._settings = settings
        self._rollouts = folder / f"rollouts.{process}.jsonl"
        self._grades = folder / f"grades.{process}.jsonl"

    def keys(self, requests: Sequence[Request], version: int) -> list[str]:
        """Names of the requests' rollouts.

        Args:
          requests: of this process.
          version: training steps behind the parameters that sample.
        """
        return request_keys(requests, f"step {version} of {self._settings}")

    def generate(
        self,
        keys: Sequence[str],
        requests: Sequence[Request],
        generate: Generate,
        *,
        on_finish: OnFinish,
        parts: bool,
    ) -> list[Rollout]:
        """Samples what is not there yet, and keeps it (`tw_jax.rollout.rollout_file`).

        Raises:
          UserError: the disk refuses it, or what `generate` raises.
        """
        with self._file() as file:
            return generate_into(file, keys, requests, generate, on_finish=on_finish, parts=parts)

    def grades(self, keys: Sequence[str]) -> dict[int, Grade]:
        """The grades that are there, by index of the key."""
        known = self._known_grades()
        return {i: known[key] for i, key in enumerate(keys) if key in known}

    def keep_grades(self, keys: Sequence[str], grades: Mapping[int, Grade]) -> None:
        """Keeps further grades, by index of the key.

        Raises:
          UserError: the disk refuses it.
        """
        lines = "".join(
            json.dumps({"key": keys[index], "grade": dataclasses.asdict(grade)}) + "\n"
            for index, grade in grades.items()
        )
        try:
            with self._grades.open("ab") as file:
                # A line that a crash tore is no part of the next one.
                torn = file.tell() and not _ends_with_line(self._grades)
                file.write(b"\n" * torn + lines.encode())
        except OSError as error:
            raise UserError(f"grades {self._grades}: cannot write ({error.strerror})") from error

    def is_whole(self, keys: Sequence[str]) -> bool:
        """Whether the rollouts of all keys are there."""
        if not self._rollouts.exists():
            return False
        with self._file() as file:
            return all(key in file.done for key in keys)

    def _file(self) -> RolloutFile:
        """The rollouts; a file that cannot be read is put aside, since all can be sampled again."""
        try:
            return RolloutFile(self._rollouts, sync=False)
        except UserError as error:
            aside = self._rollouts.with_suffix(".unreadable")
            self._rollouts.replace(aside)
            _logger.warning(f"{error}. Put aside as {aside}")
            return RolloutFile(self._rollouts, sync=False)

    def _known_grades(self) -> dict[str, Grade]:
        known = {}
        if self._grades.exists():
            for line in self._grades.read_bytes().splitlines():
                try:
                    entry: dict[str, Any] = json.loads(line)
                    known[entry["key"]] = Grade(**entry["grade"])
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a crash: graded again
        return known


def _ends_with_line(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
