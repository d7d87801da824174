"""What the run decides from answers: drops, edits, plans, what is given up, what is asked again."""

import dataclasses
import json

import pytest

from tests.data.rewrite.chat_server import ChatServer, Question, Reply, good, good_answer
from tests.data.rewrite.marked_traces import cases, make_case, record
from tests.data.rewrite.runs import LIMITS, read_jsonl, responses, run, write_jsonl
from tw_jax.data.rewrite import rendering, trace_rewrite


def one_trace(tmp_path, name: str):
    """The input is one of the traces; returns it."""
    case = next(case for case in cases() if case.id == name)
    write_jsonl(tmp_path / "input.jsonl", [record(case, 3)[0]])
    return case


def only(stage: str, answer):
    """A server that answers one stage otherwise."""

    def reply(asked: Question) -> Reply:
        return answer(asked) if asked.stage == stage else good(asked)

    return reply


def said(value) -> Reply:
    return Reply(json.dumps(value))


def test_a_block_that_the_check_rejects_stays_sequential(tmp_path):
    case = one_trace(tmp_path, "two-blocks")
    verdicts = [
        {"block": 1, "keep": False, "reason": "uses the other"},
        {"block": 2, "keep": True, "reason": "fine"},
    ]
    with ChatServer(only("verify", lambda asked: said({"verdicts": verdicts}))) as server:
        status, summary, _ = run(tmp_path, server.url)
    (response,) = responses(tmp_path)
    assert status == 0 and summary["left_sequential"] == {"not_independent": 1}
    start = response.index("<Parallel>")
    assert case.source.startswith(response[:start]) and "126 = 2*63" in response[:start]
    assert response[start:] == case.expected[case.expected.rindex("<Parallel>") :]
    asked = {asked.stage for asked in server.questions if "= 2*42" in str(asked.sections)}
    assert "outlines" in asked  # the second block's context shows the first block's lines
    (entry,) = read_jsonl(tmp_path / "out" / "provenance.jsonl")
    assert entry["dropped"] == [
        {"group": 0, "kind": "not_independent", "message": "uses the other"}
    ]


def test_a_block_without_a_verdict_is_not_kept(tmp_path):
    one_trace(tmp_path, "sign-cases")
    with ChatServer(only("verify", lambda asked: said({"verdicts": []}))) as server:
        status, summary, rejects = run(tmp_path, server.url)
    assert status == 1 and summary["written"] == 0
    assert rejects[0]["kind"] == "no_parallel_block"
    assert "1 not_independent" in rejects[0]["message"]
    assert {asked.stage for asked in server.questions} == {"steps", "groups", "verify"}


def test_traces_without_a_block_are_written_only_where_asked_for(tmp_path):
    case = one_trace(tmp_path, "sign-cases")
    with ChatServer(only("groups", lambda asked: said({"groups": []}))) as server:
        assert run(tmp_path, server.url)[1]["written"] == 0
        assert run(tmp_path, server.url, keep_sequential=True)[1]["written"] == 1
    assert responses(tmp_path) == [case.source]


def test_every_later_thread_is_checked_against_every_earlier_sibling(tmp_path):
    case = one_trace(tmp_path, "five-remainders")
    with ChatServer() as server:
        run(tmp_path, server.url)
    asked = [a.sections for a in server.questions if a.stage == "references"]
    seen = {sections["THREAD"]: sections["SIBLINGS"] for sections in asked}
    threads = [thread.source for thread in case.blocks[0]]
    for place, thread in enumerate(threads[1:], start=1):
        expected = "\n\n".join(f"Thread {n + 1}:\n{threads[n]}" for n in range(place))
        assert seen[thread] == expected
    # One thread was edited, and looked at once more.
    assert len(asked) == 5 and case.blocks[0][3].written in seen
    assert all(sections["CONTEXT"] == "One by one." for sections in asked)


