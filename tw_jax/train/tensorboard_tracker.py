"""Metrics as TensorBoard's event files."""

import os
import time
from collections.abc import Mapping
from typing import Any

from tw_jax.errors import UserError


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
