"""Twenty hand-made traces through the whole of stage 1: byte-exact, whatever the server does."""

import dataclasses
import json
import pathlib

import pytest

from tests.data.rewrite.chat_server import ChatServer, Question, Reply, good, good_answer
from tests.data.rewrite.marked_traces import cases, record
from tests.data.rewrite.runs import (
    LIMITS,
    RETRY,
    all_records,
    read_jsonl,
    responses,
    run,
    write_jsonl,
)
from tw_jax import cli
from tw_jax.data.rejects import Rejects
from tw_jax.data.rewrite.conservation import restore
from tw_jax.data.tokenizer import open_tokenizer
from tw_jax.data.trajectory_file import read_trajectories

QWEN3_DIR = pathlib.Path(__file__).parents[4] / "shared" / "qwen3_tokenizer"


def test_the_marks_hold_what_the_text_contract_says():
    case = next(case for case in cases() if case.id == "sign-cases")
    assert case.expected == (
        "The absolute value asks for two cases.\n"
        "\n"
        "<Parallel>\n"
        "<Outlines>\n"
        "<Outline>1: Take x at least 3, drop the bars, solve, and see whether the root lies "
        "there.</Outline>\n"
        "<Outline>2: Take x below 3, flip the sign, solve, and see whether the root lies "
        "there.</Outline>\n"
        "</Outlines>\n"
        "<Thread>\n"
        "1: Case x >= 3. Then x - 3 = 2x.\nSo x = -3, which is not at least 3.\nNo solution here.\n"
        "</Thread><Thread>\n"
        "2: Suppose x < 3. Then 3 - x = 2x.\nSo 3x = 3 and x = 1, which is below 3.\n"
        "One solution here.\n"
        "</Thread>\n"
        "</Parallel>\n"
        "\n"
        "The only solution is x = 1."
    )


def test_all_traces_come_out_byte_exact(tmp_path):
    expected = all_records()[1]
    with ChatServer() as server:
        status, summary, rejects = run(tmp_path, server.url)
    assert (status, rejects) == (0, [])
    assert responses(tmp_path) == expected
    assert summary["written"] == 20 and summary["blocks"] == 22
    assert server.most_at_once <= 8


def test_everything_written_is_format_valid_and_leads_back_to_its_source(tmp_path):
    with ChatServer() as server:
        run(tmp_path, server.url)
    tokenizer, schema = open_tokenizer(None, "threadweaver")
    path = tmp_path / "out" / "trajectories.jsonl"
    rejects = Rejects(tmp_path / "rejects")
    loaded = list(read_trajectories(path, schema, tokenizer, rejects))
    assert len(loaded) == 20 and rejects.total == 0
    assert all(item.trajectory.blocks for item in loaded)
    assert not any(schema.validate(item.trajectory) for item in loaded)
    provenance = read_jsonl(tmp_path / "out" / "provenance.jsonl")
    for case, entry in zip(cases(), provenance, strict=True):
        assert entry["id"] == case.id and entry["status"] == "written"
        assert restore(case.expected, entry["blocks"]) == case.source
        assert set(entry["prompts"]) == {
            f"rewrite_{stage}.1.md"
            for stage in ("system", "steps", "groups", "verify", "references", "outlines")
        }


@pytest.mark.skipif(not QWEN3_DIR.exists(), reason=f"no Qwen3 tokenizer at {QWEN3_DIR}")
def test_a_published_tokenizer_reads_the_same_blocks(tmp_path):
    """Byte-pair tokens merge across the edges of lines and threads; the text must not mind."""
    records, expected = all_records()
    swap = {"x": "\u03b1", "Hmm": "\U0001f914 Hm", "*": "\u00b7"}
    assert any("\u03b1" in translated(response, swap) for response in expected)

    def answer(asked: Question) -> Reply:
        back = {new: old for old, new in swap.items()}
        asked.sections = {k: translated(v, back) for k, v in asked.sections.items()}
        return Reply(translated(json.dumps(good_answer(asked)), swap))

    write_jsonl(
        tmp_path / "input.jsonl",
        [{name: translated(value, swap) for name, value in r.items()} for r in records],
    )
    with ChatServer(answer) as server:
        status, summary, rejects = run(tmp_path, server.url, tokenizer=str(QWEN3_DIR))
    assert (status, rejects, summary["written"]) == (0, [], 20)
    assert responses(tmp_path) == [translated(response, swap) for response in expected]


