"""The message join in the engine: threads in their own contexts, equal to the plain controller."""

import dataclasses

import numpy as np
import pytest

from tests.rollout.oracle_runs import (
    SCHEDULES,
    assert_same_logprobs,
    assert_same_rollout,
    played,
)
from tests.rollout.page_checker import check_idle_pages
from tests.rollout.scenarios import ENGINE
from tests.rollout.sister_scenarios import apr_messages, apr_scenarios, request
from tests.rollout.sister_worlds import apr_world
from tw_jax.errors import UserError
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.live_text import finished_text


@pytest.fixture(scope="module", params=SCHEDULES, ids=list(SCHEDULES))
def run(request):
    """(oracle rollouts and trajectories, engine rollouts) by name, for one schedule."""
    requests, expected = apr_scenarios()
    world = apr_world()
    rollouts = played(world.graphdef, world.params, world.schema, requests, request.param)
    return expected, rollouts


def test_tokens_units_and_spans_equal_the_oracle(run):
    expected, rollouts = run
    opening = apr_world().schema.fork_join.plans_open
    for name, (oracle, trajectory) in expected.items():
        rollout = rollouts[name]
        assert_same_rollout(name, rollout, oracle)
        for ours, theirs in zip(rollout.trajectory.blocks, trajectory.blocks, strict=True):
            assert rollout.trajectory.tokens[ours.start] == opening, name
            # The controller's blocks begin at their first message.
            assert dataclasses.replace(ours, start=theirs.start) == theirs, name


def test_logprobs_equal_the_oracle(run):
    expected, rollouts = run
    for name, (oracle, _) in expected.items():
        assert_same_logprobs(name, rollouts[name], oracle)


def test_units_lie_where_they_say_and_descend_from_segments(run):
    for name, rollout in run[1].items():
        for index, unit in enumerate(rollout.units):
            kept = len(unit.completion)
            if unit.kind == "thread":
                span = rollout.trajectory.blocks[unit.block].threads[unit.thread - 1]
                kept -= len(span.replaced)
            text = rollout.trajectory.tokens[unit.start : unit.start + kept]
            assert text.tolist() == unit.completion[:kept].tolist(), name
            assert (unit.parent < 0) == (index == 0)
            assert unit.parent < 0 or rollout.units[unit.parent].kind == "segment"
            assert 0 <= unit.start_step <= unit.end_step


@pytest.fixture(scope="module")
def few_steps():
    world = apr_world()
    return RolloutEngine(
        world.graphdef, world.schema, dataclasses.replace(ENGINE, steps_per_dispatch=3)
    )


def test_live_text_grows_into_the_rollout(few_steps):
    """Threads stand in it once they have joined; before that they are shown beside it."""
    requests, _ = apr_scenarios()
    names = ["four threads", "long prompt", "three threads 60", "three threads 61", "random 3"]
    seen, texts, running = {}, {}, 0
    with few_steps.session(apr_world().params) as session:
        for name in names:
            session.submit(requests[name])
        while session.busy:
            for ticket, text in session.live().items():
                texts.setdefault(ticket, []).append(text)
            seen |= dict(session.poll())
    for ticket, rollout in seen.items():
        written = {(u.block, u.thread): u for u in rollout.units if u.kind == "thread"}
        whole = finished_text(rollout)
        for text in texts[ticket]:
            n = len(text.tokens)
            assert text.tokens.tolist() == rollout.trajectory.tokens[:n].tolist()
            for unit in rollout.units:
                part = text.logprobs[unit.start : unit.start + len(unit.logprobs)]
                np.testing.assert_array_equal(part, unit.logprobs[: len(part)])
            for ours, theirs in zip(text.closed, whole.closed, strict=False):
                assert [t.tokens.tolist() for t in ours] == [t.tokens.tolist() for t in theirs]
            for thread in text.threads:
                if (unit := written.get((text.block, thread.ordinal))) is None:
                    continue  # the rollout ended before its join
                running += 1
                sampled = thread.tokens[thread.header_len :].tolist()
                assert sampled == unit.completion[: len(sampled)].tolist()
                assert len(sampled) == len(unit.completion) or not thread.ended
    assert running > 10


def test_a_cancelled_rollout_keeps_the_threads_that_have_joined(few_steps):
    world, cut = apr_world(), 0
    whole = apr_scenarios()[1]["four threads"][1]
    asked = apr_scenarios()[0]["four threads"]
    for polls in range(1, 12):
        with few_steps.session(world.params) as session:
            ticket = session.submit(asked)
            ended = [pair for _ in range(polls) for pair in session.poll()]
            session.cancel(ticket)
            while session.busy:
                ended += session.poll()
        ((_, rollout),) = ended
        n = len(rollout.trajectory.tokens)
        assert rollout.trajectory.tokens.tolist() == whole.tokens[:n].tolist()
        for ours, theirs in zip(rollout.trajectory.blocks, whole.blocks, strict=False):
            assert ours.threads == theirs.threads[: len(ours.threads)]
        cut += rollout.finish_reason == "cancelled" and len(rollout.trajectory.blocks) == 1
        check_idle_pages(few_steps)
    assert cut, "some were cancelled behind a join"


def test_a_rollout_ends_when_its_archive_is_full():
    """Only so many threads' texts are kept beside the store: as many as fill its areas."""
    world = apr_world()
    config = dataclasses.replace(
        ENGINE, context_len=72, rows=3, requests=2, max_threads=1, max_blocks=3
    )
    engine = RolloutEngine(world.graphdef, world.schema, config)
    bias = {"<eos>": -50.0, "</Join>": -50.0, "<Spawn>": 3.0}
    asked = [
        request(
            world,
            seed,
            apr_messages("a"),
            max_threads=1,
            max_thread_tokens=50,
            logit_bias=tuple((world.ids(piece)[0], value) for piece, value in bias.items()),
        )
        for seed in range(12)
    ]
    full = 0
    for rollout in engine.generate(world.params, asked):
        blocks = rollout.trajectory.blocks
        kept = sum(span.end - span.start for block in blocks for span in block.threads)
        assert kept <= engine.program.archive_len
        full += not blocks[-1].threads
        assert rollout.finish_reason in ("length", "context")
        assert rollout.units[-1].kind == "segment"
    assert full, "an archive was full"
    check_idle_pages(engine)


def test_one_thread_needs_a_row_of_its_own():
    world = apr_world()
    config = dataclasses.replace(ENGINE, rows=1, requests=1, max_threads=1, prefill_rows=1)
    engine = RolloutEngine(world.graphdef, world.schema, config)
    with pytest.raises(UserError, match="a row of their own"):
        engine.generate(world.params, [request(world, 1, max_threads=1)])
