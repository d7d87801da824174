"""Money and time: budgets, the cache, resuming, dry runs, servers that fail, the request itself."""

import asyncio
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.data.rewrite.chat_server import ChatServer, Question, Reply, good
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
from tw_jax.data.rewrite.config import ChatServerConfig, RewriteBudget, RewriteConfig
from tw_jax.data.rewrite.ledger import Ledger, StoredAnswer
from tw_jax.data.rewrite.spending import BudgetSpent, Purse
from tw_jax.errors import UserError
from tw_jax.rollout.client_http import RetryPolicy

PRICES = {"price_in_usd_per_million": 1000.0, "price_out_usd_per_million": 4000.0}
OUTPUTS = ("trajectories.jsonl", "provenance.jsonl", "summary.json")


def outputs(folder) -> dict[str, bytes]:
    return {name: (folder / "out" / name).read_bytes() for name in OUTPUTS}


def test_a_second_run_asks_nothing_and_writes_the_same_bytes(tmp_path):
    with ChatServer() as server:
        run(tmp_path, server.url)
        asked, first = len(server.questions), outputs(tmp_path)
        run(tmp_path, server.url)
        assert len(server.questions) == asked and outputs(tmp_path) == first


@pytest.mark.parametrize("unit", ["usd", "tokens"])
def test_a_budget_is_never_exceeded_and_what_was_finished_is_written(tmp_path, unit, capsys):
    with ChatServer() as server:
        run(tmp_path, server.url, server=PRICES)
        with Ledger(tmp_path / "out" / "answers.sqlite") as ledger:
            total = ledger.total()
        (tmp_path / "out" / "answers.sqlite").unlink()
        half = total.usd / 2 if unit == "usd" else total.tokens // 2
        budget = RewriteBudget(**{f"max_{unit}": half})
        # Answers are short here, so the worst case is not far from the truth.
        status, summary, _ = run(
            tmp_path, server.url, server={**PRICES, "max_answer_tokens": 300}, budget=budget
        )
        with Ledger(tmp_path / "out" / "answers.sqlite") as ledger:
            spent = getattr(ledger.total(), unit)
        assert 0 < spent <= half
        assert status == 1 and 0 < summary["unfinished"]["budget"] <= 20
        assert summary["written"] + summary["unfinished"]["budget"] == 20
        assert len(responses(tmp_path)) == summary["written"]
        assert f"budget.max_{unit}" in capsys.readouterr().out
        status, summary, _ = run(tmp_path, server.url, server={**PRICES, "max_answer_tokens": 300})
    assert status == 0 and responses(tmp_path) == all_records()[1]


def test_answers_without_usage_count_as_their_worst_case(tmp_path):
    def silent(asked: Question) -> Reply:
        reply = good(asked)
        reply.usage = {}
        return reply

    with ChatServer(silent) as server:
        run(tmp_path, server.url, max_traces=1)
    with Ledger(tmp_path / "out" / "answers.sqlite") as ledger:
        total = ledger.total()
    assert total.answer_tokens == 500 * total.calls
    assert total.prompt_tokens >= total.prompt_chars


def test_the_purse_waits_for_calls_in_flight_before_it_gives_up():
    async def scenario():
        purse = Purse(RewriteBudget(max_tokens=100), 0.0, 0)
        await purse.reserve(0, 80)
        waiting = asyncio.ensure_future(purse.reserve(0, 60))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await purse.settle(0, 80, spent_usd=0, spent_tokens=30)
        await waiting
        await purse.settle(0, 60, spent_usd=0, spent_tokens=60)
        assert purse.tokens == 90
        with pytest.raises(BudgetSpent):
            await purse.reserve(0, 11)
        await purse.reserve(0, 10)

    asyncio.run(scenario())


def test_unusable_answers_are_paid_for_and_kept_too(tmp_path):
    limits = dataclasses.replace(LIMITS, max_useless_traces=None)
    with ChatServer(lambda asked: Reply("no")) as server:
        _, summary, _ = run(tmp_path, server.url, limits=limits)
        assert summary["stages"][0]["cost"]["calls"] == 60  # 20 traces, 3 attempts
        run(tmp_path, server.url)
        assert len(server.questions) == 60


