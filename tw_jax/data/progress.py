"""What a person sees of a long loop: a bar in a terminal, now and then a line elsewhere."""

import collections
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

_WINDOW_S = 60.0  # rates are means over about this long
_MARK_EVERY_S = 0.1
_QUIET_S = 5.0  # loops shorter than this print no plain lines
_LINE_EVERY_S = 30.0

Clock = Callable[[], float]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast a loop goes.

    Attributes:
      steps_per_s: 0 before a step was timed.
      tokens_per_s: 0 where no tokens were counted.
      remaining_s: estimated seconds to the last step; None before a step was timed, or where nobody
        knows how many there are.
    """

    steps_per_s: float
    tokens_per_s: float
    remaining_s: float | None


class RateMeter:
    """Means over the last minute or so, without the first step, which compiles."""

    def __init__(self, total: int | None, start: int, clock: Clock):
        """Begins at step `start` of `total`; `clock` gives seconds."""
        self._total = total
        self._clock = clock
        # (seconds, step, tokens so far); the oldest is where the window begins
        self._marks: collections.deque[tuple[float, int, int]] = collections.deque()
        self._begin = (clock(), start, 0)
        self._step, self._tokens = start, 0

    def count(self, step: int, tokens: int) -> None:
        """Records that `step` steps are done, and `tokens` tokens more than before."""
        self._tokens += tokens
        now = self._clock()
        if self._marks and step == self._step:
            self._marks[-1] = (self._marks[-1][0], step, self._tokens)
            return
        self._step = step
        if len(self._marks) > 2 and now - self._marks[-2][0] < _MARK_EVERY_S:
            self._marks.pop()  # a minute of very short steps would be a lot of marks
        self._marks.append((now, step, self._tokens))
        while len(self._marks) > 2 and self._marks[1][0] < now - _WINDOW_S:
            self._marks.popleft()

    def rates(self) -> Rates:
        """Rates as of the last counted step."""
        if not self._marks:
            return Rates(0.0, 0.0, None)
        # With one step done there is nothing better than to count compilation in.
        first = self._marks[0] if len(self._marks) > 1 else self._begin
        last = self._marks[-1]
        seconds = max(last[0] - first[0], 1e-9)
        steps = last[1] - first[1]
        remaining = None
        if steps > 0 and self._total is not None:
            remaining = (self._total - last[1]) * seconds / steps
        return Rates(steps / seconds, (last[2] - first[2]) / seconds, remaining)


class _Display(Protocol):
    def show(self, step: int, status: str) -> None: ...


class ShownProgress:
    """Counts steps and tokens and shows them; made by `shown_progress`."""

    def __init__(self, meter: RateMeter, display: _Display, unit: str):
        self._meter = meter
        self._display = display
        self._unit = unit
        self._metrics: dict[str, Any] = {}

    @property
    def tokens_per_s(self) -> float:
        """Mean rate of about the last minute, without the step that compiled."""
        return self._meter.rates().tokens_per_s

    def update(
        self, step: int, *, tokens: int = 0, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Shows a new state.

        Args:
          step: steps done so far; the same step may be reported again.
          tokens: tokens handled since the last call.
          metrics: a few numbers to show; they stay until replaced.
        """
        self._meter.count(step, tokens)
        self._metrics.update(metrics or {})
        rates = self._meter.rates()
        words = [f"{name} {float(value):.4g}" for name, value in self._metrics.items()]
        if self._unit and rates.steps_per_s:
            words.append(f"{rates.steps_per_s:,.3g} {self._unit}/s")
        if rates.tokens_per_s:
            words.append(f"{rates.tokens_per_s:,.0f} tokens/s")
        if rates.remaining_s is not None:
            words.append(f"{duration(rates.remaining_s)} left")
        self._display.show(step, ", ".join(words))


@contextmanager
def shown_progress(
    description: str,
    total: int | None,
    start: int = 0,
    *,
    unit: str = "",
    console: Console | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[ShownProgress]:
    """Shows the progress of a loop while the block runs.

    In a terminal: a bar that is redrawn in place. Elsewhere (a log file, a notebook's kernel): a
    line every half minute, and one at the end of anything that took more than five seconds. In a
    run of several processes only the first shows anything.

    Args:
      description: what is going on, in a word or two.
      total: number of steps; None where nobody knows.
      start: steps done before, in a resumed run.
      unit: what a step is, where its rate is to be shown.
      console: where to show it; standard output by default.
      clock: seconds since some moment.

    Yields:
      The object to `update` after each step.
    """
    console = console or Console(file=sys.stdout)
    meter = RateMeter(total, start, clock)
    if jax.process_index() != 0:
        yield ShownProgress(meter, _Silence(), unit)
    elif console.is_interactive:
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
        )
        with bar:
            task = bar.add_task(description, total=total, completed=start, status="")
            yield ShownProgress(meter, _Bar(bar, task), unit)
    else:
        lines = _Lines(console, description, total, clock)
        try:
            yield ShownProgress(meter, lines, unit)
        finally:
            lines.finish()


def counted(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields items and shows their number, the rate and, of a known total, the time left."""
    with shown_progress(description, total, unit="records") as progress:
        for number, item in enumerate(items, start=1):
            yield item
            progress.update(number)


class _Silence:
    def show(self, step: int, status: str) -> None:
        pass


class _Bar:
    def __init__(self, bar: Progress, task: TaskID):
        self._bar, self._task = bar, task

    def show(self, step: int, status: str) -> None:
        self._bar.update(self._task, completed=step, status=status)


class _Lines:
    """Plain lines, few enough for a log file."""

    def __init__(self, console: Console, description: str, total: int | None, clock: Clock):
        self._console, self._clock = console, clock
        self._description, self._of = description, "" if total is None else f"/{total}"
        self._begin = clock()
        self._next_s = self._begin + _QUIET_S
        self._latest = ""
        self._printed = ""

    def show(self, step: int, status: str) -> None:
        self._latest = f"{self._description} {step}{self._of}" + (status and f": {status}")
        if self._clock() >= self._next_s:
            self._print()

    def finish(self) -> None:
        if self._clock() - self._begin >= _QUIET_S and self._latest != self._printed:
            self._print()

    def _print(self) -> None:
        self._console.print(self._latest, markup=False, highlight=False, soft_wrap=True)
        self._printed = self._latest
        self._next_s = self._clock() + _LINE_EVERY_S


def duration(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
