"""Rows, pages, chunks, neighbours and devices change when things happen, not what is written."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.rollout.scenarios import ENGINE, plans, request
from tests.rollout.sessions import run, tokens
from tests.rollout.small_world import make_model, make_schema
from tw_jax.rollout.engine import RolloutEngine

BASE = dataclasses.replace(ENGINE, context_len=96, max_threads=3, max_blocks=2)
SCHEDULES = {
    "small pages, few rows": {"page_size": 16, "rows": 3, "requests": 2, "prefill_chunk": 3},
    "odd pages, long chunks": {"page_size": 37, "rows": 6, "requests": 6, "prefill_chunk": 40},
    "kept prefixes, one prefill row": {
        "page_size": 24,
        "rows": 5,
        "kept_prefixes": 1,
        "prefill_rows": 1,
        "steps_per_dispatch": 3,
    },
}


def mixed_requests():
    """Greedy and sampled, with threads and without, half of them behind one long prompt."""
    out = []
    for i in range(16):
        start = "<bos>" + "abc " * 8 if i % 2 else "<bos>"
        out.append(
            request(
                i,
                ["", plans("1", "2"), plans("1", "2", "3"), ""][i % 4],
                start + "abcdef"[: i % 5],
                mode="sequential" if i % 4 == 3 else "parallel",
                temperature=0.0 if i % 3 == 0 else 1.0,
                top_k=5 if i % 5 == 0 else 0,
                max_response_tokens=50,
                max_thread_tokens=6,
                max_threads=3,
                max_blocks=2,
            )
        )
    return out


@pytest.fixture(scope="module")
def expected():
    """In one page and a single chunk each, two rows: nothing beside a request but its thread."""
    config = dataclasses.replace(BASE, page_size=96, rows=2, requests=2, prefill_chunk=96)
    return run(RolloutEngine(make_model()[0], make_schema(), config), *with_params())


def with_params():
    return make_model()[1], mixed_requests()


def assert_same(rollouts, expected):
    for index, (ours, theirs) in enumerate(zip(rollouts, expected, strict=True)):
        assert tokens(ours) == tokens(theirs), index
        assert ours.finish_reason == theirs.finish_reason
        for a, b in zip(ours.units, theirs.units, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_other_sizes_write_the_same(name, expected):
    engine = RolloutEngine(
        make_model()[0], make_schema(), dataclasses.replace(BASE, **SCHEDULES[name])
    )
    params, requests = with_params()
    assert_same(run(engine, params, requests), expected)
    # Other slots, rows, neighbours and sources of what is shared.
    order = np.random.default_rng(len(name)).permutation(len(requests))
    shuffled = run(engine, params, [requests[i] for i in order])
    assert_same(shuffled, [expected[i] for i in order])


@pytest.mark.slow
def test_two_devices_write_the_same(expected):
    done = subprocess.run(
        [sys.executable, "-m", "tests.rollout.two_devices"],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["spread"] > 5
    assert found["tokens"] == [tokens(rollout) for rollout in expected]
    for ours, rollout in zip(found["logprobs"], expected, strict=True):
        for a, unit in zip(ours, rollout.units, strict=True):
            np.testing.assert_allclose(a, unit.logprobs, atol=1e-5, rtol=0)
