"""A 24-token language, and a model that speaks it: it opens blocks, threads and ends by itself.

See tiny_language.py for how.
"""

import functools

from tests.rollout.tiny_language import classes_of, ids_among, model_that_likes, pieces_with
from tw_jax.trajectory.schema import ForkJoinTokens
from tw_jax.trajectory.threadweaver import THREADWEAVER_TAGS, ThreadWeaverSchema

PIECES = pieces_with(THREADWEAVER_TAGS)
ID = {piece: i for i, piece in enumerate(PIECES)}
VOCAB = len(PIECES)


def ids(text: str) -> list[int]:
    """Encodes text of this language."""
    out = []
    while text:
        piece = next(p for p in PIECES if text.startswith(p))
        out.append(ID[piece])
        text = text[len(piece) :]
    return out


def text_of(tokens) -> str:
    return "".join(PIECES[int(t)] for t in tokens)


@functools.cache
def make_schema() -> ThreadWeaverSchema:
    return ThreadWeaverSchema(
        tag_ids=ids_among(PIECES, THREADWEAVER_TAGS),
        eos_id=ID["<eos>"],
        classes=classes_of(PIECES, THREADWEAVER_TAGS),
        fork_join=ForkJoinTokens(
            spawn_trigger=ID["</Outlines>"],
            plans_open=ID["<Outlines>"],
            plan_open=ID["<Outline>"],
            thread_stop=ID["</Thread>"],
            fork=(ID["\n"],),
            header_prefix=(ID["<Thread>"], ID["\n"]),
            header_suffix=(ID[":"],),
            thread_close=(ID["\n"], ID["</Thread>"]),
            join=(ID["\n"],),
        ),
    )


@functools.cache
def make_model():
    """(graphdef, params) of a model that follows the table, loosely."""
    likes = {
        "\n": {"</Parallel>": 3, "<Outline>": 2, "a": 2, "<Outlines>": 1},
        " ": {"a": 3, "b": 3, "c": 2, "</Thread>": 2},
        ":": {" ": 3, "</Outlines>": 3.5, "<Outline>": 4.5, "a": 2},
        "<Outlines>": {"<Outline>": 6, "\n": 4},
        "<Outline>": {"1": 5, "2": 5, "3": 4, " ": 3},
        "</Outline>": {"<Outline>": 4, "</Outlines>": 5},
        "</Outlines>": {"\n": 3, "a": 2},
        "</Parallel>": {"a": 4, "<Outlines>": 4, "\n": 2},
        "</Thread>": {"\n": 2, "<eos>": 1},
        ".": {"1": 4, "2": 2, "a": 2},
    }
    for digit in "0123":
        likes[digit] = {":": 5, "1": 2, "2": 2, ".": 2, " ": 2}
    for letter in "abcdef":
        likes[letter] = {"</Thread>": 3.5, "<Outlines>": 3.5, "<eos>": 2.5, "</Outlines>": 0.5}
        likes[letter] |= {" ": 2, "a": 1, "b": 1, "\n": 1}
    return model_that_likes(PIECES, likes)
