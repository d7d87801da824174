"""Rollouts from a completions server equal those of the engine and of the oracle."""

import dataclasses
import math
import re

import numpy as np
import pytest

from tests.rollout.completions_server import (
    CompletionsServer,
    SmallWorldCodec,
    as_endless,
    as_generic,
    as_old_vllm,
    as_sglang,
    as_sglang_trimmed,
    as_tw_jax,
    as_vllm,
)
from tests.rollout.scenarios import ENGINE, plans, request, scenarios
from tests.rollout.small_world import ID, make_model, make_schema, text_of
from tw_jax.errors import UserError
from tw_jax.rollout.client import ClientConfig, RolloutClient
from tw_jax.rollout.engine import RolloutEngine


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def client_of(server, dialect="vllm", **fields):
    config = ClientConfig(server.url, dialect=dialect, **fields)
    return RolloutClient(config, make_schema(), SmallWorldCodec())


def units_of(rollout):
    return [
        (u.kind, u.block, u.thread, u.context_len, u.completion.tolist(), u.finish_reason)
        for u in rollout.units
    ]


SERVERS = {
    "vllm": (as_vllm, "vllm"),
    "old vllm": (as_old_vllm, "vllm"),
    "sglang": (as_sglang, "sglang"),
    "sglang, trimmed": (as_sglang_trimmed, "sglang"),
    "tw_jax": (as_tw_jax, "tw_jax"),
    "ignores stops": (as_endless, "vllm"),
}


def serves(dialect, sampling):
    """Whether a kind of server can penalise what is asked."""
    known = {"vllm": ("context",), "sglang": ("unit",), "tw_jax": ("context", "unit")}
    return sampling.repetition_penalty == 1 or sampling.repetition_scope in known[dialect]


@pytest.mark.parametrize("name", SERVERS)
def test_every_scenario_equals_the_oracle(name):
    answer, dialect = SERVERS[name]
    requests, expected = scenarios()
    requests = {n: r for n, r in requests.items() if serves(dialect, r.sampling)}
    with CompletionsServer(answer, tuple(requests.values())) as server:
        rollouts = client_of(server, dialect).generate(list(requests.values()))
    for name, rollout in zip(requests, rollouts, strict=True):
        oracle = expected[name]
        assert text_of(rollout.trajectory.tokens) == text_of(oracle.tokens), name
        assert rollout.finish_reason == oracle.reason, name
        assert rollout.duplicate_outlines == oracle.duplicates, name
        assert rollout.critical_path == oracle.critical_path, name
        assert units_of(rollout) == [
            (u.kind, u.block, u.thread, len(u.context), u.completion, u.reason)
            for u in oracle.units
        ], name
        for ours, theirs in zip(rollout.units, oracle.units, strict=True):
            known = ~np.isnan(ours.logprobs)
            assert known.all() or answer is as_sglang_trimmed
            assert len(ours.logprobs) - known.sum() <= 1 + ours.completion.tolist().count(
                ID["</Outlines>"]
            )
            wanted = np.float32(theirs.logprobs)[known]
            np.testing.assert_allclose(ours.logprobs[known], wanted, atol=1e-6, rtol=0)
        assert len(make_schema().units(rollout.trajectory)) == len(rollout.units)


def test_greedy_equals_the_engine_whole_rollout():
    """Parents, spans and log-probabilities too, on greedy variants of every scenario."""
    requests = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, temperature=0.0))
        for r in scenarios()[0].values()
    ]
    engine = RolloutEngine(make_model()[0], make_schema(), ENGINE)
    expected = engine.generate(make_model()[1], requests)
    with CompletionsServer(as_tw_jax, tuple(requests)) as server:
        rollouts = client_of(server, "tw_jax").generate(requests)
    for ours, theirs in zip(rollouts, expected, strict=True):
        assert ours.trajectory.tokens.tolist() == theirs.trajectory.tokens.tolist()
        assert ours.trajectory.blocks == theirs.trajectory.blocks
        assert ours.trajectory.sampled_start == theirs.trajectory.sampled_start
        assert units_of(ours) == units_of(theirs)
        for a, b in zip(ours.units, theirs.units, strict=True):
            assert (a.parent, a.start) == (b.parent, b.start)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4, rtol=0)
        assert ours.finish_reason == theirs.finish_reason


def test_a_server_that_speaks_text_alone():
    """It cannot tell an end of text from a stop: in threads and lists it counts as a stop."""
    requests, expected = scenarios()
    asked = {
        name: r
        for name, r in requests.items()
        if not (r.sampling.top_k or r.sampling.min_p) and r.sampling.repetition_penalty == 1
    }
    with CompletionsServer(as_generic, tuple(asked.values())) as server:
        rollouts = client_of(server, "generic").generate(list(asked.values()))
        assert all("stop_token_ids" not in body for body in server.bodies)
    same = 0
    for name, rollout in zip(asked, rollouts, strict=True):
        oracle = expected[name]
        assert all(np.isnan(unit.logprobs).all() for unit in rollout.units)
        ends = {u.reason for u in oracle.units if u.kind == "thread"}
        written = [text_of(u.completion) for u in oracle.units if u.kind == "segment"]
        written = [text_of(asked[name].forced_prefix), *written]
        rest = re.sub("<Outlines>.*?</Outlines>", "", "\0".join(written), flags=re.DOTALL)
        if "eos" not in ends and "Outlines>" not in rest:
            assert text_of(rollout.trajectory.tokens) == text_of(oracle.tokens), name
            same += 1
    assert same > 8


