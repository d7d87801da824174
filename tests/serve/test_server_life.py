"""Keys, rates, engines that fail, and a server that is told to stop."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading

import httpx
import openai
import pytest

from tests.rollout.small_world import make_model
from tests.serve.small_server import CONFIG, SlowThread, error_of, make_engine, serving, wait_until
from tw_jax.errors import UserError
from tw_jax.serve.command import run_serve
from tw_jax.serve.config import ServeConfig
from tw_jax.serve.engine_thread import warm_up
from tw_jax.serve.gate import RateLimit


def test_keys_and_rates():
    keys = ("secret", "other")
    with serving(api_keys=keys, requests_per_minute=3) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            response = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
            for _ in range(3):
                client.models.list()
            with pytest.raises(openai.RateLimitError) as caught:
                client.models.list()
        assert int(caught.value.response.headers["Retry-After"]) in range(1, 21)
        headers = {"Authorization": "Bearer other"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_bucket_refills():
    now = [0.0]
    limit = RateLimit(2, clock=lambda: now[0])
    assert [limit.take("a") for _ in range(3)] == [0, 0, 30]
    assert limit.take("b") == 0
    now[0] = 30.0
    assert [limit.take("a") for _ in range(2)] == [0, 30]
    now[0] = 1e6
    assert [limit.take("a") for _ in range(3)] == [0, 0, 30]


class FailingEngine:
    """An engine whose device fails a number of times."""

    def __init__(self, engine, failures):
        self._engine, self.failures = engine, failures
        self._advance = engine.advance

    def __enter__(self):
        self._engine.advance = self.advance
        return self

    def __exit__(self, *_):
        self._engine.advance = self._advance

    def advance(self, *arguments):
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the device is gone")
        return self._advance(*arguments)


def test_a_failure_of_the_engine_is_answered_and_survived():
    with serving() as server, FailingEngine(make_engine(), 0) as engine:
        engine.failures = 2
        for _ in range(2):
            error = error_of(server.post(prompt="a"), 500)
            assert error["type"] == "server_error" and "device" not in error["message"]
        assert server.post(prompt="a").status_code == 200
        assert server.metric("tw_jax_engine_failures_total") == 2
        engine.failures = 1
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={"prompt": "a", "stream": True}
        ) as response:
            lines = [line for line in response.iter_lines() if line]
        assert response.status_code == 200 and "internal_error" in lines[-2]
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_an_engine_that_keeps_failing_ends_the_server():
    with serving() as server, FailingEngine(make_engine(), 3):
        for _ in range(3):
            error_of(server.post(prompt="a"), 500)
        wait_until(lambda: server.server.should_exit)
        assert server.service.thread.has_failed


def test_a_stop_lets_running_requests_finish():
    with serving() as server:
        answers = []

        def ask():
            answers.append(server.post(prompt="a", n=5, max_tokens=130, logit_bias={"1": -100}))

        asking = threading.Thread(target=ask)
        with SlowThread(server, 0.1):
            asking.start()
            wait_until(lambda: server.service.thread.outstanding)
            server.server.stop()
            wait_until(lambda: server.service.is_draining)
            error = error_of(server.post(prompt="a"), 503)
            assert error["code"] == "draining"
            assert httpx.get(f"{server.url}/health").status_code == 503
        asking.join()
    (answer,) = answers
    assert len(answer.json()["choices"]) == 5
    reasons = {choice["rollout"]["finish_reason"] for choice in answer.json()["choices"]}
    assert reasons <= {"length", "context", "eos"}


def test_a_stop_waits_no_longer_than_it_was_told():
    with serving(drain_timeout_s=0.0) as server, SlowThread(server, 0.1):
        answers = []

        def ask():
            answers.append(server.post(prompt="a", max_tokens=130, logit_bias={"1": -100}))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: server.service.thread.running)
        server.server.stop()
        asking.join(20)
    assert answers[0].json()["choices"][0]["rollout"]["finish_reason"] == "cancelled"


def test_sigterm_drains_and_exits_0(tmp_path):
    """The real command with random weights, and a request that runs when the signal comes."""
    words = [sys.executable, "-m", "tw_jax.cli", "serve", "model=tiny", "port=0"]
    words += [
        "engine.rows=2",
        "engine.requests=1",
        "engine.context_len=128",
        "engine.prefill_rows=1",
    ]
    words += ["engine.steps_per_dispatch=1", "api_keys=[one]"]
    environ = {**os.environ, "TW_JAX_API_KEYS": "two, three"}
    child = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    )
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line.startswith("tw-jax serves tiny at http://127.0.0.1:"), child.communicate()
        url = line.split()[-1]
        with openai.OpenAI(base_url=url, api_key="three", max_retries=0) as client:
            (model,) = client.models.list()
            extra = {"return_token_ids": True, "logit_bias": {"1": -100}}
            chunks = client.chat.completions.create(
                model=model.id,
                messages=[{"role": "user", "content": "<Parallel>"}],
                stream=True,
                max_tokens=100,
                extra_body=extra,
            )
            opened = next(iter(chunks)).choices[0]
            assert len(opened.prompt_token_ids) == len("<Parallel>") + 1  # characters behind <bos>
            child.send_signal(signal.SIGTERM)
            rest = list(chunks)
        assert rest[-1].choices[0].finish_reason == "length"
        assert rest[-1].choices[0].rollout["total_tokens"] == 100
        out, err = child.communicate(timeout=30)
        assert (child.returncode, out) == (0, "")
        assert "Traceback" not in err  # a compiler may have complained about the time it took
    finally:
        child.kill()
        child.communicate()


def test_an_address_that_is_taken_is_no_traceback():
    with serving() as server, pytest.raises(UserError) as caught:
        run_serve(ServeConfig(port=int(server.url.rpartition(":")[2])))
    assert "cannot listen on host=127.0.0.1 port=" in str(caught.value)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "tw_jax.serve.app")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(UserError, match=r"'fastapi' is not installed.*tw-jax\[serve\]"):
        run_serve(ServeConfig())


def test_defaults_that_the_engine_cannot_serve_are_refused_at_the_start():
    sampling = dataclasses.replace(CONFIG.sampling, max_threads=8)
    with pytest.raises(UserError, match=r"server's defaults: sampling.max_threads=8"):
        warm_up(make_engine(), make_model()[1], [0], sampling)