def translated(text: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        text = text.replace(old, new)
    return text


def test_the_command_line_runs_the_verb(tmp_path, capsys):
    case = cases()[0]
    write_jsonl(tmp_path / "input.jsonl", [record(case, 3)[0]])
    with ChatServer() as server:
        words = [
            "data",
            "rewrite",
            f"inputs=[{tmp_path / 'input.jsonl'}]",
            f"output={tmp_path / 'out'}",
            f"server={server.url}",
            "server.model=scripted",
            "limits.min_saved_chars=20",
        ]
        assert cli.main([*words, "--dry-run"]) == 0
        assert "estimate" in capsys.readouterr().out and server.questions == []
        assert cli.main(words) == 0
    assert responses(tmp_path) == [case.expected]
    assert cli.main(["data", "rewrite", "--help"]) == 0
    assert "server.max_answer_tokens: int" in capsys.readouterr().out


def sloppy(asked: Question) -> Reply:
    """Fences, prose, thoughts, trailing commas, line numbers as text, a bare list."""
    answer = good_answer(asked)
    if asked.stage == "groups":
        for group in answer["groups"]:
            group["threads"] = [
                {"first": f"L{t['first']}", "last": str(t["last"])} for t in group["threads"]
            ]
        return Reply(
            f"<think>Is it {{1: 2}}?</think>Here:\n```json\n{json.dumps(answer)}\n```\nOK?"
        )
    if asked.stage == "outlines":
        plans = [f"{n}: {plan} " for n, plan in enumerate(answer["outlines"], start=1)]
        return Reply(json.dumps(plans)[:-1] + ",\n]")
    return Reply("Sure! {not json} " + json.dumps(answer)[:-1] + " , } Done.")


def malformed_at_first(asked: Question) -> Reply:
    """Each question's first answer cannot be used, in one of several ways."""
    text = json.dumps(good_answer(asked))
    if asked.attempt > 1:
        return Reply(text)
    kind = (len(asked.sections["PROBLEM"]) + len(asked.stage)) % 6
    return [
        Reply(text[: len(text) // 2]),
        Reply(text, finish_reason="length"),
        Reply("I cannot do that."),
        Reply(json.dumps({"wrong": []})),
        Reply(None),
        Reply(text.replace(": ", ": [", 1)),
    ][kind]


def failing_at_first(asked: Question) -> Reply:
    """429, 500, half a body, no choice, a timeout, and then an answer."""
    if asked.seen:
        return good(asked)
    kind = (len(asked.sections["PROBLEM"]) + len(asked.stage)) % 5
    return [
        Reply(status=429, headers={"Retry-After": "0.01"}, raw='{"error": "slow down"}'),
        Reply(status=500, raw="oops"),
        Reply(raw='{"choices": [{"mess'),
        Reply(raw='{"choices": []}'),
        dataclasses.replace(good(asked), pause_s=0.8),
    ][kind]


def wrong_ranges(asked: Question) -> Reply:
    """Good groups between others that cannot be laid out."""
    answer = good_answer(asked)
    if asked.stage == "groups":
        last = asked.sections["TRACE"].count("\n") + 1
        answer["groups"] += [
            {"reason": "outside", "threads": [{"first": 1, "last": 2}, {"first": 3, "last": 999}]},
            {"reason": "zero", "threads": [{"first": 0, "last": 1}, {"first": 2, "last": 2}]},
            {"reason": "upside down", "threads": [{"first": 2, "last": 1}] * 2},
            {"reason": "overlap", "threads": [{"first": 1, "last": 2}, {"first": 2, "last": 3}]},
            {"reason": "group", "threads": [{"first": 1, "last": 1}, {"first": 2, "last": last}]},
            {"reason": "one thread", "threads": [{"first": 1, "last": 1}]},
            {"reason": "none", "threads": []},
        ]
    return Reply(json.dumps(answer))


def test_refused_requests_reject_their_traces(tmp_path):
    def refuse_groups(asked: Question) -> Reply:
        refused = Reply(status=400, raw='{"error": {"message": "context too long"}}')
        return refused if asked.stage == "groups" else good(asked)

    with ChatServer(refuse_groups) as server:
        status, summary, rejects = run(tmp_path, server.url)
    assert status == 1 and summary["written"] == 0
    assert [entry["kind"] for entry in rejects] == ["request_refused"] * 20
    assert "context too long" in rejects[0]["message"]


@pytest.mark.parametrize("answer", [sloppy, malformed_at_first, failing_at_first, wrong_ranges])
def test_bad_answers_change_no_byte(tmp_path, answer):
    settings = {"call_timeout_s": 0.5, "retry": dataclasses.replace(RETRY, retries=8)}
    with ChatServer(answer) as server:
        status, summary, rejects = run(tmp_path, server.url, server=settings)
    assert (status, rejects) == (0, [])
    assert responses(tmp_path) == all_records()[1]
    if answer is wrong_ranges:
        dropped = summary["left_sequential"]
        assert dropped["outside_trace"] == 60 and dropped["too_few_threads"] == 40
        assert dropped["overlapping_threads"] == 20 and dropped["overlapping_groups"] == 20


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply("no"), "steps_failed"),
        (Reply('{"steps": [{"number": 1, "first": 0, "last": 1, "summary": ""}]}'), "steps_failed"),
        (
            Reply(
                '{"steps": [{"number": 1, "first": 1, "last": 1, "summary": ""}]}',
                finish_reason="length",
            ),
            "steps_failed",
        ),
    ],
)
def test_nonsense_rejects_every_trace_with_a_reason(tmp_path, reply, kind):
    with ChatServer(lambda asked: reply) as server:
        limits = dataclasses.replace(LIMITS, max_useless_traces=None)
        status, summary, rejects = run(tmp_path, server.url, limits=limits)
    assert status == 1 and summary["written"] == 0
    assert [entry["kind"] for entry in rejects] == [kind] * 20
    assert all(entry["message"] for entry in rejects)
    assert responses(tmp_path) == []
