"""The parser: total, exact about positions, strict where the format is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.random_trajectories import canonical_block, encode, random_texts
from tests.trajectory.spelling import decode, ids_of
from tw_jax.trajectory.trajectory import Trajectory

GOOD = canonical_block((("a", "xx"), ("b", "yyy")))


@given(text=random_texts())
def test_every_canonical_text_parses_and_its_spans_read_back(text, tokenizer, schema):
    ids, prompt_len = encode(text, tokenizer)
    parsed = schema.parse(ids, prompt_len)
    assert isinstance(parsed, Trajectory)
    assert schema.validate(parsed) == ()
    assert len(parsed.blocks) == len(text.blocks)
    for block, threads in zip(parsed.blocks, text.blocks, strict=True):
        assert decode(tokenizer, ids[block.start : block.end]) == canonical_block(threads)
        assert decode(tokenizer, ids[block.outlines_end - 1 : block.outlines_end]) == "</Outlines>"
        for i, (outline, thread, (plan, body)) in enumerate(
            zip(block.outlines, block.threads, threads, strict=True), start=1
        ):
            assert outline.number == thread.number == str(i)
            assert decode(tokenizer, ids[outline.start : outline.end]) == (
                f"<Outline>{i}: {plan}</Outline>"
            )
            assert decode(tokenizer, ids[thread.start : thread.body]) == f"<Thread>\n{i}:"
            assert decode(tokenizer, ids[thread.body : thread.end]) == f" {body}\n</Thread>"
        assert ids[block.join_end] == schema.tag_ids[schema.tags.index("</Parallel>")]


@given(ids=st.lists(st.integers(-3, 130), max_size=60), prompt_len=st.integers(0, 70))
def test_any_ids_give_a_trajectory_or_errors_inside_the_text(ids, prompt_len, schema):
    parsed = schema.parse(np.array(ids, np.int32), prompt_len)
    if isinstance(parsed, Trajectory):
        assert all(0 <= b.start < b.end <= len(ids) for b in parsed.blocks)
        schema.validate(parsed)
    else:
        assert parsed
        assert all(0 <= error.index < len(ids) and error.message for error in parsed)


@given(
    pieces=st.lists(
        st.sampled_from(
            ["<Parallel>", "</Parallel>", "<Outlines>", "</Outlines>", "<Outline>", "</Outline>"]
            + ["<Thread>", "</Thread>", "\n", "1:", " x", "2:", "\n1: a\n"]
        ),
        max_size=40,
    )
)
def test_tag_soup_never_raises(pieces, tokenizer, schema):
    parsed = schema.parse(ids_of(tokenizer, "".join(pieces)))
    assert isinstance(parsed, (Trajectory, tuple))


@pytest.mark.parametrize(
    ("text", "kind", "at"),
    [
        ("ab</Thread>", "unexpected_tag", "</Thread>"),
        (GOOD.replace("\n</Parallel>", ""), "unclosed_block", "<Parallel>"),
        (GOOD.replace("xx", "<Parallel>"), "nested_block", None),
        (GOOD.replace("</Outlines>\n", "</Outlines>\nq"), "stray_text", "q"),
        (GOOD.replace("1: a", "a"), "outline_number", "a"),
        (GOOD.replace("\n1: xx", "xx"), "thread_number", "x"),
        ("<Parallel>\n<Outlines>\n</Outlines>\n</Parallel>", "missing_outlines", "</Outlines>"),
        (
            "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n</Outlines>\n</Parallel>",
            "missing_threads",
            "</Parallel>",
        ),
    ],
)
def test_grammar_errors_name_kind_and_position(text, kind, at, tokenizer, schema):
    ids = ids_of(tokenizer, text)
    (error, *_) = schema.parse(ids)
    assert error.kind == kind
    if at is not None:
        assert decode(tokenizer, ids[error.index]) == at


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (("1: a", "3: a"), "outline_numbering"),
        (("\n2: yyy", "\n7: yyy"), "thread_numbering"),
        (("<Outline>1: a<", "<Outline>1: <"), "empty_outline"),
        (("1: xx\n", "1: \n"), "empty_thread"),
        (("</Thread><Thread>", "</Thread>\n<Thread>"), "white_space"),
        (("</Outlines>\n", "</Outlines>\n\n"), "white_space"),
        (("xx\n</Thread>", "xx</Thread>"), "white_space"),
        (("1: xx", "1:xx"), "white_space"),
        (("\n1: xx", "\n1 : xx"), "white_space"),
        (("<Outline>1: a", "<Outline> 1: a"), "white_space"),
        (("<Outline>1: a", "<Outline>1 : a"), "white_space"),
        (("<Thread>\n1", "<Thread>1"), "white_space"),
        (("</Thread>\n</Parallel>", "</Thread></Parallel>"), "white_space"),
    ],
)
def test_strict_validation(change, kind, tokenizer, schema):
    assert change[0] in GOOD
    parsed = schema.parse(ids_of(tokenizer, GOOD.replace(*change, 1)))
    assert isinstance(parsed, Trajectory)
    assert kind in {error.kind for error in schema.validate(parsed)}


def test_a_broken_block_does_not_hide_the_error_in_the_next(tokenizer, schema):
    broken = GOOD.replace("1: a", "a")
    errors = schema.parse(ids_of(tokenizer, broken + GOOD + broken))
    assert [error.kind for error in errors] == ["outline_number", "outline_number"]


def test_tags_in_the_prompt_are_not_structure(tokenizer, schema):
    ids = ids_of(tokenizer, GOOD)
    assert schema.parse(ids, prompt_len=len(ids)).blocks == ()


def test_dotted_and_two_digit_numbers(tokenizer, schema):
    text = canonical_block(tuple(("p", "b") for _ in range(12)))
    parsed = schema.parse(ids_of(tokenizer, text))
    assert [thread.number for thread in parsed.blocks[0].threads] == [str(i) for i in range(1, 13)]
    dotted = GOOD.replace("1: a", "1.2: a").replace("\n1: xx", "\n1.2: xx")
    assert schema.parse(ids_of(tokenizer, dotted)).blocks[0].threads[0].number == "1.2"


def test_ids_beyond_the_tokenizer_are_text(tokenizer, schema):
    ids = ids_of(tokenizer, GOOD)
    for index in range(len(ids)):
        padded = ids.copy()
        padded[index] = len(tokenizer) + 3
        parsed = schema.parse(padded)
        if isinstance(parsed, Trajectory):
            schema.validate(parsed)
    inside = ids.copy()
    inside[ids == tokenizer.convert_tokens_to_ids("x")] = len(tokenizer) + 3
    assert schema.validate(schema.parse(inside)) == ()
