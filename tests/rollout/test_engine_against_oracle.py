"""The engine agrees with the plain host-driven controller, token for token, in any schedule."""

import numpy as np
import pytest

from tests.rollout.oracle_runs import (
    SCHEDULES,
    assert_same_logprobs,
    assert_same_rollout,
    played,
)
from tests.rollout.scenarios import scenarios
from tests.rollout.small_world import make_model, make_schema, text_of


@pytest.fixture(scope="module", params=SCHEDULES, ids=list(SCHEDULES))
def run(request):
    """(requests, oracle rollouts, engine rollouts) by name, for one schedule."""
    requests, expected = scenarios()
    rollouts = played(*make_model(), make_schema(), requests, request.param)
    return requests, expected, rollouts


def test_tokens_and_units_equal_the_oracle(run):
    _, expected, rollouts = run
    for name, oracle in expected.items():
        assert text_of(rollouts[name].trajectory.tokens) == text_of(oracle.tokens), name
        assert_same_rollout(name, rollouts[name], oracle)


def test_logprobs_equal_the_oracle(run):
    _, expected, rollouts = run
    for name, oracle in expected.items():
        assert_same_logprobs(name, rollouts[name], oracle)


def test_units_partition_the_sampled_tokens(run):
    requests, _, rollouts = run
    for name, rollout in rollouts.items():
        trajectory = rollout.trajectory
        owner = np.zeros(len(trajectory.tokens), int)
        forced = np.zeros(len(trajectory.tokens), bool)
        forced[: trajectory.response_start] = True
        replaced = [thread.replaced for block in trajectory.blocks for thread in block.threads]
        for block in trajectory.blocks:
            forced[block.outlines_end : block.join_end] = True
            for thread in block.threads:
                forced[thread.body : thread.sampled_end] = False
        for unit in rollout.units:
            end = unit.start + len(unit.completion)
            if unit.kind == "thread":
                span = trajectory.blocks[unit.block].threads[unit.thread - 1]
                end = span.sampled_end
                kept = unit.completion.tolist()[: end - unit.start]
                assert unit.completion.tolist()[len(kept) :] == list(span.replaced), name
            owner[unit.start : end] += 1
        assert (owner == ~forced).all(), name
        sampled = sum(len(unit.completion) for unit in rollout.units)
        assert sampled == (~forced).sum() + sum(map(len, replaced)), name
        assert len(rollout.response) == rollout.total_tokens, name
        assert rollout.total_tokens <= requests[name].sampling.max_response_tokens, name


def test_the_trajectory_gives_the_same_units_as_the_schema(run):
    _, expected, rollouts = run
    schema = make_schema()
    for name, rollout in rollouts.items():
        units = schema.units(rollout.trajectory)
        for ours, theirs, oracle in zip(rollout.units, units, expected[name].units, strict=True):
            assert (ours.kind, ours.block, ours.thread) == (
                theirs.kind,
                theirs.block,
                theirs.thread,
            )
            assert ours.completion.tolist() == theirs.completion.tolist(), name
            assert theirs.context.tolist() == oracle.context, name
        assert rollout.critical_path == schema.critical_path(rollout.trajectory)


def test_the_scenarios_reach_every_branch():
    _, expected = scenarios()
    rollouts = expected.values()
    blocks = {len({u.block for u in r.units if u.kind == "thread"}) for r in rollouts}
    threads = {max(u.thread for u in r.units) for r in rollouts if r.units}
    ends = {u.reason for r in rollouts for u in r.units if u.kind == "thread"}
    assert blocks >= {0, 1, 2}
    assert threads >= {0, 1, 2, 3, 4}
    assert ends >= {"thread_stop", "eos", "length", "context"}
    assert {r.reason for r in rollouts} == {"eos", "length", "context"}
    assert expected["duplicates"].duplicates == 2
    assert not expected["no room to spawn"].units
    in_block = [r for r in rollouts if r.units and r.units[-1].kind == "thread"]
    assert len(in_block) >= 3, "rollouts that end inside a block"
