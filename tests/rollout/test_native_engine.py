"""The native join in the engine: threads' keys and values kept, equal to the plain controller."""

import pytest

from tests.rollout.oracle_runs import (
    SCHEDULES,
    assert_same_logprobs,
    assert_same_rollout,
    played,
)
from tests.rollout.sister_scenarios import native_scenarios
from tests.rollout.sister_worlds import native_world


@pytest.fixture(scope="module", params=SCHEDULES, ids=list(SCHEDULES))
def run(request):
    """(oracle rollouts and trajectories, engine rollouts) by name, for one schedule."""
    requests, expected = native_scenarios()
    world = native_world()
    rollouts = played(world.graphdef, world.params, world.schema, requests, request.param)
    return expected, rollouts


def test_tokens_units_and_spans_equal_the_oracle(run):
    expected, rollouts = run
    for name, (oracle, trajectory) in expected.items():
        assert_same_rollout(name, rollouts[name], oracle)
        ours, theirs = rollouts[name].trajectory.blocks, trajectory.blocks
        assert [(b.threads, b.join_end) for b in ours] == [
            (b.threads, b.join_end) for b in theirs
        ], name


def test_logprobs_equal_the_oracle(run):
    expected, rollouts = run
    for name, (oracle, _) in expected.items():
        assert_same_logprobs(name, rollouts[name], oracle)
