"""Watches rollouts in the terminal while they decode: threads grow side by side.

In a pipe there is nothing to redraw; there the joined text is printed as it grows.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence

import rich.console
import rich.live
import rich.panel
import rich.table
import rich.text

from tw_jax.evals.live_parts import ClosedBlock, GrowingThread, LiveParts, live_parts
from tw_jax.evals.sample import TextDecoder, decode_text, printable
from tw_jax.models import Params
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.live_text import LiveText, finished_text
from tw_jax.rollout.request import Request
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.session import Session

OnFinish = Callable[[int, Rollout], None]

# The engine comes back to the host after this many steps at the most, so that text grows smoothly.
STEPS_PER_LOOK = 8
_FRAME_S = 0.1
_RATE_WINDOW_S = 3.0
_LEAST_COLUMN = 24  # narrower columns are not read; threads then stand in several rows
_LEAST_LINES = 3


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the engine is.

    Attributes:
      steps: of the engine since the session began.
      tokens_per_s: of all rollouts, over the last seconds.
      finished: rollouts that have ended.
      running: rollouts in the engine.
      queued: rollouts that wait for a place.
    """

    steps: int
    tokens_per_s: float
    finished: int
    running: int
    queued: int


def watch_rollouts(
    engine: RolloutEngine,
    params: Params,
    requests: Sequence[Request],
    tokenizer: TextDecoder,
    console: rich.console.Console,
    *,
    on_finish: OnFinish | None = None,
) -> list[Rollout]:
    """Samples like `RolloutEngine.generate` and shows the oldest running rollout meanwhile.

    Args:
      engine: its `steps_per_dispatch` says how often there is something new to see.
      params: the model's parameters.
      requests: what to sample.
      tokenizer: decodes what is shown.
      console: where; what is drawn on a terminal is gone at the end.
      on_finish: called with (index, rollout) as rollouts finish.

    Returns:
      Rollouts in the order of the requests.

    Raises:
      UserError: a request does not fit the engine.
    """
    rollouts: dict[int, Rollout] = {}
    with engine.session(params) as session:
        for request in requests:
            session.submit(request)
        screen: _Screen | _Printer = _Printer(console, tokenizer)
        if console.is_terminal:
            screen = _Screen(console, engine, tokenizer, session)
        with screen:
            while session.busy:
                for index, rollout in session.poll():
                    rollouts[index] = rollout
                    screen.finish(index, rollout)
                    if on_finish is not None:
                        on_finish(index, rollout)
                screen.show(session)
    return [rollouts[index] for index in range(len(requests))]


class _Screen:
    """Redraws one frame in place."""

    def __init__(
        self,
        console: rich.console.Console,
        engine: RolloutEngine,
        tokenizer: TextDecoder,
        session: Session,
    ) -> None:
        self._console, self._schema, self._tokenizer = console, engine.schema, tokenizer
        self._live = rich.live.Live(console=console, auto_refresh=False, transient=True)
        self._finished = self._finished_tokens = 0
        self._drawn_s = float("-inf")
        self._seen: collections.deque[tuple[float, int]] = collections.deque()

    def __enter__(self) -> None:
        self._live.start()

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def finish(self, index: int, rollout: Rollout) -> None:
        """Counts a rollout that has ended."""
        self._finished += 1
        self._finished_tokens += rollout.total_tokens

    def show(self, session: Session) -> None:
        """Draws, unless the last frame is too fresh."""
        now_s = time.monotonic()
        if now_s - self._drawn_s < _FRAME_S or not session.running:
            return
        self._drawn_s = now_s
        texts = session.live()
        parts = {
            ticket: live_parts(text, self._schema, self._tokenizer)
            for ticket, text in texts.items()
        }
        tokens = self._finished_tokens + sum(part.total_tokens for part in parts.values())
        progress = Progress(
            steps=session.steps,
            tokens_per_s=self._rate(now_s, tokens),
            finished=self._finished,
            running=session.running,
            queued=session.queued,
        )
        oldest = min(texts)
        question = decode_text(self._tokenizer, texts[oldest].tokens[: texts[oldest].prompt_len])
        question = question.removeprefix(self._tokenizer.bos_token or "")
        frame = draw(self._console, question, parts[oldest], progress)
        self._live.update(frame, refresh=True)

    def _rate(self, now_s: float, tokens: int) -> float:
        """Tokens per second over the last few seconds."""
        self._seen.append((now_s, tokens))
        while len(self._seen) > 2 and now_s - self._seen[0][0] > _RATE_WINDOW_S:
            self._seen.popleft()
        (then_s, before), (now_s, after) = self._seen[0], self._seen[-1]
        return (after - before) / (now_s - then_s) if now_s > then_s else 0.0