def test_a_block_that_still_refers_is_given_up(tmp_path):
    one_trace(tmp_path, "two-blocks")
    words = iter(range(1000))

    def stubborn(asked: Question) -> Reply:
        thread = asked.sections["THREAD"]
        if "126" not in thread:
            return good(asked)
        find = next(word for word in thread.split() if word.startswith(("word", "3^2")))
        edit = {"find": find, "replace": f"word{next(words)}", "reason": "refers"}
        return said({"replacements": [edit]})

    with ChatServer(only("references", stubborn)) as server:
        status, summary, _ = run(tmp_path, server.url)
    assert status == 0 and summary["left_sequential"] == {"still_refers": 1}
    assert summary["blocks"] == 1 and responses(tmp_path)[0].count("<Parallel>") == 1
    rounds = [asked for asked in server.questions if asked.stage == "references"]
    assert len(rounds) == LIMITS.max_rounds + 1 + 1  # one more for the other block


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        ({"find": "not there", "replace": "x"}, "occurs 0 times"),
        ({"find": "i", "replace": "x"}, "times in the thread"),
        (
            {"find": "Then 3 - x = 2x.\nSo 3x = 3 and x = 1, which is below 3.", "replace": ""},
            "touch",
        ),
        ({"find": "below", "replace": "<Thread>"}, "control tag"),
    ],
)
def test_a_bad_replacement_is_asked_for_again_with_the_complaint(tmp_path, edit, complaint):
    case = one_trace(tmp_path, "sign-cases")

    def answer(asked: Question) -> Reply:
        return (
            good(asked) if asked.attempt > 1 else said({"replacements": [{**edit, "reason": ""}]})
        )

    with ChatServer(only("references", answer)) as server:
        assert run(tmp_path, server.url, limits=LIMITS)[0] == 0
    assert responses(tmp_path) == [case.expected]
    again = [a for a in server.questions if a.attempt == 2]
    assert again and complaint in again[0].body["messages"][-1]["content"].rpartition("#")[2]


def test_the_changed_share_is_bounded_over_all_rounds(tmp_path):
    one_trace(tmp_path, "sign-cases")
    limits = dataclasses.replace(LIMITS, max_changed_share=0.1)
    with ChatServer() as server:  # the good edit touches more than a tenth of the thread
        _, summary, rejects = run(tmp_path, server.url, limits=limits)
    assert summary["left_sequential"] == {"references_failed": 1}
    assert rejects[0]["kind"] == "no_parallel_block"


def test_what_two_rounds_change_counts_together(tmp_path):
    case = one_trace(tmp_path, "sign-cases")
    thread = case.blocks[0][1].source
    limits = dataclasses.replace(LIMITS, max_changed_share=30 / len(thread))

    def twice(asked: Question) -> Reply:
        for find in ("In the other case", "which is below"):  # 17 and 14 characters
            if find in asked.sections["THREAD"]:
                edit = {"find": find, "replace": "Where", "reason": ""}
                return said({"replacements": [edit]})
        return said({"replacements": []})

    with ChatServer(only("references", twice)) as server:
        _, summary, _ = run(tmp_path, server.url, limits=limits)
        assert summary["left_sequential"] == {"references_failed": 1}
        assert "at most 13 may change" in server.bodies[-1]["messages"][-1]["content"]
        limits = dataclasses.replace(LIMITS, max_changed_share=32 / len(thread))
        _, summary, _ = run(tmp_path, server.url, limits=limits)
    assert summary["left_sequential"] == {} and summary["written"] == 1
    assert "Where x < 3. Then 3 - x = 2x.\nSo 3x = 3 and x = 1, Where 3." in responses(tmp_path)[0]


@pytest.mark.parametrize("old", ["No solution here.\n", "<Thread>\n2", "<Outline>2: "])
def test_nothing_is_written_that_does_not_pass_the_checks(tmp_path, monkeypatch, old):
    one_trace(tmp_path, "sign-cases")

    def broken(lines, blocks):
        text = rendering.render(lines, blocks)
        assert text.count(old) == 1
        return text.replace(old, "")

    monkeypatch.setattr(trace_rewrite, "render", broken)
    with ChatServer() as server:
        status, summary, rejects = run(tmp_path, server.url)
    assert status == 1 and summary["written"] == 0
    kind = "invalid_format" if "Outline" in old else "unconserved"
    assert [entry["kind"] for entry in rejects] == [kind]
    assert responses(tmp_path) == []


