"""Row controllers prune threads, stop rollouts and swap tokens inside the loop."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.rollout.scenarios import LOOP, plans, request, small_requests
from tests.rollout.small_world import ID, make_model, make_schema
from tw_jax.rollout.controller import RowActions
from tw_jax.rollout.engine import RolloutEngine

ASKED = [request(5, plans("1", "2", "3")), *small_requests(8)]


def run(controller, requests=None):
    engine = RolloutEngine(make_model()[0], make_schema(), LOOP, controller=controller)
    rollouts = engine.generate(make_model()[1], ASKED if requests is None else requests)
    assert engine.state is not None and not np.asarray(engine.state.rows.live).any()
    return rollouts


@pytest.fixture(scope="module")
def plain():
    return run(None)


def tokens(rollouts):
    return [rollout.trajectory.tokens.tolist() for rollout in rollouts]


def test_a_controller_that_does_nothing_changes_nothing(plain):
    found = run(lambda view: RowActions(view.token, jnp.zeros_like(view.sampled)))
    assert tokens(found) == tokens(plain)
    for a, b in zip(found, plain, strict=True):
        for x, y in zip(a.units, b.units, strict=True):
            np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-6)


def test_pruned_threads_are_closed_and_join(plain):
    """Second threads are stopped behind two tokens; the others go their way."""
    found = run(lambda view: RowActions(view.token, (view.thread == 2) & (view.count >= 2)))
    pruned = 0
    first = [u for u in plain[0].units if u.block == 0 and u.kind == "thread"]
    mine = [u for u in found[0].units if u.block == 0 and u.kind == "thread"]
    assert mine[0].completion.tolist() == first[0].completion.tolist()
    for rollout in found:
        for unit in rollout.units:
            if unit.thread == 2:
                assert len(unit.completion) <= 2
                pruned += unit.finish_reason == "controller"
            else:
                assert unit.finish_reason != "controller"
        for block in rollout.trajectory.blocks:
            for span in block.threads:
                assert rollout.trajectory.tokens[span.end - 1] == ID["</Thread>"]
    assert pruned > 3


def test_a_stopped_segment_ends_its_rollout():
    asked = [dataclasses.replace(r, mode="sequential", forced_prefix=()) for r in ASKED]
    found = run(lambda view: RowActions(view.token, view.count >= 5), asked)
    assert {len(r.response) for r in found} <= {1, 2, 3, 4, 5}
    stopped = [r for r in found if r.finish_reason == "controller"]
    assert len(stopped) > 3 and all(len(r.response) == 5 for r in stopped)
    assert all(r.finish_reason == "eos" for r in found if r.finish_reason != "controller")


def test_swapped_tokens_are_written_with_their_own_logprobs(plain):
    """Every "a" becomes a "b": what is written, what the model goes on from, what is recorded."""

    def swap(view):
        other = jnp.where(view.token == ID["a"], ID["b"], view.token)
        return RowActions(other, jnp.zeros_like(view.sampled))

    found = run(swap)
    assert tokens(found) != tokens(plain)
    engine = RolloutEngine(make_model()[0], make_schema(), dataclasses.replace(LOOP, scripts=True))
    scripted = [
        dataclasses.replace(asked, script=rollout.trajectory)
        for asked, rollout in zip(ASKED, found, strict=True)
    ]
    replayed = engine.generate(make_model()[1], scripted)
    for a, b in zip(found, replayed, strict=True):
        assert a.trajectory.tokens.tolist() == b.trajectory.tokens.tolist()
        for x, y in zip(a.units, b.units, strict=True):
            assert ID["a"] not in x.completion
            np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-5)
