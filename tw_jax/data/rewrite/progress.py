"""What a person sees of a rewriting run: a bar in a terminal, now and then a line elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_EVERY_S = 30.0


@contextmanager
def shown_progress(
    total: int,
    status: Callable[[], str],
    console: Console,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[], None]]:
    """Shows how many traces are done while the block runs.

    Args:
      total: number of traces.
      status: says what has been spent.
      console: where to show it.
      clock: seconds since some moment.

    Yields:
      A function to call whenever a trace is done.
    """
    done, began_s = 0, clock()
    next_line_s = began_s + _LINE_EVERY_S
    bar = Progress(
        TextColumn("rewriting"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_interactive,
    )
    task = bar.add_task("rewriting", total=total, status="")

    def advance() -> None:
        nonlocal done, next_line_s
        done += 1
        now_s = clock()
        words = f"{60 * done / max(now_s - began_s, 1e-9):.1f} traces/min, {status()}"
        bar.update(task, advance=1, status=words)
        if not console.is_interactive and now_s >= next_line_s:
            left_s = (now_s - began_s) * (total - done) / done
            console.print(f"rewriting {done}/{total}: {words}, {left_s:.0f} s left")
            next_line_s = now_s + _LINE_EVERY_S

    with bar:
        yield advance