class _Printer:
    """Prints joined text as it grows, one rollout after another."""

    def __init__(self, console: rich.console.Console, tokenizer: TextDecoder) -> None:
        self._console, self._tokenizer = console, tokenizer
        self._ended: dict[int, Rollout] = {}
        self._current = 0
        self._printed = ""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def finish(self, index: int, rollout: Rollout) -> None:
        """Keeps a rollout until those before it are printed."""
        self._ended[index] = rollout
        while (ended := self._ended.pop(self._current, None)) is not None:
            self._print(finished_text(ended))
            self._write("\n")
            self._current, self._printed = self._current + 1, ""

    def show(self, session: Session) -> None:
        """Prints what the rollout whose turn it is has gained."""
        text = session.live([self._current]).get(self._current)
        if text is not None:
            self._print(text)

    def _print(self, live: LiveText) -> None:
        # Half a character is left for the next look.
        whole = decode_text(self._tokenizer, live.tokens).rstrip("\N{REPLACEMENT CHARACTER}")
        text = printable(whole.removeprefix(self._tokenizer.bos_token or ""))
        if text.startswith(self._printed):
            self._write(text[len(self._printed) :])
            self._printed = text

    def _write(self, text: str) -> None:
        self._console.out(text, end="", highlight=False)


def draw(
    console: rich.console.Console, question: str, parts: LiveParts, progress: Progress
) -> rich.console.Group:
    """One frame that fits the console: question, text, threads, numbers."""
    width, height = console.width, max(console.height, 12)
    lines: list[rich.console.RenderableType] = [
        rich.text.Text(_one_line(question), style="bold", no_wrap=True, overflow="ellipsis")
    ]
    room = height - 3  # the question, the numbers, and a line for the cursor
    rows = _thread_rows(parts.threads, width)
    text_room = room if not rows else max(_LEAST_LINES, room // 3)
    tail = _tail(console, parts.sequential, width, text_room)
    lines += tail
    if rows:
        # Two lines of a panel are its border.
        each = max(_LEAST_LINES, (room - min(len(tail), text_room)) // len(rows) - 2)
        lines += [_columns(console, row, width, each) for row in rows]
    return rich.console.Group(*lines, _numbers(parts, progress))


def _tail(
    console: rich.console.Console, parts: Sequence[str | ClosedBlock], width: int, room: int
) -> list[rich.text.Text]:
    """The last lines of the sequential text; a closed block is one line."""
    lines: list[rich.text.Text] = []
    blocks = 0
    for part in parts:
        if isinstance(part, ClosedBlock):
            blocks += 1
            lines.append(_closed(blocks, part))
        else:
            text = rich.text.Text(printable(part.strip("\n")), overflow="fold")
            lines += text.wrap(console, width)
    return lines[-room:]


def _closed(number: int, block: ClosedBlock) -> rich.text.Text:
    counts = " + ".join(f"{tokens:,}" for tokens in block.thread_tokens)
    longest = max(block.thread_tokens, default=0)
    plural = "" if len(block.thread_tokens) == 1 else "s"
    return rich.text.Text(
        f"▸ block {number}: {len(block.thread_tokens)} thread{plural}, {counts} tokens, "
        f"longest {longest:,}",
        style="cyan",
        no_wrap=True,
        overflow="ellipsis",
    )


def _thread_rows(threads: Sequence[GrowingThread], width: int) -> list[Sequence[GrowingThread]]:
    """Threads side by side, in as many rows as their least width needs."""
    per_row = max(1, width // _LEAST_COLUMN)
    return [threads[i : i + per_row] for i in range(0, len(threads), per_row)]


def _columns(
    console: rich.console.Console, threads: Sequence[GrowingThread], width: int, lines: int
) -> rich.table.Table:
    """One panel per thread."""
    table = rich.table.Table.grid(expand=True)
    for _ in threads:
        table.add_column(ratio=1)
    inner = width // len(threads) - 4
    bodies = [
        list(rich.text.Text(printable(thread.text), overflow="fold").wrap(console, inner))
        for thread in threads
    ]
    # All panels of a row are as high as the longest text, as far as there is room.
    room = min(lines - 1, max(1, *map(len, bodies)))
    table.add_row(*(_panel(*pair, inner, room) for pair in zip(threads, bodies, strict=True)))
    return table


_STATE_STYLES = {"running": "yellow", "waiting to join": "green", "joined": "dim"}


def _panel(
    thread: GrowingThread, body: Sequence[rich.text.Text], inner: int, room: int
) -> rich.panel.Panel:
    """One thread: its plan, and the last lines of its text."""
    plan = rich.text.Text(_one_line(thread.outline), style="italic", no_wrap=True)
    plan.truncate(inner, overflow="ellipsis")
    shown = body[-room:]
    padding = [rich.text.Text("")] * (room - len(shown))
    style = _STATE_STYLES[thread.state]
    return rich.panel.Panel(
        rich.console.Group(plan, *shown, *padding),
        title=rich.text.Text(f"{_one_line(thread.number)} · {thread.tokens:,} tokens"),
        subtitle=rich.text.Text(thread.state, style=style),
        border_style=style,
    )


def _numbers(parts: LiveParts, progress: Progress) -> rich.text.Text:
    pieces = [
        f"{progress.tokens_per_s:,.0f} tokens/s",
        f"critical path {parts.critical_path:,} of {parts.total_tokens:,} tokens",
        f"step {progress.steps:,}",
    ]
    if progress.finished + progress.running + progress.queued > 1:
        pieces.append(
            f"{progress.finished} done, {progress.running} running, {progress.queued} queued"
        )
    return rich.text.Text(" · ".join(pieces), style="dim", no_wrap=True, overflow="ellipsis")


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
