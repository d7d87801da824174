"""Input that cannot be rewritten: told apart, counted, kept aside, and nothing spent on it."""

import dataclasses
import json

import pytest

from tests.data.rewrite.chat_server import ChatServer, Reply, good_answer
from tests.data.rewrite.marked_traces import cases, make_case, record
from tests.data.rewrite.runs import (
    LIMITS,
    all_records,
    config,
    read_jsonl,
    responses,
    run,
    write_jsonl,
)
from tw_jax.data.rewrite.command import run_rewrite
from tw_jax.data.rewrite.config import RewriteColumns, RewriteConfig
from tw_jax.errors import UserError

GOOD = record(cases()[0], 0)[0]


def changed(**changes) -> dict:
    return {**GOOD, "id": f"changed {sorted(changes)}", **changes}


BAD = [
    (changed(id=GOOD["id"]), "duplicate_id", "id"),
    (changed(prompt=""), "empty_field", "prompt"),
    (changed(prompt="  \n"), "empty_field", "prompt"),
    (changed(prompt=None), "wrong_type", "prompt"),
    (changed(prompt=["a", 1]), "wrong_type", "prompt"),
    (changed(reasoning=" "), "empty_field", "reasoning"),
    (changed(reasoning=7), "wrong_type", "reasoning"),
    ({k: v for k, v in changed(x=1).items() if k != "answer"}, "missing_field", "answer"),
    (changed(answer=""), "empty_field", "answer"),
    ({k: v for k, v in changed(y=1).items() if k != "reasoning"}, "missing_field", "reasoning"),
    (changed(reasoning=None, response="<think>\n\n</think>done"), "empty_field", "response"),
    (changed(reasoning="a\0b"), "nul_byte", "reasoning"),
    (changed(reasoning="a \ud800 b"), "invalid_unicode", "reasoning"),
    (changed(reasoning="so\n<Parallel>\nx"), "tag_in_text", "reasoning"),
    (changed(reasoning="</Thread>"), "tag_in_text", "reasoning"),
    (changed(reasoning="a <|im_end|> b"), "tag_in_text", "reasoning"),
    (changed(reasoning="a <think> b"), "tag_in_text", "reasoning"),
    (changed(reasoning="a </think> b"), "tag_in_text", "reasoning"),
    (changed(final="<eos>"), "tag_in_text", "final"),
    (changed(reasoning=None, response="a</think>b</think>c"), "tag_in_text", "final"),
    (changed(prompt="What does <|im_start|> do?"), "tag_in_text", "prompt"),
    (changed(reasoning="x" * 1_000_000), "too_long", None),
    (changed(reasoning="\u20ac"), "unknown_characters", "response"),
    (changed(id=True), "wrong_type", "id"),
]


def test_bad_records_are_rejected_and_the_good_ones_around_them_rewritten(tmp_path):
    lines = [json.dumps(GOOD), "{broken", "[1]", *(json.dumps(bad) for bad, _, _ in BAD)]
    other = record(cases()[1], 1)[0]
    (tmp_path / "input.jsonl").write_text("\n".join([*lines, json.dumps(other)]) + "\n")
    with ChatServer() as server:
        status, summary, rejects = run(tmp_path, server.url, max_reject_share=1.0)
    assert status == 0 and summary["written"] == 2
    found = [(entry["line"], entry["kind"], entry["field"]) for entry in rejects]
    expected = [(n, kind, field) for n, (_, kind, field) in enumerate(BAD, start=4)]
    assert sorted(found) == [
        (2, "malformed_json", None),
        (3, "not_an_object", None),
        *expected,
    ]
    assert {question.sections["PROBLEM"] for question in server.questions} == {
        GOOD["prompt"],
        other["prompt"],
    }


def test_too_many_bad_records_stop_the_run_before_anything_is_spent(tmp_path):
    write_jsonl(tmp_path / "input.jsonl", [GOOD, *(bad for bad, _, _ in BAD[:2])])
    with ChatServer() as server:
        with pytest.raises(UserError, match="2 of 3 items are bad"):
            run(tmp_path, server.url, max_reject_share=0.5)
        assert server.questions == []
        assert run(tmp_path, server.url, max_reject_share=0.7)[0] == 0
    assert len(read_jsonl(tmp_path / "out" / "rejects.jsonl")) == 2


