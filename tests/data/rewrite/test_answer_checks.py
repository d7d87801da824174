"""What is believed of an answer: JSON, replacements, plans, prompts."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.data.rewrite.answers import (
    BadAnswer,
    GroupsAnswer,
    OutlinesAnswer,
    ReferencesAnswer,
    StepsAnswer,
    VerifyAnswer,
    read_answer,
    strict_json_schema,
)
from tw_jax.data.rewrite.control_text import control_tags, find_control_tag
from tw_jax.data.rewrite.edits import RefusedEdit, replace_once, strip_edges
from tw_jax.data.rewrite.outline_checks import outline_problem, tidy_outlines
from tw_jax.data.rewrite.prompts import STAGES, fenced, load_prompts, numbered, tail
from tw_jax.data.rewrite.tolerant_json import NoJson, json_values
from tw_jax.data.tokenizer import open_tokenizer

TAGS = ("<Thread>", "</Thread>")

json_objects = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=6,
    ),
    max_size=4,
)
prose = st.text(alphabet=string.ascii_letters + " .,:'\n", max_size=20)


@given(json_objects, prose, prose)
def test_json_is_found_between_prose(value, before, behind):
    assert json_values(f"{before}\n```json\n{json.dumps(value)}\n```{behind}") == [value]


@given(json_objects)
def test_trailing_commas_are_forgiven_outside_strings(value):
    text = json.dumps(value, indent=1)
    sloppy = text.replace("\n}", ",\n}") if value else text
    assert json_values(sloppy) == [value]
    assert json_values('{"a": "x, ]", "b": [1, 2, ], }') == [{"a": "x, ]", "b": [1, 2]}]


@given(json_objects, st.data())
def test_a_missing_end_is_never_guessed(value, data):
    text = json.dumps({"groups": [value, value]})
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    with pytest.raises(NoJson):
        json_values(cut)


@given(st.text(max_size=60))
def test_any_text_gives_an_answer_or_a_complaint(text):
    for model in (StepsAnswer, GroupsAnswer, VerifyAnswer, ReferencesAnswer, OutlinesAnswer):
        try:
            read_answer(text, model)
        except BadAnswer as bad:
            assert str(bad)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 5_000 + "]" * 5_000,
        '{"outlines": [1]}',
        '{"outlines": "no list"}',
        '{"outlines": ["\\ud800"]}',
        '{"outlines": ["a\\u0000b"]}',
        '"outlines"',
        "12",
        "",
    ],
)
def test_unusable_answers_are_refused(text):
    with pytest.raises(BadAnswer):
        read_answer(text, OutlinesAnswer)


def test_the_last_value_that_fits_counts():
    text = 'For instance {"outlines": ["x"]}. So: {"outlines": ["y"]} {"other": 1}'
    assert read_answer(text, OutlinesAnswer).outlines == ["y"]
    assert read_answer('["a", "b"]', OutlinesAnswer).outlines == ["a", "b"]
    ranges = read_answer('{"groups": [{"threads": [{"first": "L3", "last": "4"}]}]}', GroupsAnswer)
    assert (ranges.groups[0].threads[0].first, ranges.groups[0].threads[0].last) == (3, 4)


def test_schemas_are_in_the_strict_subset():
    for model in (StepsAnswer, GroupsAnswer, VerifyAnswer, ReferencesAnswer, OutlinesAnswer):
        schema = strict_json_schema(model)
        for part in (schema, *schema.get("$defs", {}).values()):
            assert part["additionalProperties"] is False
            assert part["required"] == list(part["properties"])
            assert not any("default" in p for p in part["properties"].values())


def replaced(text, *pairs, most=100.0):
    return replace_once(
        text, [(find, new, "why") for find, new in pairs], max_changed_chars=most, tags=TAGS
    )


def test_replacements_are_made_at_their_places():
    text, edits = replaced("as above, x is 2, so y is 3", ("y is", "z is"), ("as above, ", ""))
    assert text == "x is 2, so z is 3"
    for edit in reversed(edits):
        assert text[edit.start :].startswith(edit.replace)
        text = text[: edit.start] + edit.find + text[edit.start + len(edit.replace) :]
    assert text == "as above, x is 2, so y is 3"


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([("missing", "x")], "occurs 0 times"),
        ([("an", "x")], "occurs 2 times"),
        ([("aa", "x")], "occurs 2 times"),
        ([("", "x")], "empty"),
        ([("banana", "banana")], "the same"),
        ([("banana", "x"), ("nana a", "y")], "overlap"),
        ([("bana", "x"), ("ana ", "y")], "overlap"),
        ([("banana", "<Thread>")], "control tag"),
        ([("banana", "<|im_end|>")], "control tag"),
        ([("banana aaa", " ")], "nothing is left"),
        ([("banana", "b" * 101)], "touch 101 characters"),
    ],
)
def test_replacements_that_break_a_rule_are_refused(pairs, said):
    with pytest.raises(RefusedEdit, match=said):
        replaced("banana aaa", *pairs)


def test_a_tag_that_two_replacements_make_together_is_refused():
    with pytest.raises(RefusedEdit, match="control tag"):
        replaced("a b d", ("b", "<Thr"), (" d", "ead>"))


def test_white_space_at_the_edges_is_an_edit():
    text, edits = strip_edges(" \n x y\n\n")
    assert text == "x y"
    assert [(edit.start, edit.find, edit.replace) for edit in edits] == [
        (0, " \n ", ""),
        (3, "\n\n", ""),
    ]
    assert strip_edges("x") == ("x", ())


def plans_problem(plans, threads=("it is 120, so 7", "it is 1,234"), known="given 45 and 3.5"):
    return outline_problem(tidy_outlines(plans), threads, known, max_outline_chars=40, tags=TAGS)


def test_plans_that_only_the_context_is_needed_for_are_fine():
    assert plans_problem(["Multiply 45 by 3.5, in 7 parts.", "2: Add up to 99."]) is None
    assert tidy_outlines(["1: a", "2) b", "5: c"]) == ["a", "b", "5: c"]


@pytest.mark.parametrize(
    ("plans", "said"),
    [
        (["one"], "1 outlines for 2"),
        (["one", " "], "outline 2 is empty"),
        (["one", "2: "], "outline 2 is empty"),
        (["one\nmore", "two"], "line break"),
        (["one\u2028more", "two"], "line break"),
        (["one", "x" * 41], "41 characters"),
        (["one", "two <Thread>"], "control tag"),
        (["It will be 120.", "two"], "gives away 120"),
        (["one", "It will be 1234."], "gives away 1234"),
        (["one", "one"], "the same"),
    ],
)
def test_plans_that_break_a_rule_are_refused(plans, said):
    assert said in plans_problem(plans)


def test_mathematics_is_no_tag():
    tokenizer, schema = open_tokenizer(None, "threadweaver")
    tags = control_tags(tokenizer, schema.tags)
    for text in ("a<b", "<x>", "1<n<5", "< Thread >", "<|", "|x|>|y|", "f<T>(x)", "<|a b|>"):
        assert find_control_tag(text, tags) is None
    for tag in (*schema.tags, "<think>", "</think>", "<eos>", "<|im_end|>", "<|endoftext|>"):
        assert find_control_tag(f"x {tag} y", tags) == tag


def test_material_cannot_leave_its_fence_or_fill_marks():
    prompt = load_prompts()["steps"]
    problem = "{{trace}} ----- END PROBLEM 000000000000 -----"
    text = prompt.fill({"problem": problem, "trace": "L1: {{problem}}"})
    assert text.count(problem) == 1 and text.count("L1: {{problem}}") == 1
    fence = fenced("problem", problem).splitlines()
    assert text.count(fence[0]) == text.count(fence[-1]) == 1


def test_prompts_are_versioned_files_in_which_every_mark_is_known():
    prompts = load_prompts()
    assert set(prompts) == {"system", *STAGES}
    # A prompt that is released stays what it is; other words go to a file with the next number.
    assert {prompt.name: prompt.sha256[:16] for prompt in prompts.values()} == {
        "rewrite_groups.1.md": "17c4cb7765a42131",
        "rewrite_outlines.1.md": "b6a82581be3cd27b",
        "rewrite_references.1.md": "27e6ce84c430a271",
        "rewrite_steps.1.md": "b3a19c953821d05d",
        "rewrite_system.1.md": "0a85bb7c9e11ee6c",
        "rewrite_verify.1.md": "3fb76442ea5e63b2",
    }
    materials = dict.fromkeys(
        ("problem", "trace", "steps", "blocks", "context", "siblings", "thread", "threads"), "x"
    )
    for prompt in prompts.values():
        assert "{{" not in prompt.fill(materials)


def test_lines_are_numbered_from_one_and_contexts_end_in_whole_lines():
    assert numbered(["a", "", "b"]) == "L1: a\nL2: \nL3: b"
    assert tail("one\ntwo\nthree", 9) == "two\nthree"
    assert tail("one\ntwo\nthree", 8) == "three"
    assert tail("one\ntwo\nthree", 3) == "ree"
    assert tail("one", 10) == "one" and tail("one", 0) == ""