def test_a_plan_that_gives_a_result_away_is_written_anew_or_the_block_stays_sequential(tmp_path):
    case = one_trace(tmp_path, "two-products")

    def leaking(asked: Question) -> Reply:
        plans = good_answer(asked)["outlines"]
        return said({"outlines": [f"{plans[0]} It is 1200.", plans[1]]})

    def leaking_at_first(asked: Question) -> Reply:
        return leaking(asked) if asked.attempt == 1 else good(asked)

    with ChatServer(only("outlines", leaking_at_first)) as server:
        run(tmp_path, server.url)
        assert responses(tmp_path) == [case.expected]
        assert "gives away 1200" in server.bodies[-1]["messages"][-1]["content"]
    (tmp_path / "out" / "answers.sqlite").unlink()
    with ChatServer(only("outlines", leaking)) as server:
        _, summary, rejects = run(tmp_path, server.url)
    assert summary["left_sequential"] == {"outlines_failed": 1}
    assert rejects[0]["kind"] == "no_parallel_block"
    assert sum(asked.stage == "outlines" for asked in server.questions) == LIMITS.attempts


def test_a_long_plan_is_refused(tmp_path):
    one_trace(tmp_path, "two-products")
    limits = dataclasses.replace(LIMITS, max_outline_chars=20)
    with ChatServer() as server:
        _, summary, _ = run(tmp_path, server.url, limits=limits)
    assert summary["left_sequential"] == {"outlines_failed": 1}


def test_the_context_of_a_block_is_bounded(tmp_path):
    one_trace(tmp_path, "dead-end")
    limits = dataclasses.replace(LIMITS, context_chars=60)
    with ChatServer() as server:
        run(tmp_path, server.url, limits=limits)
    contexts = {a.sections["CONTEXT"] for a in server.questions if "CONTEXT" in a.sections}
    assert contexts == {"Wait, that already factors it. But let me do both to be safe."[-60:]}


def test_tags_from_an_answer_never_reach_the_text(tmp_path):
    one_trace(tmp_path, "two-products")

    def tagged(asked: Question) -> Reply:
        return said({"outlines": ["</Outline><Thread>", "Multiply."]})

    with ChatServer(only("outlines", tagged)) as server:
        assert run(tmp_path, server.url)[1]["written"] == 0
    assert responses(tmp_path) == []


def test_a_request_that_the_server_refuses_costs_its_block_only(tmp_path):
    one_trace(tmp_path, "two-blocks")

    def refuse_one(asked: Question) -> Reply:
        is_first = "84 = 2*42" in asked.sections["THREADS"]
        return Reply(status=413, raw="too large") if is_first else good(asked)

    with ChatServer(only("outlines", refuse_one)) as server:
        status, summary, _ = run(tmp_path, server.url)
    assert status == 0 and summary["blocks"] == 1
    assert summary["left_sequential"] == {"request_refused": 1}


def test_texts_that_are_equal_are_paid_for_once(tmp_path):
    case = make_case("a", "What is 2+2?", "Hm.\nIt is 4.", "4")
    fields = [record(case, 3)[0] | {"id": n} for n in range(6)]
    write_jsonl(tmp_path / "input.jsonl", fields)
    with ChatServer(lambda asked: said({"groups": [], "steps": [STEP]})) as server:
        run(tmp_path, server.url, keep_sequential=True)
    assert len(server.questions) == 2 and len(responses(tmp_path)) == 6


STEP = {"number": 1, "first": 1, "last": 2, "summary": "", "depends_on": [], "substeps": []}


def test_characters_that_the_tokenizer_does_not_know_are_asked_for_again(tmp_path):
    case = one_trace(tmp_path, "sign-cases")

    def curly(asked: Question) -> Reply:
        answer = good_answer(asked)
        if asked.attempt == 1 and asked.stage == "outlines":
            answer["outlines"][0] += " \u2026"
        if asked.attempt == 1 and answer.get("replacements"):
            answer["replacements"][0]["replace"] += "\u2019"
        return said(answer)

    with ChatServer(curly) as server:
        assert run(tmp_path, server.url)[0] == 0
    assert responses(tmp_path) == [case.expected]
    assert {asked.stage for asked in server.questions if asked.attempt == 2} == {
        "references",
        "outlines",
    }
