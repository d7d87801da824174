"""Thousands of small random requests: each ends once, alone or not, and no page is lost."""

import collections
import dataclasses

import numpy as np
import pytest

from tests.rollout.scenarios import ENGINE
from tests.rollout.sister_worlds import native_world
from tests.rollout.small_world import make_model, make_schema
from tests.rollout.workloads import (
    check_against_alone,
    native,
    random_workload,
    run_workload,
    threadweaver,
)
from tw_jax.rollout.engine import RolloutEngine

SMALL = dataclasses.replace(
    ENGINE, context_len=48, rows=3, requests=3, max_threads=2, max_blocks=2, max_logit_bias=0
)
CONFIGS = {
    "pages of 8, kept prefix": dataclasses.replace(SMALL, page_size=8, kept_prefixes=1),
    "pages of 16, more rows": dataclasses.replace(SMALL, page_size=16, rows=5, kept_prefixes=2),
    "one page, two rows": dataclasses.replace(
        SMALL, page_size=48, rows=2, requests=2, prefill_rows=1, prefill_chunk=5
    ),
    "deterministic": dataclasses.replace(SMALL, page_size=16, deterministic=True),
    "native": dataclasses.replace(SMALL, page_size=8, rows=4, kept_prefixes=1),
    "native, deterministic": dataclasses.replace(SMALL, page_size=16, deterministic=True),
}


@pytest.fixture(scope="module", params=CONFIGS, ids=list(CONFIGS))
def world(request):
    """(engine, params, language of requests)."""
    config = CONFIGS[request.param]
    if request.param.startswith("native"):
        own = native_world()
        return RolloutEngine(own.graphdef, own.schema, config), own.params, native()
    graphdef, params = make_model()
    return RolloutEngine(graphdef, make_schema(), config), params, threadweaver()


def fuzz(
    world, monkeypatch, workloads: int, requests: tuple[int, ...], compared: float, seed: int
) -> None:
    """Random workloads of so many requests in turn, on one engine whose state goes on."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    engine, params, language = world
    reasons = collections.Counter()
    for number in range(workloads):
        rng = np.random.default_rng([seed, number])
        count = requests[number % len(requests)]
        work = random_workload(rng, count, engine.config.context_len, language)
        try:
            found = run_workload(engine, params, work, clock)
            for ticket, rollout in found.items():
                reasons[rollout.finish_reason] += 1
                if rng.random() < compared:
                    check_against_alone(engine, params, work.requests[ticket], rollout)
        except Exception as error:
            error.add_note(f"workload {number} of seed {seed}: {work}")
            raise
    assert set(reasons) == {"eos", "length", "context", "cancelled", "deadline"}


def test_random_workloads(world, monkeypatch):
    fuzz(world, monkeypatch, workloads=5, requests=(16,), compared=0.3, seed=0)


@pytest.mark.slow
def test_many_random_workloads(world, monkeypatch):
    """10,000 workloads over all languages and sizes of the engine."""
    workloads = -(-10_000 // len(CONFIGS))
    fuzz(world, monkeypatch, workloads, requests=(1, 2, 3, 1, 8), compared=0.05, seed=1)
