"""The view of running rollouts: what it shows, in which width, and that text stays text."""

import dataclasses
import io

import pytest
import rich.cells
import rich.console

from tests.rollout.scenarios import LOOP, named_requests, plans, request, small_requests
from tests.rollout.small_world import ID, make_model, make_schema, text_of
from tw_jax.evals.live_parts import ClosedBlock, GrowingThread, LiveParts, live_parts
from tw_jax.evals.watch import Progress, draw, watch_rollouts
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.live_text import finished_text

PROGRESS = Progress(steps=1234, tokens_per_s=56.7, finished=1, running=2, queued=3)


class SmallWorldDecoder:
    eos_token_id = ID["<eos>"]
    bos_token = "<bos>"

    def decode(self, token_ids, skip_special_tokens=False):
        return text_of(token_ids)


@pytest.fixture(scope="module")
def engine():
    config = dataclasses.replace(LOOP, steps_per_dispatch=3)
    return RolloutEngine(make_model()[0], make_schema(), config)


def console_of(width, **fields):
    fields = {"force_terminal": True, "color_system": None, "height": 24, **fields}
    return rich.console.Console(file=io.StringIO(), width=width, record=True, **fields)


def frame(parts, width, question="what is it?", height=24):
    console = console_of(width, height=height)
    console.print(draw(console, question, parts, PROGRESS))
    return console.export_text()


def threads_of(count, text="some text", state="running"):
    return tuple(
        GrowingThread(str(i), f"plan {i}", text, 7 * i, state) for i in range(1, count + 1)
    )


def parts_of(threads=(), sequential=()):
    return LiveParts(tuple(sequential), tuple(threads), total_tokens=1500, critical_path=900)


# --- the parts of a running rollout ---------------------------------------------------------------


def test_parts_follow_the_rollout_to_its_end(engine):
    """Numbers only grow, blocks close in order, and the last look agrees with the result."""
    asked = [r for r in named_requests().values() if len(r.prompt) < 60]
    asked = [r for r in asked if r.sampling.max_response_tokens + len(r.prompt) < 128]
    seen, ended = {}, {}
    states, texts = set(), 0
    with engine.session(make_model()[1]) as session:
        for r in asked:
            session.submit(r)
        while session.busy:
            for ticket, text in session.live().items():
                parts = live_parts(text, make_schema(), SmallWorldDecoder())
                before = seen.get(ticket)
                if before is not None:
                    assert parts.total_tokens >= before.total_tokens
                    assert blocks_of(parts) >= blocks_of(before)
                assert 0 <= parts.critical_path <= parts.total_tokens
                assert len(parts.threads) == len(text.threads)
                states |= {thread.state for thread in parts.threads}
                texts += sum(bool(thread.text) for thread in parts.threads)
                for thread, live in zip(parts.threads, text.threads, strict=True):
                    header = text_of(live.tokens[: live.header_len])
                    assert header == f"<Thread>\n{thread.number}:" or " " in header
                seen[ticket] = parts
            ended |= dict(session.poll())
    assert states == {"running", "waiting to join", "joined"}
    assert texts > 50
    for rollout in ended.values():
        parts = live_parts(finished_text(rollout), make_schema(), SmallWorldDecoder())
        assert parts.total_tokens == rollout.total_tokens
        assert parts.critical_path == rollout.critical_path
        assert blocks_of(parts) == len(rollout.trajectory.blocks)


def blocks_of(parts):
    return sum(isinstance(part, ClosedBlock) for part in parts.sequential)


def test_plans_stand_with_their_threads(engine):
    with engine.session(make_model()[1]) as session:
        session.submit(request(5, plans("1", "2", "3"), "<bos>" + "abc"))
        while not (threads := next(iter(session.live().values()), None)) or not threads.threads:
            session.poll()
        parts = live_parts(threads, make_schema(), SmallWorldDecoder())
    assert [(t.number, t.outline) for t in parts.threads][0] == ("1", "a")
    assert parts.sequential == (), "the open block's outlines are not repeated above"


# --- what is drawn --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 8])
def test_frames_fit_the_console(width, count):
    long = "word " * 400
    text = frame(parts_of(threads_of(count, long), [long, ClosedBlock((5, 9)), long]), width)
    lines = text.splitlines()
    assert len(lines) <= 24 or count == 8  # threads are never left out, even if it gets long
    assert all(rich.cells.cell_len(line) <= width for line in lines)
    assert "critical path 900 of 1,500 tokens" in text and "57 tokens/s" in text
    for i in range(1, count + 1):
        assert f"{i} · {7 * i} tokens" in text and f"plan {i}" in text


