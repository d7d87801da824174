"""Answers that cannot be used: a run that gets no others stops; more attempts ask again."""

import dataclasses
import json

import pytest

from tests.data.rewrite.chat_server import ChatServer, Question, Reply, good
from tests.data.rewrite.runs import LIMITS, all_records, config, read_jsonl, responses, run
from tw_jax.data.rewrite.command import run_rewrite
from tw_jax.data.rewrite.config import RewriteLimits
from tw_jax.errors import UserError

ONE_BY_ONE = {"concurrency": 1}


def nonsense(asked: Question) -> Reply:
    return Reply("no")


@pytest.mark.parametrize("stage", ["steps", "groups", "verify"])
def test_a_run_without_one_usable_answer_stops_after_ten_traces(tmp_path, stage):
    def answer(asked: Question) -> Reply:
        return Reply("no") if asked.stage == stage else good(asked)

    with ChatServer(answer) as server:
        with pytest.raises(
            UserError, match=f"10 traces got no usable answer in the stage {stage}"
        ) as e:
            run(tmp_path, server.url, server=ONE_BY_ONE)
    assert sum(asked.stage == stage for asked in server.questions) == 10 * LIMITS.attempts
    assert "Stopped with 10 traces not finished" in str(e.value)
    # What is finished is written: the reasons, and where each trace stands.
    rejects = read_jsonl(tmp_path / "out" / "rejects.jsonl")
    assert [entry["kind"] for entry in rejects] == [f"{stage}_failed"] * 10
    assert len(read_jsonl(tmp_path / "out" / "provenance.jsonl")) == 20


def test_the_number_is_a_setting(tmp_path):
    limits = dataclasses.replace(LIMITS, attempts=1, max_useless_traces=2)
    with ChatServer(nonsense) as server:
        with pytest.raises(UserError, match="2 traces got no usable answer"):
            run(tmp_path, server.url, server=ONE_BY_ONE, limits=limits)
        assert len(server.questions) == 2
    with pytest.raises(ValueError, match="max_useless_traces"):
        RewriteLimits(max_useless_traces=0)


def test_one_usable_answer_shows_that_the_server_can(tmp_path):
    first = all_records()[0][0]["prompt"]

    def answer(asked: Question) -> Reply:
        return good(asked) if asked.sections["PROBLEM"] == first else Reply("no")

    with ChatServer(answer) as server:
        status, summary, _ = run(tmp_path, server.url, server=ONE_BY_ONE)
    assert status == 0 and summary["written"] == 1
    assert summary["rejected"] == {"steps_failed": 19}


def test_a_run_that_writes_no_trajectory_says_so_with_its_status(tmp_path, capsys):
    with ChatServer(nonsense) as server:
        assert run_rewrite(config(tmp_path, server.url, max_traces=3)) == 1
    said = capsys.readouterr().out
    assert "no trace could be rewritten" in said
    assert "3 got no usable answer: raise limits.attempts to ask again for them" in said


def test_more_attempts_ask_again_for_what_was_not_usable_and_for_nothing_else(tmp_path):
    records, expected = all_records()
    failing = {record["prompt"] for record in records[:12]}
    down = True

    def answer(asked: Question) -> Reply:
        bad = down and asked.sections["PROBLEM"] in failing
        return Reply(json.dumps(["nothing of use", asked.attempt])) if bad else good(asked)

    with ChatServer(answer) as server:
        limits = dataclasses.replace(LIMITS, max_useless_traces=None)
        assert run(tmp_path, server.url, limits=limits)[1]["rejected"] == {"steps_failed": 12}
        down = False
        # The mended server is not asked for what lies there, and that does not stop the run either.
        asked = len(server.questions)
        assert run(tmp_path, server.url)[1]["rejected"] == {"steps_failed": 12}
        assert len(server.questions) == asked
        limits = dataclasses.replace(LIMITS, attempts=LIMITS.attempts + 1)
        assert run(tmp_path, server.url, limits=limits)[0] == 0
        new = server.questions[asked:]
    assert responses(tmp_path) == expected
    assert {question.sections["PROBLEM"] for question in new} <= failing
    assert [q.attempt for q in new if q.stage == "steps"] == [LIMITS.attempts + 1] * 12


def test_the_same_command_goes_on_after_the_server_is_mended(tmp_path):
    down = True

    def answer(asked: Question) -> Reply:
        return Reply("no") if down else good(asked)

    with ChatServer(answer) as server:
        with pytest.raises(UserError, match="10 traces got no usable answer"):
            run(tmp_path, server.url, server=ONE_BY_ONE)
        down = False
        status, summary, _ = run(tmp_path, server.url, server=ONE_BY_ONE)
    assert status == 0 and summary["written"] == 10
    assert responses(tmp_path) == all_records()[1][10:]
