"""Where metrics go: a JSON-lines file, TensorBoard, or both.

A resumed run goes on from a checkpoint, so what was logged after that checkpoint would appear
twice. Every tracker therefore takes the step it resumes from and drops what came later.
"""

import dataclasses
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

from tw_jax.errors import UserError

_logger = logging.getLogger(__name__)
_RESERVED = ("step", "time", "text")


class Tracker(Protocol):
    """Takes metrics and texts, each with the training step that it belongs to."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs numbers: Python, NumPy or JAX scalars."""
        ...

    def log_text(self, step: int, name: str, text: str) -> None:
        """Logs a text, such as a sampled trajectory."""
        ...

    def close(self) -> None:
        """Writes out what is still held back."""
        ...


@dataclasses.dataclass(frozen=True)
class TrackerConfig:
    """Where metrics go besides `metrics.jsonl`, which is always written.

    Attributes:
      tensorboard: also write event files for TensorBoard.
    """

    tensorboard: bool = True


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
            _keep_until(self._path, resume_step)
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
        self._write(step, {name: _number(value) for name, value in metrics.items()})

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


class TensorBoardTracker:
    """Event files that `tensorboard --logdir` shows."""

    def __init__(self, directory: str | os.PathLike[str], *, resume_step: int = 0):
        """Opens a new event file.

        Args:
          directory: where the event files lie.
          resume_step: TensorBoard hides events of later steps in earlier files; 0 hides them all.

        Raises:
          UserError: tensorboardX is missing or the directory cannot be written.
        """
        try:
            from tensorboardX import SummaryWriter  # slow to import, and not always wanted
        except ImportError as error:
            raise UserError(
                "tracker.tensorboard needs tensorboardX: `pip install tensorboardX`, or set "
                "tracker.tensorboard=false"
            ) from error
        try:
            self._writer = SummaryWriter(
                str(directory),
                purge_step=resume_step + 1 if resume_step else 0,
                flush_secs=10,
                # Its own names count whole seconds: a quick restart would overwrite the last file.
                filename_suffix=f".{time.time_ns()}",
            )
        except OSError as error:
            raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Writes a text as a code block, so that tags and line breaks stay visible."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer.add_text(name, indented, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class CompositeTracker:
    """Passes everything on to several trackers; a context manager that closes them."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = tuple(trackers)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs to every tracker."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Logs to every tracker."""
        for tracker in self._trackers:
            tracker.log_text(step, name, text)

    def close(self) -> None:
        """Closes every tracker."""
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> "CompositeTracker":
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self.close()


def make_tracker(
    config: TrackerConfig, run_dir: str | os.PathLike[str], *, resume_step: int = 0
) -> CompositeTracker:
    """Opens the trackers of a run: `metrics.jsonl` and, if asked for, `tensorboard/`.

    Args:
      config: which trackers.
      run_dir: the run's folder.
      resume_step: the step the run resumes from, 0 for a new run.

    Returns:
      A context manager. In all processes but the first it drops what it is given.

    Raises:
      UserError: a file cannot be written, or a package is missing.
    """
    if jax.process_index() != 0:
        return CompositeTracker(())
    folder = pathlib.Path(run_dir)
    trackers: list[Tracker] = [
        JsonlTracker(folder / "metrics.jsonl", resume_step=resume_step),
    ]
    if config.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard", resume_step=resume_step))
    return CompositeTracker(trackers)


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
    return [line for line in map(_parsed, text.splitlines()) if line is not None]


def _keep_until(path: pathlib.Path, resume_step: int) -> None:
    """Rewrites the file without the lines after `resume_step`, in one atomic move."""
    if not path.exists():
        return
    kept: list[str] = []
    unreadable = 0
    if resume_step:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            content = _parsed(line)
            unreadable += content is None
            if content is not None and content["step"] <= resume_step:
                kept.append(line + "\n")
    if unreadable:
        _logger.warning(f"{path}: dropped {unreadable} lines that could not be read")
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text("".join(kept), encoding="utf-8")
    os.replace(fresh, path)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    has_step = isinstance(content, dict) and isinstance(content.get("step"), int)
    return content if has_step else None


def _number(value: Any) -> int | float | None:
    if isinstance(value, int):
        return int(value)
    value = float(value)
    return value if math.isfinite(value) else None
