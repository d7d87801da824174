"""Who gets a free row when several requests have threads that wait for one."""

import dataclasses

import pytest

from tests.rollout.scenarios import ENGINE, plans, request
from tests.rollout.small_world import make_model, make_schema
from tw_jax.rollout.engine import RolloutEngine

# Two parents and one row more.
CONFIG = dataclasses.replace(ENGINE, rows=3, requests=2, prefill_rows=2)
BUDGETS = {"max_thread_tokens": 6, "max_response_tokens": 140, "max_blocks": 1}


@pytest.fixture(scope="module")
def engine():
    return RolloutEngine(make_model()[0], make_schema(), CONFIG)


def first_starts(engine, *lists):
    """Step at which each request's thread 2 began, in order of submission."""
    asked = [request(seed, plans(*numbers), **BUDGETS) for seed, numbers in enumerate(lists)]
    starts = []
    for rollout in engine.generate(make_model()[1], asked):
        (second,) = (u for u in rollout.units if u.block == 0 and u.thread == 2)
        starts.append(second.start_step)
    return starts


def test_the_request_nearest_its_join_comes_first(engine):
    older, younger = first_starts(engine, ("1", "2", "3"), ("1", "2"))
    assert younger < older


def test_of_equally_near_ones_the_oldest_comes_first(engine):
    older, younger = first_starts(engine, ("1", "2"), ("1", "2"))
    assert older < younger
