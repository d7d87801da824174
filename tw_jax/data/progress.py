"""Progress of long passes over data: how many, how fast, how long."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import rich.console
import rich.progress
import rich.text

T = TypeVar("T")


def counted(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields items and shows their number, the rate and the time; on a terminal only.

    Args:
      items: any number of them.
      description: what is being done.
      total: how many there will be, for the time left; None where nobody knows.
    """
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    columns = [
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        _RateColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
    ]
    with rich.progress.Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task)


class _RateColumn(rich.progress.ProgressColumn):
    """Items per second."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        """The rate of a task."""
        return rich.text.Text(f"{task.speed:,.0f}/s" if task.speed else "")
