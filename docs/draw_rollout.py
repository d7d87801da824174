"""Draws the page tables of docs/rollout.md from a real engine that plays scripted requests.

Run `python -m docs.draw_rollout` after a change of the engine; a test keeps the page up to date.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tw_jax.models import graphdef, init_params, preset
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import Request, SamplingParams
from tw_jax.rollout.state import FREE, EngineState
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.trajectory.schemas import make_schema
from tw_jax.trajectory.trajectory import Trajectory

PAGE = pathlib.Path(__file__).with_name("rollout.md")
MODEL = preset(
    "tiny",
    vocab_size=128,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
# One step per dispatch, so that every step can be seen.
ENGINE = EngineConfig(
    context_len=56,
    page_size=8,
    rows=3,
    requests=2,
    max_threads=2,
    max_blocks=1,
    prefill_rows=1,
    prefill_chunk=8,
    kept_prefixes=1,
    steps_per_dispatch=1,
    scripts=True,
)


@dataclasses.dataclass(frozen=True)
class Frame:
    """What the drawings show of the engine's state at the beginning of a step."""

    pages: Any
    held: Any
    references: Any
    rows: Any
    phase: Any

    def known(self, line: int) -> int:
        """Tokens of a row that are decided."""
        return int(self.rows.n_known[line])

    def cached(self, line: int) -> int:
        """Positions of a line that are in the cache."""
        if line < ENGINE.rows:
            return int(self.rows.n_kv[line])
        return int(self.held[line]) * ENGINE.page_len

    @property
    def idle(self) -> bool:
        """Nothing runs."""
        return bool((self.phase == FREE).all())


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture: the first frame behind the one before for which `shown` holds."""

    caption: str
    shown: Callable[[Frame], bool]


@dataclasses.dataclass(frozen=True)
class Story:
    """Requests that run one wave after another, and pictures of the lines they touch."""

    waves: tuple[tuple[tuple[str, str], ...], ...]  # prompt and response
    lines: tuple[int, ...]
    scenes: tuple[Scene, ...]


STORIES = {
    "threads": Story(
        waves=(
            (
                (
                    "solve 7*8+5",
                    "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n"
                    "</Outlines>\n<Thread>\n1: 5\n</Thread><Thread>\n2: 56\n</Thread>\n"
                    "</Parallel>\n61",
                ),
            ),
        ),
        lines=(0, 1),
        scenes=(
            Scene("Admitted: the prompt is known, no page is held.", lambda f: True),
            Scene(
                "Prefill: no row could sample, so one step has fed all of it, and sampled a token.",
                lambda f: f.cached(0) > 0,
            ),
            Scene(
                "Decode: the cache is one token behind; feeding it gives the next one.",
                lambda f: f.known(0) > 20,
            ),
            Scene(
                "Spawn: row 0 goes on as thread 1, whose header is known.",
                lambda f: f.rows.thread[0] == 1,
            ),
            Scene(
                "Thread 2 has a row a step later: full pages are shared, a partial one is copied.",
                lambda f: f.rows.thread[1] == 2,
            ),
            Scene(
                "Thread 1 has ended: its row is fed what is known and waits.",
                lambda f: bool(f.rows.waiting[0]),
            ),
            Scene(
                "Join: the text of thread 2 is known to row 0; the pages of row 1 are free.",
                lambda f: not f.rows.live[1] and f.rows.thread[0] == 0,
            ),
            Scene("The parent goes on.", lambda f: f.known(0) == f.cached(0) + 1),
            Scene("Finished.", lambda f: f.idle),
        ),
    ),
    "beginnings": Story(
        waves=(
            (
                ("you are a calculator 3+1=", "it is four"),
                ("you are a calculator 4+1=", "five"),
            ),
            (("you are a calculator 5+1=", "six"),),
        ),
        lines=(0, 1, ENGINE.rows),
        scenes=(
            Scene(
                "B begins like A: it waits while A computes the beginning.",
                lambda f: f.cached(0) > 0,
            ),
            Scene(
                "B shares it and feeds the rest. Whole pages that came up twice are kept (line 3).",
                lambda f: f.cached(1) > 0,
            ),
            Scene("A and B are gone, the kept prefix stays.", lambda f: f.idle),
            Scene("A new request begins with it.", lambda f: f.cached(0) > 0 and not f.idle),
        ),
    ),
}


def _engine() -> RolloutEngine:
    return RolloutEngine(graphdef(MODEL), make_schema("threadweaver", load_tokenizer()), ENGINE)


def _request(engine: RolloutEngine, prompt: str, text: str) -> Request:
    """A request whose tokens are known beforehand."""
    tokenizer, schema = load_tokenizer(), engine.schema
    known = tokenizer(prompt).input_ids  # begins with <bos>
    response = tokenizer(text, add_special_tokens=False).input_ids
    script = schema.parse(np.array([*known, *response, schema.eos_id], np.int32), len(known))
    assert isinstance(script, Trajectory), script
    sampling = SamplingParams(max_threads=2, max_blocks=1)
    return Request(script.tokens[: len(known)], seed=0, sampling=sampling, script=script)


def _frames(engine: RolloutEngine, story: Story) -> list[Frame]:
    """The beginning of every step of a session that plays the story, and the end of each wave."""
    frames: list[Frame] = []
    advance = engine.advance

    def note(state: EngineState) -> None:
        table, rows, phase = jax.device_get((state.pages, state.rows, state.requests.phase))
        frames.append(Frame(table.pages, table.held, table.references, rows, phase))

    def watched(weights: Any, state: EngineState, *limits: Any):
        note(state)
        return advance(weights, state, *limits)

    engine.advance = watched  # pyright: ignore[reportAttributeAccessIssue]
    with engine.session(init_params(MODEL, 0)) as session:
        for wave in story.waves:
            for prompt, text in wave:
                session.submit(_request(engine, prompt, text))
            while session.busy:
                session.poll()
            note(session.state)
    engine.advance = advance
    return frames


def _page(frame: Frame, line: int, column: int, known: int, cached: int) -> str:
    """One page: its index in its column and a sign for each position."""
    if column >= frame.held[line]:
        return ""
    page, signs = frame.pages[line, column], ""
    full = "=" if frame.references[column, page] > 1 else "#"
    for position in range(column * ENGINE.page_len, (column + 1) * ENGINE.page_len):
        signs += full if position < cached else "+" if position < known else "."
    return f" {page} {signs}"


def _line(frame: Frame, line: int) -> str:
    """One line of the page table."""
    rows, known, cached = frame.rows, 0, frame.cached(line)
    if line >= ENGINE.rows:
        runs, counts = "kept", ""
    elif not rows.live[line]:
        return f"{line} free"
    else:
        known, name = frame.known(line), "AB"[rows.request[line]]
        waits = rows.waiting[line] or rows.source[line] >= 0
        thread = f"thread {rows.thread[line]}" if rows.thread[line] else "segment"
        runs = f"{name} {'waits' if waits else thread}"
        counts = f"{known:2} {cached:2}"
    cells = [_page(frame, line, column, known, cached) for column in range(frame.pages.shape[1])]
    return f"{line} {runs:10} {counts:5} {''.join(cells)}".rstrip()


def draw(engine: RolloutEngine, story: Story) -> str:
    """The pictures of a story, one below the other."""
    frames, out = iter(_frames(engine, story)), []
    for scene in story.scenes:
        frame = next((frame for frame in frames if scene.shown(frame)), None)
        assert frame is not None, f"never seen: {scene.caption}"
        out.append("\n".join([scene.caption, *(_line(frame, line) for line in story.lines)]))
    return "\n\n".join(out)


def with_drawings(page: str) -> str:
    """The page with its drawings made anew."""
    engine = _engine()
    for name, story in STORIES.items():
        head, rest = page.split(f"<!-- drawing: {name} -->")
        _, tail = rest.split("<!-- /drawing -->", 1)
        block = f"<!-- drawing: {name} -->\n```\n{draw(engine, story)}\n```\n<!-- /drawing -->"
        page = f"{head}{block}{tail}"
    return page


if __name__ == "__main__":
    PAGE.write_text(with_drawings(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
