"""Parallel groups of line ranges into blocks: pure, deterministic, and no line is lost.

What an LLM said of a trace is only believed as far as it can be laid out without moving a line:
the order of the text never changes, and what no thread covers stays sequential where it was.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from tw_jax.trajectory.block_checks import MAX_OUTLINES


@dataclasses.dataclass(frozen=True)
class LineSpan:
    """Lines `first` to `last` of a trace, both included, counted from 1."""

    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Threads that an LLM holds to be independent.

    Attributes:
      threads: their lines, as they were answered.
      reason: why they are independent.
    """

    threads: tuple[LineSpan, ...]
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Block:
    """Neighbouring threads that together cover a run of lines without a gap.

    Attributes:
      group: index of the group it came from.
      threads: their lines, in text order.
      reason: why they are independent.
    """

    group: int
    threads: tuple[LineSpan, ...]
    reason: str = ""

    @property
    def span(self) -> LineSpan:
        """All lines of the block."""
        return LineSpan(self.threads[0].first, self.threads[-1].last)


@dataclasses.dataclass(frozen=True)
class Drop:
    """A group, or a part of one, that stays sequential.

    Attributes:
      group: index of the group.
      kind: `too_few_threads`, `outside_trace`, `overlapping_threads`, `overlapping_groups`,
        `uncovered_lines`, `empty_thread`, `too_many_threads` or `too_little_saved`; later stages
        add kinds of their own.
      message: what was found.
    """

    group: int
    kind: str
    message: str


def extract(
    lines: Sequence[str], groups: Sequence[Group], min_saved_chars: int
) -> tuple[list[Block], list[Drop]]:
    """Lays groups out as blocks.

    Blank lines between two threads go to the thread before them. Other lines that no thread covers
    part the group there: two or more threads without such lines between them are a block, a single
    one stays sequential.

    Args:
      lines: of the trace.
      groups: as they were answered; of two that overlap, the earlier one stays.
      min_saved_chars: what a block must save at least.

    Returns:
      The blocks in text order, and what was dropped.
    """
    blocks: list[Block] = []
    drops: list[Drop] = []
    taken: list[LineSpan] = []
    for index, group in enumerate(groups):
        problem = _problem(group, len(lines), taken)
        if problem is not None:
            drops.append(Drop(index, *problem))
            continue
        taken.append(LineSpan(group.threads[0].first, group.threads[-1].last))
        for run in _runs(lines, group.threads):
            problem = _run_problem(lines, run, min_saved_chars)
            if problem is not None:
                drops.append(Drop(index, *problem))
            else:
                blocks.append(Block(index, tuple(run), group.reason))
    return sorted(blocks, key=lambda block: block.span.first), drops


def _problem(group: Group, n_lines: int, taken: Sequence[LineSpan]) -> tuple[str, str] | None:
    threads = group.threads
    if len(threads) < 2:
        return "too_few_threads", f"{len(threads)} threads; a block has two or more"
    for thread in threads:
        if not 1 <= thread.first <= thread.last <= n_lines:
            return (
                "outside_trace",
                f"lines {thread.first} to {thread.last}; the trace has 1 to {n_lines}",
            )
    for before, after in zip(threads, threads[1:], strict=False):
        if after.first <= before.last:
            return (
                "overlapping_threads",
                f"lines {after.first} to {after.last} do not follow lines {before.first} to "
                f"{before.last}",
            )
    first, last = threads[0].first, threads[-1].last
    for other in taken:
        if first <= other.last and other.first <= last:
            return (
                "overlapping_groups",
                f"lines {first} to {last} overlap a group of lines {other.first} to {other.last}",
            )
    return None


def _runs(lines: Sequence[str], threads: Sequence[LineSpan]) -> Iterator[list[LineSpan]]:
    """Threads without uncovered text between them, blank lines added to the thread before."""
    run = [threads[0]]
    for thread in threads[1:]:
        between = lines[run[-1].last : thread.first - 1]
        if any(line.strip() for line in between):
            yield run
            run = [thread]
        else:
            run[-1] = LineSpan(run[-1].first, thread.first - 1)
            run.append(thread)
    yield run


def _run_problem(
    lines: Sequence[str], run: Sequence[LineSpan], min_saved_chars: int
) -> tuple[str, str] | None:
    where = f"lines {run[0].first} to {run[-1].last}"
    if len(run) < 2:
        return "uncovered_lines", f"{where} have no neighbouring thread"
    if len(run) > MAX_OUTLINES:
        return "too_many_threads", f"{where}: {len(run)} threads; at most {MAX_OUTLINES}"
    sizes = [len(span_text(lines, thread).strip()) for thread in run]
    if not all(sizes):
        return "empty_thread", f"{where}: a thread holds blank lines only"
    saved = sum(sizes) - max(sizes)
    if saved < min_saved_chars:
        return "too_little_saved", f"{where} save {saved} characters of {min_saved_chars}"
    return None


def span_text(lines: Sequence[str], span: LineSpan) -> str:
    """The text of some lines."""
    return "\n".join(lines[span.first - 1 : span.last])
