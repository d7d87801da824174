"""What a person sees while traces are rewritten."""

import io
import itertools

from rich.console import Console

from tw_jax.data.rewrite.progress import shown_progress


def status():
    return "7 tokens, 0.1000 USD"


def test_a_log_file_gets_a_line_every_half_minute():
    seconds, out = itertools.count(0, 20), io.StringIO()
    console = Console(file=out, width=200)
    with shown_progress(4, status, console, lambda: next(seconds)) as advance:
        for _ in range(4):
            advance()
    assert out.getvalue().splitlines() == [
        "rewriting 2/4: 3.0 traces/min, 7 tokens, 0.1000 USD, 40 s left",
        "rewriting 4/4: 3.0 traces/min, 7 tokens, 0.1000 USD, 0 s left",
    ]


def test_a_terminal_gets_a_bar_with_the_money_spent():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with shown_progress(2, status, console) as advance:
        advance()
        advance()
    assert "2/2" in out.getvalue() and "0.1000 USD" in out.getvalue()
