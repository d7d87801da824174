"""Sampling that is killed goes on where it stopped, and nothing is lost or sampled twice."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from tests.rollout.completions_server import CompletionsServer, SmallWorldCodec, as_generic, as_vllm
from tests.rollout.scenarios import ENGINE, plans, request, small_requests
from tests.rollout.small_world import make_model, make_schema
from tw_jax.errors import UserError
from tw_jax.rollout.client import ClientConfig, RolloutClient
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.rollout_bytes import rollouts_from_bytes, rollouts_to_bytes
from tw_jax.rollout.rollout_file import (
    RolloutFile,
    generate_resumably,
    request_keys,
    rollout_from_json,
    rollout_to_json,
)

REQUESTS = [request(6, plans("1", "1", "2", "1")), *small_requests(5), request(22, plans("1", "2"))]


@pytest.fixture(scope="module")
def rollouts():
    engine = RolloutEngine(make_model()[0], make_schema(), ENGINE)
    return engine.generate(make_model()[1], REQUESTS)


def plain(rollout):
    return json.dumps(rollout_to_json(rollout))


def recorded(rollouts, calls, fail_after=None):
    """Hands out known rollouts; `calls` notes which were asked for."""
    by_seed = {r.seed: rollout for r, rollout in zip(REQUESTS, rollouts, strict=True)}

    def generate(requests, on_finish):
        for position, asked in enumerate(requests):
            if fail_after is not None and position == fail_after:
                raise KeyboardInterrupt
            calls.append(asked.seed)
            on_finish(position, by_seed[asked.seed])

    return generate


def test_bytes_lose_nothing(rollouts):
    unknown = dataclasses.replace(
        rollouts[0].units[0], logprobs=np.full_like(rollouts[0].units[0].logprobs, np.nan)
    )
    some = [*rollouts, dataclasses.replace(rollouts[0], units=(unknown, *rollouts[0].units[1:]))]
    again = rollouts_from_bytes(rollouts_to_bytes(some))
    assert list(map(plain, again)) == list(map(plain, some))
    assert rollouts_from_bytes(rollouts_to_bytes([])) == []


def test_json_loses_nothing(rollouts):
    for rollout in rollouts:
        again = rollout_from_json(json.loads(plain(rollout)))
        assert plain(again) == plain(rollout)
        assert again.trajectory.blocks == rollout.trajectory.blocks
        assert again.units[0].completion.dtype == np.int32
        for one, two in zip(again.units, rollout.units, strict=True):
            assert one.logprobs.dtype == np.float32
            np.testing.assert_array_equal(one.logprobs, two.logprobs)


def test_only_what_is_missing_is_sampled(rollouts, tmp_path):
    path, calls = tmp_path / "deep" / "rollouts.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        generate_resumably(path, REQUESTS, recorded(rollouts, calls, 3), source="m")
    assert len(calls) == 3 == len(path.read_bytes().splitlines())
    seen = []
    got = generate_resumably(
        path, REQUESTS, recorded(rollouts, calls), source="m", on_finish=lambda i, _: seen.append(i)
    )
    assert calls == [r.seed for r in REQUESTS]
    assert sorted(seen) == list(range(len(REQUESTS)))
    assert list(map(plain, got)) == list(map(plain, rollouts))
    generate_resumably(path, REQUESTS, recorded(rollouts, calls), source="m")
    assert len(calls) == len(REQUESTS)


@pytest.mark.parametrize("left", [1, 10, -1])
def test_a_torn_last_line_is_dropped_and_sampled_again(rollouts, tmp_path, left):
    path, calls = tmp_path / "rollouts.jsonl", []
    generate_resumably(path, REQUESTS, recorded(rollouts, calls), source="m")
    *whole, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:left])  # -1: only the line's end is missing
    calls.clear()
    got = generate_resumably(path, REQUESTS, recorded(rollouts, calls), source="m")
    assert calls == [REQUESTS[-1].seed]
    assert list(map(plain, got)) == list(map(plain, rollouts))
    assert path.read_bytes().splitlines(keepends=True) == [*whole, last]


def test_keys_depend_on_all_that_matters():
    one = request(1)
    others = [
        request(2),
        request(1, "a"),
        request(1, prompt="<bos>a"),
        request(1, mode="sequential"),
        request(1, temperature=0.5),
    ]
    keys = request_keys([one, *others], "m") + request_keys([one], "n")
    assert len(set(keys)) == len(keys)
    assert request_keys([one], "m") == request_keys([dataclasses.replace(one, timeout_s=3.0)], "m")
    twice = request_keys([one, one], "m")
    assert twice[0] != twice[1] and twice == request_keys([one, one], "m")


def test_rollouts_ended_from_outside_are_not_kept(rollouts, tmp_path):
    late = dataclasses.replace(rollouts[0], finish_reason="deadline")
    path = tmp_path / "rollouts.jsonl"

    def generate(requests, on_finish):
        on_finish(0, late)

    (got,) = generate_resumably(path, REQUESTS[:1], generate, source="m")
    assert got is late and path.read_bytes() == b""


def test_bad_lines_and_files_are_named(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    for line in ("{}", "no json", '{"key": "a", "rollout": {"units": 3}}'):
        path.write_text(f"{line}\n")
        with pytest.raises(UserError, match=r"rollouts.jsonl:1: not a rollout .*delete the line"):
            RolloutFile(path)
    with pytest.raises(UserError, match="cannot be opened"):
        RolloutFile(tmp_path)


def test_a_killed_client_goes_on(tmp_path, monkeypatch):
    """A process is killed between its answers; another finishes with what is left."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path, requests = tmp_path / "rollouts.jsonl", small_requests(8)
    program = textwrap.dedent(
        """
        import sys
        from tests.rollout.completions_server import SmallWorldCodec
        from tests.rollout.scenarios import small_requests
        from tests.rollout.small_world import make_schema
        from tw_jax.rollout.client import ClientConfig, RolloutClient
        from tw_jax.rollout.rollout_file import generate_resumably

        config = ClientConfig(sys.argv[1], dialect="vllm", concurrency=1)
        client = RolloutClient(config, make_schema(), SmallWorldCodec())
        generate_resumably(
            sys.argv[2],
            small_requests(8),
            lambda requests, on_finish: client.generate(requests, on_finish=on_finish),
            source="small",
        )
        """
    )
    with CompletionsServer(as_vllm, tuple(requests), pause_s=0.05) as server:
        words = [sys.executable, "-c", program, server.url, str(path)]
        child = subprocess.Popen(words)
        deadline_s = time.monotonic() + 60
        while not path.exists() or path.read_bytes().count(b"\n") < 3:
            assert child.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        had = path.read_bytes().count(b"\n")
        assert 3 <= had < 8
        answered = len(server.bodies)
        assert subprocess.run(words).returncode == 0
        assert len(server.bodies) > answered
        with RolloutFile(path) as file:
            held = [file.done[key] for key in request_keys(requests, "small")]
        client = RolloutClient(
            ClientConfig(server.url, dialect="vllm"), make_schema(), SmallWorldCodec()
        )
        assert list(map(plain, held)) == list(map(plain, client.generate(requests)))


def test_unknown_logprobs_survive(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with CompletionsServer(as_generic, (request(1),)) as server:
        client = RolloutClient(ClientConfig(server.url), make_schema(), SmallWorldCodec())
        (rollout,) = client.generate([request(1)])
    again = rollout_from_json(json.loads(plain(rollout)))
    assert np.isnan(again.units[0].logprobs).all() and len(again.units[0].logprobs)
