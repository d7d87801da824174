"""Where metrics go: a JSON-lines file, TensorBoard, Weights & Biases, or several of them.

A resumed run goes on from a checkpoint, so what was logged after that checkpoint would appear
twice. Every tracker therefore takes the step it resumes from and drops what came later.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

from tw_jax.train.jsonl_tracker import JsonlTracker
from tw_jax.train.tensorboard_tracker import TensorBoardTracker
from tw_jax.train.wandb_tracker import WandbMode, WandbTracker


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
      wandb: also log to Weights & Biases; needs the package wandb.
      wandb_project: project of the W&B run.
      wandb_name: name of the W&B run; null takes the run's folder.
      wandb_mode: "offline" keeps everything in the run's folder, for `wandb sync` later.
    """

    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "tw_jax"
    wandb_name: str | None = None
    wandb_mode: WandbMode = "online"


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
        with contextlib.ExitStack() as stack:  # one that fails does not keep the others open
            for tracker in self._trackers:
                stack.callback(tracker.close)

    def __enter__(self) -> "CompositeTracker":
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self.close()


def make_tracker(
    config: TrackerConfig, run_dir: str | os.PathLike[str], *, resume_step: int = 0
) -> CompositeTracker:
    """Opens the trackers of a run: `metrics.jsonl` and, if asked for, TensorBoard and W&B.

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
    trackers: list[Tracker] = []
    # What can fail for want of a package comes first, before files are cut.
    if config.wandb:
        trackers.append(
            WandbTracker(
                folder,
                project=config.wandb_project,
                name=config.wandb_name,
                mode=config.wandb_mode,
                resume_step=resume_step,
            )
        )
    trackers.append(JsonlTracker(folder / "metrics.jsonl", resume_step=resume_step))
    if config.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard", resume_step=resume_step))
    return CompositeTracker(trackers)
