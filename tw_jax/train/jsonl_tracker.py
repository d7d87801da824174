"""Metrics as JSON lines: `metrics.jsonl`, which every run has."""

import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from tw_jax.errors import UserError

_logger = logging.getLogger(__name__)
_RESERVED = ("step", "time", "text")


class JsonlTracker:
    """One JSON object per line: `step`, `time` (seconds since 1970) and the metrics.

    A text has its own line, `{"step": ..., "time": ..., "text": {name: text}}`. Numbers that are
    not finite become null, which every JSON reader accepts. Each line is flushed at once.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int = 0):
        """Opens the file.

        Args:
          path: the file, created if need be.
          resume_step: lines of later steps are dropped; 0 starts the file afresh.

        Raises:
          UserError: the file cannot be read or written.
        """
        self._path = pathlib.Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            keep_until(self._path, resume_step)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from error

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line.

        Raises:
          UserError: the disk refuses it.
        """
        taken = [name for name in metrics if name in _RESERVED]
        if taken:
            raise ValueError(f"metrics must not be named {', '.join(taken)}")
        self._write(step, {name: json_number(value) for name, value in metrics.items()})

    def log_text(self, step: int, name: str, text: str) -> None:
        """Appends one line.

        Raises:
          UserError: the disk refuses it.
        """
        self._write(step, {"text": {name: text}})

    def close(self) -> None:
        """Closes the file; every line is already in it."""
        self._file.close()

    def _write(self, step: int, content: Mapping[str, Any]) -> None:
        line = {"step": int(step), "time": round(time.time(), 3), **content}
        try:
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write metrics to {self._path}: {error.strerror or error}; make room or "
            "choose another run_dir, then run the same command again"
        )


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads what `JsonlTracker` wrote, in order; a line cut short by a crash is left out.

    Raises:
      UserError: there is no such file.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"cannot read metrics from {path}: {error.strerror or error}; name the folder of a run"
        ) from error
    return [line for line in map(parsed_line, text.split("\n")) if line is not None]


def keep_until(path: pathlib.Path, resume_step: int) -> None:
    """Rewrites a file of JSON lines without those after `resume_step`, in one atomic move.

    Lines without a step, such as one cut short by a crash, go too; 0 keeps none.
    """
    if not path.exists():
        return
    unreadable = 0
    fresh = path.with_name(f"{path.name}.new")
    with (
        path.open(encoding="utf-8", errors="replace") as lines,
        fresh.open("w", encoding="utf-8") as kept,
    ):
        for line in lines if resume_step else ():
            content = parsed_line(line)
            unreadable += content is None
            if content is not None and content["step"] <= resume_step:
                kept.write(line.removesuffix("\n") + "\n")
    if unreadable:
        _logger.warning(f"{path}: dropped {unreadable} lines that could not be read")
    os.replace(fresh, path)


def parsed_line(line: str) -> dict[str, Any] | None:
    """The object of a line, None where it is none or has no step."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    has_step = isinstance(content, dict) and isinstance(content.get("step"), int)
    return content if has_step else None


def json_number(value: Any) -> int | float | None:
    """A scalar as JSON writes it; None where it is not finite."""
    if isinstance(value, int):
        return int(value)
    value = float(value)
    return value if math.isfinite(value) else None
