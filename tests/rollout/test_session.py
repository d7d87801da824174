"""Requests that come, are watched, cancelled and run out of time while the engine runs."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.rollout.page_checker import check_idle_pages
from tests.rollout.scenarios import LOOP, plans, request, small_requests
from tests.rollout.sessions import finish, polled, tokens
from tests.rollout.small_world import ID, make_model, make_schema
from tw_jax.errors import UserError
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.live_text import finished_text
from tw_jax.rollout.session import QueueFullError, RolloutsStopped

FEW_STEPS = dataclasses.replace(LOOP, steps_per_dispatch=3)


@pytest.fixture(scope="module")
def compiled():
    return RolloutEngine(make_model()[0], make_schema(), FEW_STEPS)


@pytest.fixture
def engine(compiled):
    """Every test leaves an engine without any page in use."""
    yield compiled
    check_idle_pages(compiled)


def test_requests_may_come_while_others_run(engine):
    params, requests = make_model()[1], small_requests(12)
    expected = [tokens(rollout) for rollout in engine.generate(params, requests)]
    found, coming = {}, list(requests)
    with engine.session(params) as session:
        while coming or session.busy:
            if coming:
                assert session.submit(coming.pop(0)) == len(requests) - len(coming) - 1
            found |= polled(session)
    assert [tokens(found[ticket]) for ticket in range(12)] == expected


def test_live_text_grows_into_the_rollout(engine):
    """Every text seen on the way is a prefix of the end, and so is every thread."""
    seen, texts = {}, {}
    with engine.session(make_model()[1]) as session:
        for r in [request(5, plans("1", "2", "3")), *small_requests(6)]:
            session.submit(r)
        while session.busy:
            for ticket, text in session.live().items():
                texts.setdefault(ticket, []).append(text)
            seen |= polled(session)
    threads_seen = closed_seen = 0
    for ticket, rollout in seen.items():
        trajectory = rollout.trajectory
        written = {(u.block, u.thread): u for u in rollout.units if u.kind == "thread"}
        for before, text in zip([None, *texts[ticket]], texts[ticket], strict=False):
            n = len(text.tokens)
            assert text.prompt_len == trajectory.prompt_len
            assert text.tokens.tolist() == trajectory.tokens[:n].tolist()
            assert before is None or len(before.tokens) <= n
            drawn = np.zeros(n, bool)
            for unit in rollout.units:
                drawn[unit.start : unit.start + len(unit.logprobs)] = True
                done = max(0, min(n, unit.start + len(unit.logprobs)) - unit.start)
                got = text.logprobs[unit.start : unit.start + done]
                np.testing.assert_array_equal(got, unit.logprobs[:done])
            assert not text.logprobs[~drawn].any()  # those of given tokens are 0
            end = finished_text(rollout)
            for threads, last in zip(text.closed, end.closed, strict=False):
                assert [t.tokens.tolist() for t in threads] == [t.tokens.tolist() for t in last]
                assert [t.header_len for t in threads] == [t.header_len for t in last]
                closed_seen += len(threads)
            for thread in text.threads:
                unit = written.get((text.block, thread.ordinal))
                if unit is None:  # it did not make it into the result
                    continue
                threads_seen += 1
                sampled = thread.tokens[thread.header_len :].tolist()
                n = len(unit.completion)
                cut = unit.finish_reason in ("length", "context")  # by the limit of the joined text
                assert len(sampled) == n if thread.ended and not cut else cut or len(sampled) <= n
                assert sampled[:n] == unit.completion[: len(sampled)].tolist()
                assert thread.tokens[0] == ID["<Thread>"]
    assert threads_seen > 10 and closed_seen > 10


@pytest.mark.parametrize("polls", range(0, 10))
def test_a_cancelled_rollout_keeps_what_has_joined(engine, polls):
    params = make_model()[1]
    asked = request(5, plans("1", "2", "3"))
    (whole,) = engine.generate(params, [asked])
    with engine.session(params) as session:
        ticket, other = session.submit(asked), session.submit(request(1))
        for _ in range(polls):
            assert ticket not in polled(session)
        session.cancel(ticket)
        found = finish(session)
    cut = found[ticket]
    n = len(cut.trajectory.tokens)
    assert cut.finish_reason == "cancelled"
    assert cut.trajectory.tokens.tolist() == whole.trajectory.tokens[:n].tolist()
    for unit, full in zip(cut.units, whole.units, strict=False):
        assert (unit.kind, unit.block, unit.thread) == (full.kind, full.block, full.thread)
        assert unit.completion.tolist() == full.completion[: len(unit.completion)].tolist()
    assert tokens(found[other]) == tokens(engine.generate(params, [request(1)])[0])


def test_a_waiting_request_can_be_cancelled(engine):
    with engine.session(make_model()[1]) as session:
        tickets = [session.submit(r) for r in small_requests(FEW_STEPS.requests + 3)]
        session.cancel(tickets[-1])
        session.cancel(999)
        found = finish(session)
    last = found[tickets[-1]]
    assert last.finish_reason == "cancelled" and not last.units
    assert last.total_tokens == len(small_requests(FEW_STEPS.requests + 3)[-1].forced_prefix)
    assert all(found[ticket].finish_reason != "cancelled" for ticket in tickets[:-1])


def test_a_deadline_ends_a_request_where_it_is(engine, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with engine.session(make_model()[1]) as session:
        slow = session.submit(dataclasses.replace(request(5, plans("1", "2")), timeout_s=1.0))
        patient = session.submit(dataclasses.replace(request(1), timeout_s=100.0))
        session.poll()
        clock[0] = 2.0
        found = finish(session)
    assert found[slow].finish_reason == "deadline"
    assert found[patient].finish_reason != "deadline"


def test_the_queue_is_bounded(engine):
    with engine.session(make_model()[1], max_queue=2) as session:
        session.submit(request(0))
        session.submit(request(1))
        with pytest.raises(QueueFullError, match="2 requests wait"):
            session.submit(request(2))
        session.poll()
        session.submit(request(2))
        assert len(finish(session)) >= 2


def test_one_session_at_a_time_and_bad_requests_are_refused(engine):
    params = make_model()[1]
    with engine.session(params) as session:
        with pytest.raises(RuntimeError, match="open session"), engine.session(params):
            pass
        with pytest.raises(UserError, match="timeout_s=-1"):
            session.submit(dataclasses.replace(request(0), timeout_s=-1))
        assert not session.busy
    assert len(engine.generate(params, [request(0)])) == 1


@pytest.mark.parametrize("later", ["ab", "cd"])
def test_a_cancelled_request_is_no_source_of_a_shared_beginning(engine, later):
    """It ends before its prompt is cached, and its row goes to a request that comes at once."""
    params = make_model()[1]
    first, other = (request(i, prompt="<bos>" + "ab" * 40) for i in (1, 2))
    third = request(3, prompt="<bos>" + later * 40)
    expected = [tokens(rollout) for rollout in engine.generate(params, [other, third])]
    with engine.session(params) as session:
        cancelled, kept = session.submit(first), session.submit(other)
        session.poll()
        session.cancel(cancelled)
        came = session.submit(third)
        found = finish(session)
    assert found[cancelled].finish_reason == "cancelled"
    assert [tokens(found[ticket]) for ticket in (kept, came)] == expected


def test_rollouts_are_stopped_between_dispatches(engine):
    params, requests = make_model()[1], small_requests(12)
    expected = [tokens(rollout) for rollout in engine.generate(params, requests)]
    finished = {}
    with pytest.raises(RolloutsStopped, match=r"^[1-9]\d* of 12 rollouts finished"):
        engine.generate(
            params,
            requests,
            on_finish=finished.__setitem__,
            should_stop=lambda: len(finished) > 2,
        )
    assert 2 < len(finished) < 12
    assert all(tokens(rollout) == expected[index] for index, rollout in finished.items())
    with pytest.raises(RolloutsStopped, match="0 of 12"):
        engine.generate(params, requests, should_stop=lambda: True)
    again = engine.generate(params, requests, should_stop=lambda: False)
    assert [tokens(rollout) for rollout in again] == expected


def test_ready_weights_do_as_well_as_parameters(engine):
    params = make_model()[1]
    weights = jax.device_put(engine.weights(params), jax.devices()[0])
    (expected,), (found,) = (engine.generate(p, [request(3)]) for p in (params, weights))
    assert tokens(found) == tokens(expected)