def test_threads_stand_side_by_side():
    text = frame(parts_of(threads_of(3)), 80)
    assert any(line.count("some text") == 3 for line in text.splitlines())
    assert any(line.count("running") == 3 for line in text.splitlines())


def test_the_end_of_long_text_is_shown():
    text = frame(
        parts_of(threads_of(2, "start " + "x " * 900 + "end"), ["first " * 900 + "last"]), 80
    )
    assert "end" in text and "start" not in text
    assert "last" in text


def test_a_closed_block_is_one_line():
    text = frame(parts_of(sequential=["before", ClosedBlock((30, 1200)), "after"]), 80)
    before, block, after = (line.strip() for line in text.splitlines()[1:4])
    assert (before, after) == ("before", "after")
    assert block == "▸ block 1: 2 threads, 30 + 1,200 tokens, longest 1,200"


def test_states_are_named():
    waiting = (*threads_of(1, state="joined"), *threads_of(1, state="waiting to join"))
    text = frame(parts_of(waiting), 80)
    assert "joined" in text and "waiting to join" in text


@pytest.mark.parametrize("width", [80, 120])
def test_wide_characters_keep_the_borders_straight(width):
    wide = "二十三乘以五十四等于一千二百四十二，" * 8 + "🙂🙂"
    text = frame(parts_of(threads_of(2, wide), [wide]), width, question=wide * 3)
    assert all(rich.cells.cell_len(line) <= width for line in text.splitlines())
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert rows and {rich.cells.cell_len(line) for line in rows} == {width}


def test_text_is_neither_markup_nor_control():
    evil = "[bold]x[/bold] [/nothing] \x1b[31mred\x1b[0m \u202eright"
    threads = [GrowingThread("[red]1", evil, evil, 3, "running")]
    text = frame(parts_of(threads, [evil]), 120, question=evil)
    assert text.count("[bold]x[/bold] [/nothing] \\x1b[31mred\\x1b[0m") == 4
    assert "[red]1 · 3 tokens" in text
    assert "\x1b" not in text and "\u202e" not in text


# --- while the engine runs ------------------------------------------------------------------------


def test_watched_rollouts_equal_generated_ones(engine, monkeypatch):
    monkeypatch.setattr("tw_jax.evals.watch._FRAME_S", 0.0)
    requests = small_requests(9)
    expected = engine.generate(make_model()[1], requests)
    console, seen = console_of(80), []
    watched = watch_rollouts(
        engine, make_model()[1], requests, SmallWorldDecoder(), console,
        on_finish=lambda index, _: seen.append(index),
    )  # fmt: skip
    assert [r.trajectory.tokens.tolist() for r in watched] == [
        r.trajectory.tokens.tolist() for r in expected
    ]
    assert sorted(seen) == list(range(9))
    drawn = console.file.getvalue()
    assert "running" in drawn and "critical path" in drawn and "queued" in drawn


def test_a_pipe_gets_the_joined_texts_once_and_in_order(engine):
    requests = small_requests(9)
    console = rich.console.Console(file=io.StringIO(), width=80)
    assert not console.is_terminal
    rollouts = watch_rollouts(engine, make_model()[1], requests, SmallWorldDecoder(), console)
    texts = []
    for rollout in rollouts:
        tokens = rollout.trajectory.tokens
        tokens = tokens[:-1] if tokens[-1] == ID["<eos>"] else tokens
        texts.append(text_of(tokens).removeprefix("<bos>") + "\n")
    assert console.file.getvalue() == "".join(texts)


def test_an_interrupt_leaves_the_terminal_alone(engine):
    def stop(index, rollout):
        raise KeyboardInterrupt

    console = console_of(80)
    with pytest.raises(KeyboardInterrupt):
        watch_rollouts(
            engine, make_model()[1], small_requests(3), SmallWorldDecoder(), console,
            on_finish=stop,
        )  # fmt: skip
    assert "\x1b[?25h" in console.file.getvalue(), "the cursor is back"
    assert len(engine.generate(make_model()[1], small_requests(1))) == 1