KILLED = """
import pathlib, sys
from tests.data.rewrite.runs import config
from tw_jax.data.rewrite.command import run_rewrite
run_rewrite(config(pathlib.Path(sys.argv[1]), sys.argv[2], server={"concurrency": 3}))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_writes_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # Answers differ from call to call: only what was stored can lead to the same bytes.
    counter = iter(range(10**6))

    def restless(asked: Question) -> Reply:
        reply = good(asked)
        reply.pause_s = 0.02
        if asked.stage == "groups":
            answer = json.loads(reply.text)
            answer["groups"][0]["reason"] = f"reason {next(counter)}"
            reply.text = json.dumps(answer)
        return reply

    for folder in (whole, killed):
        folder.mkdir()
    write_jsonl(killed / "input.jsonl", all_records()[0])
    with ChatServer(restless) as server:
        for enough in (15, 60):
            before = len(server.questions)
            process = subprocess.Popen(
                [sys.executable, "-c", KILLED, str(killed), server.url],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdout=subprocess.DEVNULL,
            )
            deadline = time.monotonic() + 60
            while len(server.questions) < before + enough and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert not (killed / "out" / "trajectories.jsonl").exists()
            assert len(server.questions) >= before + enough
        with Ledger(killed / "out" / "answers.sqlite") as ledger:
            kept = ledger.total().calls
        assert kept >= 60
        asked = len(server.questions)
        run(killed, server.url, server={"concurrency": 3})
        # What was stored is not asked again; at most the calls in flight at two kills are.
        with Ledger(killed / "out" / "answers.sqlite") as ledger:
            assert len(server.questions) - asked == ledger.total().calls - kept
        # A run with the same answers and without a kill.
        (whole / "out").mkdir()
        for end in ("", "-wal", "-shm"):
            path = killed / "out" / f"answers.sqlite{end}"
            if path.exists():
                (whole / "out" / path.name).write_bytes(path.read_bytes())
        run(whole, server.url, inputs=(str(killed / "input.jsonl"),))
    assert outputs(killed) == outputs(whole)
    assert responses(killed) == all_records()[1]


def test_a_dry_run_calls_nothing_and_says_what_the_rest_costs(tmp_path, capsys):
    with ChatServer() as server:
        status = run_rewrite(config(tmp_path, server.url, server=PRICES, dry_run=True))
        first = capsys.readouterr().out
        assert status == 0 and server.questions == []
        assert not (tmp_path / "out" / "trajectories.jsonl").exists()
        assert not (tmp_path / "out" / "answers.sqlite").exists()
        calls, _, _, usd = estimated_total(first)
        # 20 traces: 3 calls, 6.26 blocks of 1.58 later threads (x 1.3) and a plan each.
        assert calls == pytest.approx(20 * (3 + 6.26 * (1.58 * 1.3 + 1)), rel=0.01)
        assert usd > 0 and "published averages" in re.sub(r"\s+", " ", first)
        run(tmp_path, server.url, server=PRICES, max_traces=10)
        before = outputs(tmp_path)
        capsys.readouterr()
        run_rewrite(config(tmp_path, server.url, server=PRICES, dry_run=True))
        second = capsys.readouterr().out
        asked = len(server.questions)
    assert estimated_total(second)[0] == pytest.approx(calls / 2, rel=0.01)
    assert len([q for q in server.questions]) == asked and outputs(tmp_path) == before
    checks = next(line for line in second.splitlines() if "checks" in line)
    assert re.findall(r"\d+", checks)[0] == "10"


def test_a_dry_run_of_finished_traces_costs_nothing(tmp_path, capsys):
    with ChatServer() as server:
        run(tmp_path, server.url, server=PRICES)
        capsys.readouterr()
        run_rewrite(config(tmp_path, server.url, server=PRICES, dry_run=True))
    assert estimated_total(capsys.readouterr().out) == (0, 0, 0, 0)


def estimated_total(text: str) -> tuple[float, ...]:
    estimate = text[text.index("estimate of what is missing") :]
    line = next(line for line in estimate.splitlines() if "total" in line)
    numbers = re.findall(r"[\d,.]*\d", line)
    return tuple(float(number.replace(",", "")) for number in numbers)


def test_a_server_that_fails_leaves_traces_for_the_next_run(tmp_path, capsys):
    failing = ("two-products", "self-check")
    problems = {r["prompt"] for r in all_records()[0] if r["id"] in failing}
    down = True

    def answer(asked: Question) -> Reply:
        if down and asked.sections["PROBLEM"] in problems and asked.stage == "groups":
            return Reply(status=503, raw="busy")
        return good(asked)

    with ChatServer(answer) as server:
        status, summary, rejects = run(tmp_path, server.url, server={"concurrency": 2})
        assert status == 1 and summary["unfinished"] == {"call_failed": 2} and rejects == []
        assert "same command again" in capsys.readouterr().out
        down = False
        assert run(tmp_path, server.url)[0] == 0
    assert responses(tmp_path) == all_records()[1]


def test_a_server_that_is_gone_stops_the_run_and_says_so(tmp_path):
    with ChatServer() as server:
        run(tmp_path, server.url, max_traces=5)
        url = server.url
    with pytest.raises(UserError, match="Is the server up.*15 traces not finished"):
        run(tmp_path, url)
    assert len(responses(tmp_path)) == 5


def test_a_server_that_fails_every_call_is_given_up_soon(tmp_path):
    with ChatServer(lambda asked: Reply(status=500, raw="")) as server:
        with pytest.raises(UserError, match="3 calls failed one after another"):
            run(
                tmp_path,
                server.url,
                server={"concurrency": 1, "retry": RetryPolicy(1, 0.001, 0.001)},
            )
    assert len(server.questions) == 6


def test_a_page_in_place_of_answers_asks_whether_the_url_is_right(tmp_path, capsys):
    with ChatServer(lambda asked: Reply(raw="<html>hello</html>")) as server:
        settings = {"concurrency": 1, "retry": RetryPolicy(1, 0.001, 0.001)}
        with pytest.raises(UserError) as stopped:
            run(tmp_path, server.url, server=settings)
        assert f"Is server.url={server.url} right?" in str(stopped.value)
        # Too few of them to stop the run: the advice names the URL too.
        assert run_rewrite(config(tmp_path, server.url, server=settings, max_traces=2)) == 1
    assert "2 call_failed (see whether server.url is right" in capsys.readouterr().out


def test_a_server_that_refuses_everything_is_named(tmp_path):
    with ChatServer(lambda asked: Reply(status=400, raw='{"error": "no such thing"}')) as server:
        with pytest.raises(UserError) as stopped:
            run(tmp_path, server.url, server={"concurrency": 1})
    assert f"at last: {server.url}: status 400 (no such thing). Is" in str(stopped.value)


def test_a_refused_key_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SOME_KEY", "wrong")
    with ChatServer(lambda asked: Reply(status=401, raw='{"error": "bad key"}')) as server:
        with pytest.raises(UserError, match=r"api_key_env\. Stopped with 20 traces"):
            run(tmp_path, server.url, server={"api_key_env": "SOME_KEY", "concurrency": 1})
    assert len(server.questions) == 1
    assert "yield per stage" not in capsys.readouterr().out  # it would hold nothing but zeros
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(UserError, match="SOME_KEY is not set"):
        run(tmp_path, server.url, server={"api_key_env": "SOME_KEY"})


@pytest.mark.parametrize("structured_output", ["auto", "always", "never"])
def test_structured_output_is_asked_for_where_it_is_wanted(tmp_path, structured_output):
    with ChatServer() as server:
        run(tmp_path, server.url, server={"structured_output": structured_output}, max_traces=1)
    formats = [body.get("response_format") for body in server.bodies]
    if structured_output == "never":
        assert set(formats) == {None}
    else:
        assert formats[0]["json_schema"]["strict"] is True
        assert formats[0]["json_schema"]["schema"]["required"] == ["steps"]


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_without_structured_output_is_asked_without(tmp_path, status):
    def plain_only(asked: Question) -> Reply:
        has_format = "response_format" in asked.body
        return Reply(status=status, raw="{}") if has_format else good(asked)

    with ChatServer(plain_only) as server:
        run(tmp_path, server.url, server={"concurrency": 1})
        assert responses(tmp_path) == all_records()[1]
        assert sum("response_format" in body for body in server.bodies) == 1
        run(tmp_path, server.url)  # answers are found whichever way they were asked for
        assert sum("response_format" in body for body in server.bodies) == 1
        (tmp_path / "out" / "answers.sqlite").unlink()
        with pytest.raises(UserError, match=f"3 calls failed.*status {status}"):
            run(tmp_path, server.url, server={"structured_output": "always", "concurrency": 1})


def test_settings_of_the_server_reach_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    settings = {
        "api_key_env": "SOME_KEY",
        "temperature": 0.7,
        "max_answer_tokens": 321,
        "token_limit_name": "max_completion_tokens",
        "reasoning_effort": "low",
    }
    with ChatServer() as server:
        run(tmp_path, server.url, server=settings, max_traces=1)
        body = server.bodies[0]
        assert (body["temperature"], body["max_completion_tokens"]) == (0.7, 321)
        assert body["reasoning_effort"] == "low" and body["model"] == "scripted"
        (tmp_path / "out" / "answers.sqlite").unlink()
        run(tmp_path, server.url, server={"temperature": None}, max_traces=1)
        body = server.bodies[-1]
    assert "temperature" not in body and "reasoning_effort" not in body
    assert body["max_tokens"] == 500


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0},
        {"call_timeout_s": 0.0},
        {"max_answer_tokens": 0},
        {"temperature": -1.0},
        {"price_in_usd_per_million": -1.0},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ChatServerConfig(url="http://x", model="m", **wrong)


def test_a_budget_in_money_needs_prices(tmp_path):
    with pytest.raises(ValueError, match="give the prices"):
        RewriteConfig(
            "in.jsonl",
            tmp_path,
            ChatServerConfig("http://x", "m"),
            budget=RewriteBudget(max_usd=1.0),
        )


def test_a_folder_whose_ledger_is_none_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "answers.sqlite").write_text("no database, but text of some length" * 50)
    with pytest.raises(UserError, match="cannot be read or written"):
        run(tmp_path, "http://127.0.0.1:1/v1")


def test_the_ledger_gives_back_what_it_was_given(tmp_path):
    answer = StoredAnswer("text \u20ac", "stop", 10, 4, 2, 0.25)
    with Ledger(tmp_path / "a.sqlite") as ledger:
        ledger.store("key", "steps", "model", answer)
    with Ledger(tmp_path / "a.sqlite") as ledger:
        assert ledger.find("key") == answer and ledger.find("other") is None
        assert ledger.total().tokens == 6 and ledger.costs()["steps"].usd == 0.25
    with Ledger(tmp_path / "none.sqlite", read_only=True) as ledger:
        assert ledger.total().calls == 0
    assert not (tmp_path / "none.sqlite").exists()
    assert read_jsonl(tmp_path / "none.jsonl") == []
