"""The native join in the engine: threads' keys and values kept, equal to the plain controller."""

import dataclasses

import numpy as np
import pytest

from tests.rollout.scenarios import ENGINE
from tests.rollout.sister_scenarios import native_scenarios
from tests.rollout.sister_worlds import native_world
from tw_jax.rollout.engine import RolloutEngine

SCHEDULES = {
    "roomy": dataclasses.replace(ENGINE, page_size=24),
    "late spawn, tiny chunks": dataclasses.replace(
        ENGINE, rows=3, requests=3, prefill_rows=1, prefill_chunk=3, steps_per_dispatch=7
    ),
    "deterministic": dataclasses.replace(ENGINE, deterministic=True),
}


@pytest.fixture(scope="module", params=SCHEDULES, ids=list(SCHEDULES))
def run(request):
    """(oracle rollouts and trajectories, engine rollouts) by name, for one schedule."""
    requests, expected = native_scenarios()
    world = native_world()
    engine = RolloutEngine(world.graphdef, world.schema, SCHEDULES[request.param])
    names = np.random.default_rng(len(request.param)).permutation(list(requests)).tolist()
    rollouts = engine.generate(world.params, [requests[name] for name in names])
    assert engine.state is not None
    assert not np.asarray(engine.state.rows.live).any(), "a row leaked"
    return expected, dict(zip(names, rollouts, strict=True))


def test_tokens_units_and_spans_equal_the_oracle(run):
    expected, rollouts = run
    for name, (oracle, trajectory) in expected.items():
        rollout = rollouts[name]
        assert rollout.trajectory.tokens.tolist() == list(oracle.tokens), name
        assert rollout.finish_reason == oracle.reason, name
        assert rollout.duplicate_outlines == oracle.duplicates, name
        assert rollout.critical_path == oracle.critical_path, name
        assert [b.threads for b in rollout.trajectory.blocks] == [
            b.threads for b in trajectory.blocks
        ], name
        assert [b.join_end for b in rollout.trajectory.blocks] == [
            b.join_end for b in trajectory.blocks
        ], name
        engine_units = [
            (u.kind, u.block, u.thread, u.context_len, u.completion.tolist(), u.finish_reason)
            for u in rollout.units
        ]
        oracle_units = [
            (u.kind, u.block, u.thread, len(u.context), list(u.completion), u.reason)
            for u in oracle.units
        ]
        assert engine_units == oracle_units, name


def test_logprobs_equal_the_oracle(run):
    expected, rollouts = run
    for name, (oracle, _) in expected.items():
        for ours, theirs in zip(rollouts[name].units, oracle.units, strict=True):
            np.testing.assert_allclose(
                ours.logprobs, np.float32(theirs.logprobs), atol=1e-4, rtol=0, err_msg=name
            )
