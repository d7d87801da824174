"""A server that refuses, breaks, hangs or answers nonsense."""

import dataclasses
import datetime
import email.utils
import random
import socket
import time

import numpy as np
import pytest

from tests.rollout.completions_server import (
    CompletionsServer,
    Fault,
    SmallWorldCodec,
    as_vllm,
)
from tests.rollout.scenarios import plans, request
from tests.rollout.small_world import make_schema, text_of
from tw_jax.errors import UserError
from tw_jax.rollout.client import ClientConfig, RolloutClient
from tw_jax.rollout.client_http import RetryPolicy, ServerDownError, retry_after

QUICK = RetryPolicy(retries=3, first_pause_s=0.01, max_pause_s=0.02)
REQUESTS = [request(5, plans("1", "2", "3")), request(1), request(6, plans("1", "2"))]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def client_of(server, **fields):
    url = server if isinstance(server, str) else server.url
    fields = {"dialect": "vllm", "retry": QUICK, "call_timeout_s": 5.0, **fields}
    return RolloutClient(ClientConfig(url, **fields), make_schema(), SmallWorldCodec())


def texts(rollouts):
    return [text_of(rollout.trajectory.tokens) for rollout in rollouts]


@pytest.fixture(scope="module")
def expected():
    with CompletionsServer(as_vllm, tuple(REQUESTS)) as server:
        return texts(client_of(server).generate(REQUESTS))


PASSING = {
    "429": Fault(status=429),
    "408": Fault(status=408),
    "500": Fault(status=500, body="<html>proxy</html>"),
    "503": Fault(status=503, headers={"Retry-After": "0"}),
    "half an answer": Fault(cut=True),
    "broken connection": Fault(drop=True),
    "timeout": Fault(pause_s=0.6),
}


@pytest.mark.parametrize("name", PASSING)
def test_passing_failures_change_nothing(name, expected):
    with CompletionsServer(as_vllm, tuple(REQUESTS)) as server:
        server.faults.extend([PASSING[name]] * 3)
        client = client_of(server, call_timeout_s=0.3 if name == "timeout" else 5.0)
        assert texts(client.generate(REQUESTS)) == expected
        assert client.repeated == 3


def test_retry_after_is_honoured():
    with CompletionsServer(as_vllm, (request(1),)) as server:
        server.faults.append(Fault(status=429, headers={"Retry-After": "0.5"}))
        client_of(server).generate([request(1)])
        assert server.times[1] - server.times[0] >= 0.5


def test_retry_after_is_read_as_seconds_or_a_date():
    assert retry_after(None) == retry_after("soon") == retry_after("-3") == 0.0
    assert retry_after("2.5") == 2.5
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
    assert 27 < retry_after(email.utils.format_datetime(later, usegmt=True)) <= 30
    assert retry_after(email.utils.format_datetime(later.replace(year=2001), usegmt=True)) == 0.0


def test_pauses_are_spread_and_bounded():
    policy, rng = RetryPolicy(first_pause_s=1.0, max_pause_s=8.0), random.Random(0)
    for repetition, bound in enumerate([1, 2, 4, 8, 8, 8]):
        pauses = [policy.pause_s(repetition, 0.0, rng) for _ in range(200)]
        assert 0 <= min(pauses) < 0.1 * bound and 0.9 * bound < max(pauses) <= bound
    assert policy.pause_s(0, 20.0, rng) == 20.0


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    started_s = time.monotonic()
    with pytest.raises(ServerDownError, match=r"4 attempts failed.*Connect.*Is the server up"):
        client_of(url, model="m", context_len=99, concurrency=2).generate(REQUESTS * 50)
    assert time.monotonic() - started_s < 3, "all rollouts end with the first that gives up"


@pytest.mark.parametrize("url", ["localhost:8000/v1", "http://", "ftp://there/v1"])
def test_bad_urls(url):
    with pytest.raises(UserError, match="server"):
        client_of(url, retry=RetryPolicy(retries=0)).generate(REQUESTS)


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "server.api_key_env"), (404, "server.url mostly ends in /v1")]
)
def test_refusals_name_the_remedy_and_are_not_repeated(status, remedy):
    with CompletionsServer(as_vllm, tuple(REQUESTS)) as server:
        server.always = Fault(status=status)
        with pytest.raises(UserError, match=rf"status {status} \(no such luck\); .*{remedy}"):
            client_of(server, concurrency=1).generate(REQUESTS)
        assert len(server.bodies) <= 3  # the threads of the first rollout at most


def test_one_refused_rollout_does_not_stop_the_others(expected):
    finished = {}
    with CompletionsServer(as_vllm, tuple(REQUESTS)) as server:
        server.faults.append(Fault(status=400))
        client = client_of(server, concurrency=1)
        with pytest.raises(UserError, match="1 of 3 rollouts failed.*request 0: .*server.dialect"):
            client.generate(REQUESTS, on_finish=finished.__setitem__)
    assert texts([finished[1], finished[2]]) == expected[1:]


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_call_that_always_fails_fails_its_rollout_alone(concurrency):
    requests = [request(1), request(2)]

    def answer(body, write):
        return {} if body["temperature"] == 0.5 else as_vllm(body, write)

    bad, finished = request(3, temperature=0.5), {}
    with CompletionsServer(answer, (*requests, bad)) as server:
        client = client_of(server, concurrency=concurrency)
        with pytest.raises(UserError, match="1 of 3 .*request 0: .*4 attempts .* neither token"):
            client.generate([bad, *requests], on_finish=finished.__setitem__)
    assert set(finished) == {1, 2}