def test_input_without_a_good_trace_is_an_error(tmp_path):
    write_jsonl(tmp_path / "input.jsonl", [BAD[1][0]])
    with pytest.raises(UserError, match="no trace to rewrite"):
        run(tmp_path, "http://127.0.0.1:1/v1", max_reject_share=1.0)
    with pytest.raises(UserError, match="cannot read"):
        run_rewrite(
            RewriteConfig(
                (str(tmp_path / "none.jsonl"),),
                tmp_path / "out",
                config(tmp_path, "http://x").server,
            )
        )


def test_columns_think_tags_and_missing_answers_are_settings(tmp_path):
    case = cases()[0]
    fields = {"problem": case.problem, "thoughts": case.source, "said": case.final, "n": 7}
    write_jsonl(tmp_path / "input.jsonl", [fields])
    columns = RewriteColumns(prompt="problem", reasoning="thoughts", final="said", id="n")
    with ChatServer() as server:
        status, _, _ = run(
            tmp_path, server.url, columns=columns, answer_required=False, think_tags=False
        )
    assert status == 0
    (written,) = read_jsonl(tmp_path / "out" / "trajectories.jsonl")
    assert written == {
        "prompt": case.problem,
        "response": f"{case.expected}\n\n{case.final}",
        "id": 7,
    }


def test_a_prompt_may_be_a_chat_and_stays_one(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "8*8?"}]
    case = make_case(
        "chat", "Be brief.\n\n8*8?", "{{ By four.\n4*16=64\n|| By two.\n2*32=64\n}}", "64"
    )
    fields, _ = record(case, 3)
    write_jsonl(tmp_path / "input.jsonl", [fields | {"prompt": turns}])

    def answer(asked):
        assert asked.sections["PROBLEM"] == case.problem
        return Reply(json.dumps(good_answer(asked, case)))

    limits = dataclasses.replace(LIMITS, min_saved_chars=1)
    with ChatServer(answer) as server:
        assert run(tmp_path, server.url, limits=limits)[1]["written"] == 1
    (written,) = read_jsonl(tmp_path / "out" / "trajectories.jsonl")
    assert written["prompt"] == turns and written["response"] == case.expected


def test_a_record_without_an_id_is_named_by_file_and_line(tmp_path):
    fields = {name: value for name, value in GOOD.items() if name != "id"}
    write_jsonl(tmp_path / "input.jsonl", [fields])
    with ChatServer() as server:
        run(tmp_path, server.url)
    assert (
        read_jsonl(tmp_path / "out" / "trajectories.jsonl")[0]["id"]
        == f"{tmp_path / 'input.jsonl'}:1"
    )


def test_only_the_first_traces_are_rewritten_where_asked_for(tmp_path):
    with ChatServer() as server:
        run(tmp_path, server.url, max_traces=3)
    assert responses(tmp_path) == all_records()[1][:3]


def test_a_trace_with_lines_of_a_megabyte_goes_through_where_it_may(tmp_path):
    case = cases()[0]
    long = "x" * 1_000_000
    reasoning = f"{long}\n{case.source}"
    write_jsonl(tmp_path / "input.jsonl", [{**GOOD, "reasoning": reasoning}])
    limits = dataclasses.replace(LIMITS, max_trace_chars=2_000_000)
    with ChatServer(shifted) as server:
        status, _, _ = run(tmp_path, server.url, limits=limits)
    assert status == 0
    (response,) = responses(tmp_path)
    assert response == f"<think>\n{long}\n{case.expected}\n</think>\n\n{case.final}"


def shifted(asked):
    """The good answers for a text with one line more in front."""
    answer = good_answer(asked)
    for group in answer.get("groups", []):
        for thread in group["threads"]:
            thread["first"] += 1
            thread["last"] += 1
    return Reply(json.dumps(answer))


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="tokenizer"):
        run(tmp_path, "http://127.0.0.1:1/v1", tokenizer=str(tmp_path))
