"""The files of a self-training run; each appears whole or not at all."""

import dataclasses
import pathlib

from tw_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class OutputPaths:
    """Where the files of a run lie.

    Attributes:
      config: its settings.
      rollouts: folder of the finished rollouts, a file per round.
      trajectories: the set.
      dropped: every sample that is not in it, and why.
      rejects: problems that could not be asked, and why.
      report: counts and statistics.
    """

    config: pathlib.Path
    rollouts: pathlib.Path
    trajectories: pathlib.Path
    dropped: pathlib.Path
    rejects: pathlib.Path
    report: pathlib.Path

    def rollouts_of_round(self, number: int) -> pathlib.Path:
        """The file of a round, from 0."""
        return self.rollouts / f"{number:05d}.jsonl"


def is_used(paths: OutputPaths) -> bool:
    """Whether an earlier run has left a set or rollouts."""
    return paths.trajectories.exists() or (
        paths.rollouts.is_dir() and any(paths.rollouts.iterdir())
    )


def remove_set(paths: OutputPaths) -> bool:
    """Removes the set of an earlier run; returns whether there was one.

    Raises:
      UserError: it cannot be removed.
    """
    try:
        paths.trajectories.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{paths.trajectories}: cannot be removed ({error.strerror})") from error
    return True


def output_paths(folder: pathlib.Path) -> OutputPaths:
    """The files in a folder, which is made.

    Raises:
      UserError: it cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={folder}: cannot be made ({error.strerror})") from error
    return OutputPaths(
        config=folder / "config.yaml",
        rollouts=folder / "rollouts",
        trajectories=folder / "trajectories.jsonl",
        dropped=folder / "dropped.jsonl",
        rejects=folder / "rejects.jsonl",
        report=folder / "report.json",
    )