@pytest.mark.parametrize(
    ("dialect", "sampling", "message"),
    [
        ("generic", {"top_k": 3}, "sampling.top_k=3: OpenAI's own"),
        ("generic", {"min_p": 0.1}, "sampling.min_p=0.1.* set it to 0.0, or server.dialect"),
        ("generic", {"repetition_penalty": 1.1}, "sampling.repetition_penalty=1.1"),
        ("sglang", {"repetition_penalty": 1.1}, "repetition_scope='context': .* 'unit' only"),
        (
            "vllm",
            {"repetition_penalty": 1.1, "repetition_scope": "unit"},
            "repetition_scope='unit': .* 'context' only",
        ),
        ("vllm", {"temperature": -1.0}, "request 0: sampling.temperature"),
    ],
)
def test_what_a_server_cannot_do_is_refused_before_it_is_asked(dialect, sampling, message):
    with CompletionsServer(as_vllm) as server:
        with pytest.raises(UserError, match=message):
            client_of(server, dialect).generate([request(0, **sampling)])
        assert not server.bodies


def test_ways_of_drawing_are_passed_on():
    sampling = {
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "logit_bias": ((ID["a"], 2.0), (ID["b"], -math.inf)),
    }
    asked = request(9, max_response_tokens=5, **sampling)
    for dialect, scope in (("vllm", None), ("tw_jax", "context")):
        answer = as_tw_jax if dialect == "tw_jax" else as_vllm
        with CompletionsServer(answer, (asked,)) as server:
            client_of(server, dialect).generate([asked])
        body = server.bodies[0]
        assert (body["min_p"], body["repetition_penalty"]) == (0.1, 1.2)
        assert body["logit_bias"] == {str(ID["a"]): 2.0, str(ID["b"]): -100.0}
        assert body.get("repetition_scope") == scope


def test_timeline_counts_dependent_tokens():
    requests = [request(5, plans("1", "2", "3"))]
    with CompletionsServer(as_vllm, tuple(requests)) as server:
        (rollout,) = client_of(server).generate(requests)
    clock = 0
    for unit in rollout.units:
        if unit.kind == "thread":
            assert unit.row == unit.thread - 1
            assert unit.end_step - unit.start_step == len(unit.completion) - 1
        assert unit.start_step <= unit.end_step
        clock = max(clock, unit.end_step)
    assert clock < rollout.critical_path


def test_what_is_sent():
    requests = [request(7, plans("1", "2"), temperature=0.7, top_k=4, top_p=0.9)]
    with CompletionsServer(as_vllm, tuple(requests)) as server:
        client = RolloutClient(
            ClientConfig(server.url, dialect="vllm"),
            make_schema(),
            SmallWorldCodec(),
            api_key="secret",
        )
        client.generate(requests)
        client.generate(requests)
    first, again = (
        server.bodies[: len(server.bodies) // 2],
        server.bodies[len(server.bodies) // 2 :],
    )
    assert sorted(map(str, first)) == sorted(map(str, again)), "seeds depend on the unit alone"
    thread = first[0]
    assert thread["model"] == "small" and thread["seed"] < 2**31
    assert thread["stop_token_ids"] == [ID["</Thread>"]]
    assert thread["skip_special_tokens"] is False and thread["return_token_ids"] is True
    assert (thread["temperature"], thread["top_k"], thread["top_p"]) == (0.7, 4, 0.9)
    assert thread["max_tokens"] == 12
    assert len({body["seed"] for body in first}) == len(first)
    assert set(server.keys) == {"Bearer secret"}
    assert client.calls == 2 * (len(first) + 1) and client.repeated == 0


def test_the_number_of_calls_in_flight_is_bounded():
    requests = [request(i, plans("1", "2", "3", "0")) for i in range(8)]
    with CompletionsServer(as_vllm, tuple(requests), pause_s=0.01) as server:
        client_of(server, concurrency=3).generate(requests)
        assert server.most_at_once == 3
        client_of(server, concurrency=1).generate(requests[:2])


def test_finished_rollouts_are_handed_over_at_once():
    seen = []
    requests = [request(i) for i in range(5)]
    with CompletionsServer(as_vllm, tuple(requests)) as server:
        rollouts = client_of(server).generate(requests, on_finish=lambda *pair: seen.append(pair))
    assert {i for i, _ in seen} == set(range(5))
    assert all(rollouts[i] is rollout for i, rollout in seen)