def test_a_server_that_refuses_requests_is_asked_all_of_them():
    """It is there; only what it refuses is bad, also where nothing else is left to ask."""
    with CompletionsServer(as_vllm) as server:
        server.always = Fault(status=400)
        with pytest.raises(UserError, match="5 of 5 rollouts failed") as stopped:
            client_of(server, concurrency=1).generate([request(i) for i in range(5)])
        assert not isinstance(stopped.value, ServerDownError)
        assert len(server.bodies) == 5


def test_a_server_that_fails_everything_is_given_up():
    with CompletionsServer(as_vllm) as server:
        server.always = Fault(status=500)
        with pytest.raises(ServerDownError, match="3 rollouts failed one after another"):
            client_of(server, concurrency=1).generate([request(i) for i in range(50)])
        assert len(server.bodies) == 3 * 4


def test_a_deadline_ends_rollouts_where_they_are(expected):
    """What has joined or was answered stays; what was under way is missing."""
    asked = [dataclasses.replace(REQUESTS[0], timeout_s=0.5), REQUESTS[1]]

    def answer(body, write):
        third = text_of(body["prompt"]).endswith("<Thread>\n3:")
        time.sleep(3.0 if third else 0.0)
        return as_vllm(body, write)

    with CompletionsServer(answer, tuple(asked)) as server:
        late, other = client_of(server).generate(asked)
    assert late.finish_reason == "deadline" and texts([other]) == expected[1:2]
    assert expected[0].startswith(text_of(late.trajectory.tokens))
    (block,) = late.trajectory.blocks
    assert [thread.number for thread in block.threads] == ["1", "2"]
    assert [u.thread for u in late.units] == [0, 1, 2]
    assert late.trajectory.tokens[-1] == late.trajectory.tokens[block.threads[-1].end - 1]


def test_a_deadline_for_all(expected):
    with CompletionsServer(as_vllm, tuple(REQUESTS), pause_s=2.0) as server:
        started_s = time.monotonic()
        client = client_of(server, deadline_s=0.3, concurrency=2)
        rollouts = client.generate(REQUESTS * 3)
        assert time.monotonic() - started_s < 1.5
    assert [r.finish_reason for r in rollouts] == ["deadline"] * 9
    assert rollouts[0].total_tokens == len(REQUESTS[0].forced_prefix)


def test_a_server_with_a_shorter_context_ends_rollouts():
    """It says `length` before the budget is spent."""

    def answer(body, write):
        room = max(1, 30 - len(body["prompt"]))
        return as_vllm({**body, "max_tokens": min(body["max_tokens"], room)}, write)

    asked = request(1, max_response_tokens=90)
    with CompletionsServer(answer, (asked,)) as server:
        (rollout,) = client_of(server).generate([asked])
    assert rollout.finish_reason == "context"
    assert len(rollout.trajectory.tokens) == 30


def test_models_are_asked_for():
    two = ({"id": "a"}, {"id": "b", "max_model_len": 50})
    with CompletionsServer(as_vllm, (request(1),), models=two) as server:
        with pytest.raises(UserError, match=r"lists 2 models \(a, b\); choose one with server.mo"):
            client_of(server).generate([request(1)])
        with pytest.raises(UserError, match="server.model='c': .* lists a, b"):
            client_of(server, model="c").generate([request(1)])
        with pytest.raises(UserError, match="set server.context_len"):
            client_of(server, model="a").generate([request(1)])
        with pytest.raises(UserError, match="request 0: .*no room in server.context_len=50"):
            client_of(server, model="b").generate([request(1, prompt="<bos>" + "a" * 50)])
        assert not server.bodies
        client_of(server, model="a", context_len=60).generate([request(1)])
        assert server.bodies[0]["model"] == "a"


def test_bad_requests_and_schemas_are_refused():
    with CompletionsServer(as_vllm) as server:
        bad = dataclasses.replace(request(0), prompt=np.zeros(0, np.int32))
        with pytest.raises(UserError, match="request 1: the prompt is empty"):
            client_of(server).generate([request(0), bad])
    with pytest.raises(UserError, match="joins by 'gather_kv'"):
        RolloutClient(
            ClientConfig("http://x/v1"),
            dataclasses.replace(make_schema(), join_rule="gather_kv"),
            SmallWorldCodec(),
        )
    for bad in ({"concurrency": 0}, {"call_timeout_s": 0.0}, {"deadline_s": -1.0}):
        with pytest.raises(ValueError):
            ClientConfig("http://x/v1", **bad)
