"""Rates, and what is printed where."""

import io

import jax
import numpy as np
import pytest
from rich.console import Console

from tw_jax.data.progress import RateMeter, counted, duration, shown_progress


class Clock:
    """Seconds that only pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(console, step_seconds, steps, *, start=0, total=None):
    clock = Clock()
    total = start + steps if total is None else total
    with shown_progress("SFT", total, start, console=console, clock=clock) as progress:
        for step in range(start + 1, start + steps + 1):
            clock.now += step_seconds
            progress.update(step, tokens=100, metrics={"loss": 1 / step})
    return progress


def plain(step_seconds, steps, **kwargs):
    console = Console(file=io.StringIO(), width=40)
    run(console, step_seconds, steps, **kwargs)
    return console.file.getvalue().splitlines()


def test_rates_leave_out_the_first_step():
    clock = Clock()
    meter = RateMeter(10, 0, clock)
    assert meter.rates().remaining_s is None
    clock.now += 50  # compiles
    meter.count(1, 100)
    assert meter.rates().tokens_per_s == pytest.approx(2)
    assert meter.rates().remaining_s == pytest.approx(450)
    for step in (2, 3):
        clock.now += 2
        meter.count(step, 100)
    assert meter.rates().tokens_per_s == pytest.approx(50)
    assert meter.rates().remaining_s == pytest.approx(7 * 2)


def test_rates_follow_the_last_minute():
    clock = Clock()
    meter = RateMeter(1000, 0, clock)
    for step in range(1, 101):
        clock.now += 1
        meter.count(step, 10)
    for step in range(101, 131):
        clock.now += 4
        meter.count(step, 10)
    assert meter.rates().tokens_per_s == pytest.approx(2.5)


def test_reporting_a_step_twice_counts_it_once():
    clock = Clock()
    meter = RateMeter(10, 4, clock)
    for step in (5, 6, 7):
        clock.now += 1
        meter.count(step, 30)
        clock.now += 5  # an evaluation
        meter.count(step, 0)
    assert meter.rates().tokens_per_s == pytest.approx(60 / 12)
    assert meter.rates().remaining_s == pytest.approx(3 * 6)


def test_short_loops_print_nothing():
    assert plain(0.1, 20) == []


def test_long_loops_print_now_and_then_and_at_the_end():
    lines = plain(2.0, 100)
    assert 5 <= len(lines) <= 10
    assert lines[0] == "SFT 3/100: loss 0.3333, 50 tokens/s, 3 min 14 s left"
    assert lines[-1] == "SFT 100/100: loss 0.01, 50 tokens/s, 0 s left"


def test_a_resumed_run_counts_from_where_it_is():
    lines = plain(3.0, 4, start=10, total=20)
    assert lines[0].startswith("SFT 12/20:")
    assert lines[-1].startswith("SFT 14/20:")


def test_the_last_line_comes_even_when_the_loop_fails():
    console = Console(file=io.StringIO(), width=40)
    clock = Clock()
    with (
        pytest.raises(KeyboardInterrupt),
        shown_progress("RL", 5, console=console, clock=clock) as progress,
    ):
        progress.update(1)
        clock.now += 10
        progress.update(1)
        progress.update(2)
        raise KeyboardInterrupt
    assert console.file.getvalue().splitlines()[-1].startswith("RL 2/5")


def test_a_terminal_gets_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    progress = run(console, 1.0, 3, total=6)
    shown = console.file.getvalue()
    assert "SFT" in shown and "3/6" in shown and "100 tokens/s" in shown and "3 s left" in shown
    assert progress.tokens_per_s == pytest.approx(100)


def test_names_are_not_read_as_markup():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with shown_progress("[red]", 2, console=console, clock=Clock()) as progress:
        progress.update(1, metrics={"[bold]": 1.0})
    assert "[red]" in console.file.getvalue() and "[bold] 1" in console.file.getvalue()


def test_other_processes_are_silent_but_measure(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    console = Console(file=io.StringIO(), force_terminal=True)
    progress = run(console, 10.0, 5)
    assert console.file.getvalue() == ""
    assert progress.tokens_per_s == pytest.approx(10)


@pytest.mark.parametrize(
    "seconds, text",
    [(0.2, "0 s"), (59.4, "59 s"), (59.9, "1 min 00 s"), (185, "3 min 05 s"), (7801, "2 h 10 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_steps_have_a_rate_and_their_number_may_be_unknown():
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, width=200)
    with shown_progress("reading", None, unit="records", console=console, clock=clock) as progress:
        for step in (10, 30, 50):
            clock.now += 40
            progress.update(step, metrics={"USD": 0.125})
    assert out.getvalue().splitlines()[1:] == [
        "reading 30: USD 0.125, 0.5 records/s",
        "reading 50: USD 0.125, 0.5 records/s",
    ]


def test_a_million_short_steps_keep_few_marks():
    clock = iter(np.arange(0, 40, 4e-4))
    meter = RateMeter(100_000, 0, lambda: next(clock))
    for step in range(1, 100_000):
        meter.count(step, 2)
    rates = meter.rates()
    assert len(meter._marks) < 500
    assert rates.steps_per_s == pytest.approx(2500, rel=0.01)
    assert rates.tokens_per_s == pytest.approx(5000, rel=0.01)
    assert rates.remaining_s == pytest.approx(1 / 2500, rel=0.01)


def test_counted_yields_everything_in_order():
    assert list(counted(iter("abc"), "reading")) == ["a", "b", "c"]
