"""Metrics for Weights & Biases, where its package is installed."""

import html
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any, Literal

import yaml

from tw_jax.errors import UserError

WandbMode = Literal["online", "offline"]

_ID_FILE = "wandb_id.txt"  # beside the run's checkpoints, so that a resumed run is the same run


class WandbTracker:
    """One W&B run per run folder; a resumed run goes on in it.

    W&B takes no step twice: where a run resumes from an older checkpoint, it keeps what it has of
    the steps that are run again, and takes the rest.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        project: str,
        name: str | None,
        mode: WandbMode,
        resume_step: int = 0,
    ):
        """Starts or resumes the run.

        Args:
          run_dir: the run's folder; holds the run's id, W&B's own files, and the `config.yaml` that
            is shown as the run's configuration.
          project: W&B's project.
          name: shown name of the run; None takes the folder's.
          mode: "offline" keeps everything in `run_dir/wandb`, for `wandb sync` later.
          resume_step: 0 starts a new run.

        Raises:
          UserError: the package is missing, or W&B refuses to start.
        """
        try:
            # Names, not the module: a folder called `wandb` would be importable as well.
            from wandb import Html, init  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                "tracker.wandb needs the package wandb: `pip install wandb`, or set "
                "tracker.wandb=false"
            ) from error
        folder = pathlib.Path(run_dir)
        self._html = Html
        try:
            self._run = init(
                project=project,
                name=name or folder.resolve().name,
                id=_run_id(folder, resume_step),
                resume="allow",
                mode=mode,
                dir=str(folder),
                config=_run_config(folder),
            )
        except Exception as error:  # its own classes, and those of its network libraries
            raise UserError(
                f"Weights & Biases does not start ({error}); log in with `wandb login`, or set "
                "tracker.wandb_mode=offline or tracker.wandb=false"
            ) from error

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hands the numbers over; W&B sends them in the background."""
        self._run.log({name: float(value) for name, value in metrics.items()}, step=int(step))

    def log_text(self, step: int, name: str, text: str) -> None:
        """Hands a text over as preformatted HTML, escaped: it may come from a model."""
        self._run.log({name: self._html(f"<pre>{html.escape(text)}</pre>")}, step=int(step))

    def close(self) -> None:
        """Waits until W&B has what it was given."""
        self._run.finish()


def _run_id(folder: pathlib.Path, resume_step: int) -> str:
    path = folder / _ID_FILE
    if resume_step and path.exists():
        return path.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:12]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(run_id + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return run_id


def _run_config(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
