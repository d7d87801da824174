"""Bad requests, limits, and clients that leave."""

import concurrent.futures
import dataclasses

import httpx
import pytest

from tests.serve.small_server import SAMPLING, SlowThread, error_of, serving, wait_until
from tw_jax.serve.config import ServeConfig

LONG = {"max_tokens": 130, "stop": ["never"], "logit_bias": {"1": -100}}  # <eos> is banned


@pytest.fixture(scope="module")
def server():
    with serving(max_request_bytes=4000, max_queue=2, max_choices=4) as running:
        yield running


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "required"),
        ({"prompt": 3}, "prompt", "string"),
        ({"prompt": [1, "a"]}, "prompt", ""),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "the prompt is empty"),
        ({"prompt": [99]}, "prompt", "0..23"),
        ({"prompt": "a" * 150}, "prompt", "no room in engine.context_len=144"),
        ({"prompt": "a", "n": "2"}, "n", "integer"),
        ({"prompt": "a", "n": 5}, "n", "gives 4 to a request"),
        ({"prompt": "a", "n": True}, "n", "integer"),
        ({"prompt": "a", "temperature": -1}, "temperature", "greater"),
        ({"prompt": "a", "top_p": 0}, "top_p", "greater"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "greater"),
        ({"prompt": "a", "max_threads": 9}, "max_threads", "1..4"),
        ({"prompt": "a", "max_blocks": 9}, "max_blocks", "1..3"),
        ({"prompt": "a", "seed": -1}, "seed", "greater"),
        ({"prompt": "a", "stop": [""]}, "stop", "at least 1"),
        ({"prompt": "a", "logprobs": 3}, "logprobs", "ask for 0"),
        ({"prompt": "a", "stream": "yes"}, "stream", "boolean"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", "stream=true"),
        ({"prompt": "a", "logit_bias": {"99": 1}}, "logit_bias", "0..23"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "pattern"),
        ({"prompt": "a", "repetition_penalty": 0.001}, "repetition_penalty", "must lie in"),
        ({"prompt": "a", "echo": True}, "echo", "not supported"),
        ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"prompt": "a", "wibble": 1}, "wibble", "no such field"),
    ],
)
def test_bad_fields_are_named(server, body, param, message):
    error = error_of(server.post(**body), 400)
    assert error["param"] == param and message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least 1"),
        ([{"role": "robot", "content": "a"}], "'user'"),
        ([{"role": "user"}], "required"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'text'"),
    ],
)
def test_bad_messages_are_named(server, messages, message):
    error = error_of(server.post("chat/completions", messages=messages), 400)
    assert error["param"] == "messages" and message in error["message"]


def test_neutral_values_of_unsupported_fields_pass(server):
    neutral = {"frequency_penalty": 0, "echo": False, "best_of": 1, "user": "me", "suffix": None}
    assert server.post(prompt="a", max_tokens=2, **neutral).status_code == 200


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{", "application/json"),
        (b"\xff", "application/json"),
        (b"[" * 3000, "application/json"),
        (b"[1]", "application/json"),
        (b"", "application/json"),
        (b'{"prompt": "a", "\\ud800": 1}', "application/json"),
        (b'{"prompt": "\\ud800"}', "application/json"),
        (b'{"prompt": "a"}', "text/plain"),
        (b'{"prompt": "a", "temperature": NaN}', "application/json"),
        (b'{"prompt": "a", "seed": ' + b"9" * 2000 + b"}", "application/json"),
    ],
)
def test_bodies_that_are_no_requests(server, content, kind):
    url, headers = f"{server.url}/v1/completions", {"Content-Type": kind}
    error_of(httpx.post(url, content=content, headers=headers), 400)


def test_other_refusals(server):
    assert error_of(server.post(prompt="a", model="gpt"), 404)["code"] == "model_not_found"
    assert error_of(server.post("nowhere"), 404)
    assert error_of(httpx.get(f"{server.url}/v1/completions"), 405)
    large = error_of(server.post(prompt="a", user="x" * 5000), 413)
    assert large["code"] == "request_too_large"

    def chunks():  # no Content-Length
        yield b'{"prompt": "'
        yield b"a" * 5000

    headers = {"Content-Type": "application/json"}
    url = f"{server.url}/v1/completions"
    assert error_of(httpx.post(url, content=chunks(), headers=headers), 413) == large


def test_a_full_queue(server):
    """Five run and two wait; all or none of a request's answers are taken."""
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        posts = [pool.submit(server.post, prompt="a", **LONG) for _ in range(24)]
        responses = [post.result() for post in posts]
    refused = [r for r in responses if r.status_code != 200]
    assert 1 <= len(refused) <= 24 - 7
    for response in refused:
        error = error_of(response, 429)
        assert error["code"] == "queue_full" and int(response.headers["Retry-After"]) >= 1
    wait_until(lambda: server.service.thread.outstanding == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels(server, stream):
    thread = server.service.thread
    name = 'tw_jax_requests_total{endpoint="/v1/completions",outcome="disconnected"}'
    before = server.metric(name)
    with SlowThread(server, 0.3):
        body = {"prompt": "a", "stream": stream, "n": 3, **LONG}
        with httpx.Client(timeout=60) as client:
            if stream:
                with client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
                    next(response.iter_lines())
                    wait_until(lambda: thread.running == 3)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{server.url}/v1/completions", json=body, timeout=1)
        wait_until(lambda: thread.outstanding == 0)
    wait_until(lambda: thread.running == 0)
    assert server.metric("tw_jax_running") == 0
    wait_until(lambda: server.metric(name) == before + 1)


def test_a_deadline_gives_what_there_is(server):
    body = {"prompt": "a", "timeout_s": 1e-6, **LONG}
    choice = server.post(**body).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["rollout"]["finish_reason"] == "deadline"


def test_settings_are_checked():
    for change in ({"port": 70000}, {"timeout_s": 0}, {"api_keys": ("",)}, {"max_choices": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(ServeConfig(), **change)
    assert ServeConfig(sampling=SAMPLING).model_name == "runs/sft"
