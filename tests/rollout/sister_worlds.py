"""Tiny languages of the native and APR schemas, each with a model that speaks it."""

import dataclasses
import functools
from typing import Any

from tests.rollout.tiny_language import classes_of, ids_among, model_that_likes, pieces_with
from tw_jax.trajectory.apr import APR_TAGS, AprSchema
from tw_jax.trajectory.native import NATIVE_TAGS, NativeSchema
from tw_jax.trajectory.schema import ForkJoinTokens, Schema


@dataclasses.dataclass(frozen=True)
class World:
    """A language and its model."""

    pieces: tuple[str, ...]
    schema: Schema
    graphdef: Any
    params: Any

    def ids(self, text: str) -> list[int]:
        """Encodes text of this language."""
        out = []
        while text:
            piece = next(p for p in self.pieces if text.startswith(p))
            out.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return out

    def text_of(self, tokens) -> str:
        return "".join(self.pieces[int(t)] for t in tokens)


@functools.cache
def native_world() -> World:
    pieces = pieces_with(NATIVE_TAGS)
    line_break, colon = pieces.index("\n"), pieces.index(":")
    schema = NativeSchema(
        tag_ids=ids_among(pieces, NATIVE_TAGS),
        eos_id=pieces.index("<eos>"),
        classes=classes_of(pieces, NATIVE_TAGS),
        fork_join=ForkJoinTokens(
            spawn_trigger=pieces.index("</guideline>"),
            plans_open=pieces.index("<guideline>"),
            plan_open=pieces.index("<plan>"),
            thread_stop=pieces.index("</step>"),
            fork=(line_break,),
            header_prefix=(pieces.index("<step>"), line_break),
            header_suffix=(colon,),
            thread_close=(line_break, pieces.index("</step>")),
            join=(pieces.index("<takeaway>"), line_break),
            thread_tail=(line_break,),
        ),
    )
    likes = {
        "\n": {"</takeaway>": 2, "<plan>": 2, "a": 3, "<guideline>": 2},
        " ": {"a": 4, "b": 4, "c": 3, "</step>": 2, "<eos>": 3},
        ":": {" ": 5, "</guideline>": 4, "<plan>": 4, "a": 5},
        "<guideline>": {"<plan>": 6, "\n": 4},
        "<plan>": {"1": 5, "2": 5, "3": 4, " ": 3},
        "</plan>": {"<plan>": 4, "</guideline>": 5},
        "</guideline>": {"\n": 3, "a": 2},
        "</takeaway>": {"a": 4, "<guideline>": 4, "\n": 2},
        "</step>": {"\n": 5, "a": 4, "<eos>": 2},
        "<takeaway>": {"a": 3, "<guideline>": 5},
        ".": {"1": 4, "2": 2, "a": 2},
    }
    for digit in "0123":
        likes[digit] = {":": 5, "1": 2, "2": 2, ".": 2, " ": 2}
    for letter in "abcdef":
        likes[letter] = {"</step>": 3.5, "<guideline>": 4, "<eos>": 2.5, "</guideline>": 2}
        likes[letter] |= {" ": 2, "a": 1, "b": 1, "\n": 1}
    return World(pieces, schema, *model_that_likes(pieces, likes))


@functools.cache
def apr_world() -> World:
    pieces = pieces_with(APR_TAGS)
    line_break, join = pieces.index("\n"), pieces.index("<Join>")
    schema = AprSchema(
        tag_ids=ids_among(pieces, APR_TAGS),
        eos_id=pieces.index("<eos>"),
        classes=classes_of(pieces, APR_TAGS),
        fork_join=ForkJoinTokens(
            spawn_trigger=pieces.index("</Spawn>"),
            plans_open=pieces.index("<Spawn>"),
            plan_open=pieces.index("<Message>"),
            plan_close=pieces.index("</Message>"),
            thread_stop=pieces.index("</Join>"),
            fork=(line_break,),
            header_prefix=(pieces.index("<Thread>"), line_break),
            header_suffix=(),
            thread_close=(join, pieces.index("</Join>")),
            join=(line_break,),
            numbered=False,
            context_prefix=(pieces.index("<bos>"),),
            return_open=join,
        ),
    )
    likes = {
        "\n": {"a": 6, "b": 5, "<Spawn>": 4},
        " ": {"a": 3, "b": 3, "</Message>": 3, "<Join>": 2},
        ":": {"a": 3, "</Spawn>": 1},
        "<Spawn>": {"<Message>": 6, "\n": 2},
        "<Message>": {"a": 4, "b": 4, "1": 3, "</Message>": 1},
        "</Message>": {"<Message>": 5, "</Spawn>": 5, "\n": 1},
        "</Spawn>": {"a": 2},
        "<Join>": {"a": 4, "1": 4, "2": 4, "</Join>": 3},
        "</Join>": {"\n": 2, "a": 2},
        ".": {"1": 4, "a": 2},
    }
    for digit in "0123":
        likes[digit] = {"</Join>": 4, "</Message>": 4, "1": 2, "a": 2}
    for letter in "abcdef":
        likes[letter] = {"<Join>": 3.5, "</Join>": 2.5, "<Spawn>": 3, "<eos>": 1, "</Message>": 3}
        likes[letter] |= {" ": 3, "a": 2, "b": 2, "\n": 2}
    return World(pieces, schema, *model_that_likes(pieces, likes))
