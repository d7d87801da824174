"""`tw-jax data task`: problems of a task, solved, as a trajectory file."""

import dataclasses
import pathlib
from collections.abc import Iterator

from tw_jax.config_checks import require_at_least, require_seed, require_share
from tw_jax.data.trajectory_file import TrajectoryRecord, write_trajectories
from tw_jax.errors import UserError
from tw_jax.tasks.registry import TaskConfig, make_task
from tw_jax.tasks.task import Split, Task, choose_style


@dataclasses.dataclass(frozen=True)
class TaskFileConfig:
    """Problems to write.

    Attributes:
      task: makes and solves the problems.
      split: training or held-out ones; the splits share no problem.
      count: number of problems, from index 0.
      seed: of the problems and of the choice of styles.
      parallel_share: share of the problems that are solved in parallel.
      output: the file.
    """

    task: TaskConfig = TaskConfig()
    split: Split = "train"
    count: int = 1000
    seed: int = 0
    parallel_share: float = 0.5
    output: str = "trajectories.jsonl"

    def __post_init__(self) -> None:
        require_at_least(self, count=1)
        require_seed(self)
        require_share(self, "parallel_share")


def run_task_file(config: TaskFileConfig) -> int:
    """Writes the file and prints its path.

    Returns:
      0, the exit status.

    Raises:
      UserError: the file cannot be written.
    """
    task = make_task(config.task)
    share, path = config.parallel_share, config.output
    count = export_task(task, config.split, config.count, config.seed, share, path)
    print(f"{path}: {count:,} trajectories of {task.name}")
    return 0


def export_task(
    task: Task, split: Split, count: int, seed: int, parallel_share: float, path: str | pathlib.Path
) -> int:
    """Writes problems of a task, solved, as a trajectory file.

    Args:
      task: makes the problems.
      split: training or held-out ones.
      count: number of problems, from index 0.
      seed: of the problems and of the choice of styles.
      parallel_share: share of the problems that are solved in parallel, 0 to 1.
      path: the file.

    Returns:
      Number of lines.

    Raises:
      UserError: `parallel_share` is no share, or the file cannot be written.
    """
    if not 0 <= parallel_share <= 1:
        raise UserError(
            f"parallel_share is the share of parallel solutions, 0 to 1; got {parallel_share}"
        )

    def solved() -> Iterator[TrajectoryRecord]:
        for index in range(count):
            problem = task.problem(split, index, seed)
            style = choose_style(split, index, seed, parallel_share)
            yield TrajectoryRecord(
                prompt=problem.prompt,
                response=problem.response(style),
                answer=problem.answer,
                id=f"{task.name}/{split}/{seed}/{index}/{style}",
            )

    return write_trajectories(path, solved())
