"""Requests that share the beginning of their prompts write what they would write alone."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rollout.page_checker import check_idle_pages
from tests.rollout.scenarios import ENGINE, named_requests, plans, random_requests, request
from tests.rollout.sessions import alone, finish, polled, run, set_steps, tokens
from tests.rollout.small_world import ID, ids, make_model, make_schema
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.prefix_book import PrefixBook

PAGE, KEPT = 16, 2
# Chunks so short that a long beginning takes several steps.
CONFIG = dataclasses.replace(ENGINE, page_size=PAGE, kept_prefixes=KEPT, prefill_chunk=2)
# Three pages and two tokens.
LONG = "<bos>" + "abc " * 12 + "f"
THREE = plans("1", "2", "3")


@pytest.fixture(scope="module")
def compiled():
    return RolloutEngine(make_model()[0], make_schema(), CONFIG)


@pytest.fixture
def engine(compiled):
    """Every test leaves an engine in which only kept prefixes hold pages."""
    set_steps(compiled, CONFIG.steps_per_dispatch)
    yield compiled
    check_idle_pages(compiled)


@pytest.fixture
def shared(monkeypatch):
    """(source, tokens) of every request that was told to share."""
    told, admit = [], PrefixBook.admit

    def spy(self, slot, prompt):
        found = admit(self, slot, prompt)
        if found[0] >= 0:
            told.append(found)
        return found

    monkeypatch.setattr(PrefixBook, "admit", spy)
    return told


def expect(engine, rollouts, requests):
    """Whole rollouts equal those without sharing, interrupted ones begin like them."""
    params = make_model()[1]
    for rollout, asked in zip(rollouts, requests, strict=True):
        whole = alone(engine, params, asked)
        n = len(rollout.trajectory.tokens)
        if rollout.finish_reason not in ("cancelled", "deadline"):
            assert n == len(whole.trajectory.tokens)
            assert rollout.finish_reason == whole.finish_reason
            for ours, theirs in zip(rollout.units, whole.units, strict=True):
                np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=0)
        assert tokens(rollout) == tokens(whole)[:n]


def test_all_scenarios_behind_one_long_beginning(engine, shared):
    """The tokens of every request of the oracle's list, its prompt made longer."""
    start = np.array(ids(LONG), np.int32)
    requests = [
        dataclasses.replace(r, prompt=np.concatenate([start, r.prompt]))
        for r in (named_requests() | random_requests(6)).values()
        if len(r.prompt) + len(r.forced_prefix) + len(start) < CONFIG.context_len
    ]
    requests += [dataclasses.replace(r, seed=r.seed + 1000) for r in requests[:10]]
    order = np.random.default_rng(0).permutation(len(requests))
    requests = [requests[i] for i in order]
    rollouts = run(engine, make_model()[1], requests)
    assert len(requests) > 50 and len(shared) > len(requests) - 3
    expect(engine, rollouts, requests)


def test_shared_pages_count_once(engine):
    set_steps(engine, 2)
    sampling = {"max_response_tokens": 30, "logit_bias": ((ID["<eos>"], -math.inf),)}
    four = [request(i, prompt=LONG, mode="sequential", **sampling) for i in range(4)]
    most = 0
    with engine.session(make_model()[1]) as session:
        assert session.pages_in_use == 0
        for asked in four:
            session.submit(asked)
        while session.busy:
            polled(session)
            pages = session.state.pages
            held = np.asarray(pages.held)
            if session.running == 4 and (held[:4] > 3).all():
                # The prefix is kept at the same time, in pages of its own.
                kept = held[CONFIG.rows :].sum()
                assert session.pages_in_use == 3 + (held[:4] - 3).sum() + kept
                assert np.asarray(pages.references)[0, : CONFIG.rows].max() == 4
                most += 1
    assert most > 2


LEAVERS = {"source": 0, "first follower": 1, "second follower": 2}


def leaving(leaver: int):
    """A source that spawns, two that follow it, and a late one; free rows go to threads."""
    asked = [
        request(0, THREE, LONG, max_response_tokens=70),
        request(1, THREE, LONG, max_response_tokens=60),
        request(2, "", LONG + "ab", max_response_tokens=30),
    ]
    asked[leaver] = dataclasses.replace(asked[leaver], timeout_s=1.0)
    return asked, request(3, THREE, LONG + "ab", max_response_tokens=60)


@pytest.mark.parametrize("polls", [0, 1, 2, 3, 4, 6])
@pytest.mark.parametrize("leaver", LEAVERS.values(), ids=list(LEAVERS))
@pytest.mark.parametrize("way", ["cancel", "deadline"])
def test_one_leaves_before_or_after_adoption(engine, shared, monkeypatch, way, leaver, polls):
    """At any point in time; another that shares with the one that left arrives in that poll."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    set_steps(engine, 2)
    first, late = leaving(leaver)
    with engine.session(make_model()[1]) as session:
        tickets = [session.submit(asked) for asked in first]
        found = {}
        for _ in range(polls):
            found |= polled(session)
        assert not found
        if way == "cancel":
            session.cancel(tickets[leaver])
        clock[0] = 2.0
        session.submit(late)
        set_steps(engine, CONFIG.steps_per_dispatch)
        found |= finish(session)
    reason = {"cancel": "cancelled", "deadline": "deadline"}[way]
    assert [found[t].finish_reason == reason for t in sorted(found)] == [
        i == leaver for i in range(4)
    ]
    assert len(shared) >= 2
    expect(engine, [found[t] for t in sorted(found)], [*first, late])


@pytest.mark.parametrize("way", ["cancel", "deadline"])
def test_a_thread_gets_the_row_of_one_that_waited_to_share(engine, shared, monkeypatch, way):
    """Nobody else arrives, so the source's own threads take the row that is free again."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    set_steps(engine, 2)
    source = request(0, THREE, LONG, max_response_tokens=70)
    follower = dataclasses.replace(source, seed=1, timeout_s=1.0)
    with engine.session(make_model()[1]) as session:
        session.submit(source)
        second = session.submit(follower)
        assert not polled(session)
        assert (np.asarray(session.state.rows.source) >= 0).any(), "it waits still"
        if way == "cancel":
            session.cancel(second)
        clock[0] = 2.0
        found = finish(session)
    threads = [unit for unit in found[0].units if unit.kind == "thread"]
    assert {unit.row for unit in threads} >= {0, 1}
    expect(engine, [found[0], found[1]], [source, follower])


ENDING_SOURCES = {
    "at its first token": request(0, prompt=LONG, max_response_tokens=1),
    "at admission": request(0, THREE, LONG, max_response_tokens=len(ids(THREE)) + 6),
    "before it is cached": request(0, prompt=LONG + "ab" * 40, max_response_tokens=100),
}


@pytest.mark.parametrize("name", ENDING_SOURCES)
@pytest.mark.parametrize("steps", [1, 40])
def test_a_source_that_ends_at_once(engine, shared, name, steps):
    set_steps(engine, steps)
    requests = [
        ENDING_SOURCES[name],
        *(request(i, THREE, LONG, max_response_tokens=50) for i in range(1, 4)),
    ]
    rollouts = run(engine, make_model()[1], requests)
    assert len(shared) == 3
    expect(engine, rollouts, requests)


def test_pages_lie_elsewhere_when_their_rows_change_hands(engine, shared):
    """Rows come and go while others hold pages at their places."""
    set_steps(engine, 3)
    rng = np.random.default_rng(0)
    starts = [LONG, LONG + "ab", "<bos>" + "ba" * 20, "<bos>abc"]
    requests = [
        request(
            i,
            THREE if i % 2 else "",
            starts[rng.integers(4)] + "abcdef"[: rng.integers(6)],
            max_response_tokens=int(rng.integers(30, 60)),
        )
        for i in range(30)
    ]
    moved = 0
    with engine.session(make_model()[1]) as session:
        for asked in requests:
            session.submit(asked)
        found = {}
        while session.busy:
            found |= polled(session)
            pages = session.state.pages
            held = np.arange(pages.pages.shape[1]) < np.asarray(pages.held)[:, None]
            alone_ = np.asarray(pages.references) == 1
            own = np.asarray(pages.pages) != np.arange(len(held))[:, None]
            column = np.arange(pages.pages.shape[1])
            moved += int((held & own & alone_[column, np.asarray(pages.pages)]).sum())
    assert moved > 10, "pages that are nobody else's, and not at home"
    assert len(shared) > 15
    expect(engine, [found[i] for i in range(30)], requests)


def one_after_another(session, requests):
    """Each when the one before has ended."""
    out = []
    for asked in requests:
        session.submit(asked)
        out += finish(session).values()
    return out


def test_kept_prefixes_are_shared_and_make_room(engine, shared):
    """Three beginnings that come by turns, and room for two."""
    set_steps(engine, 4)
    starts = [LONG, "<bos>" + "ba" * 20, "<bos>" + "dc" * 30]
    turns = [0, 0, 0, 1, 1, 0, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    requests = [
        request(i, THREE, starts[turn], max_response_tokens=50) for i, turn in enumerate(turns)
    ]
    with engine.session(make_model()[1]) as session:
        rollouts = one_after_another(session, requests)
        held = np.asarray(session.state.pages.held)[-KEPT:].tolist()
        assert session.pages_in_use == sum(held) > 0
    # Nothing runs beside them, so only kept prefixes are shared. One is kept when it comes a
    # second time, or again after it had to make room: beginning 1 at turn 9, 0 at turn 12.
    first, second = CONFIG.requests, CONFIG.requests + 1
    assert shared == [
        *[(first, 48), (first, 48), (second, 48)],
        *[(first, 32), (first, 32), (second, 48), (second, 48)],
    ]
    expect(engine, rollouts, requests)


def test_a_new_session_knows_nothing_of_what_was_kept(engine, shared):
    """Its parameters may be others, and nobody would use the pages."""
    graphdef, params = make_model()
    set_steps(engine, 4)
    requests = [request(i, THREE, LONG, max_response_tokens=50) for i in range(3)]
    with engine.session(params) as session:
        one_after_another(session, requests)
        assert session.pages_in_use == 3
    other = {**params, "embed_tokens": jax.tree.map(lambda x: x * 1.5, params["embed_tokens"])}
    with engine.session(other) as session:
        assert session.pages_in_use == 0
        after = one_after_another(session, requests)
        assert session.pages_in_use == 3
    assert len(shared) == 2, "the third request of each session"
    fresh = RolloutEngine(graphdef, make_schema(), dataclasses.replace(CONFIG, kept_prefixes=0))
    assert [tokens(r) for r in after] == [tokens(alone(fresh, other, r)) for r in requests]


def test_a_model_that_broke_down_leaves_nothing_behind(engine):
    """All that it cached is not finite; pages are handed on as they are."""
    params = make_model()[1]
    requests = [request(i, THREE, LONG, max_response_tokens=70) for i in range(6)]
    expected = [tokens(rollout) for rollout in run(engine, params, requests)]
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    for rollout in run(engine, broken, requests):
        assert all(np.isnan(unit.logprobs).all() for unit in rollout.units)
    assert [tokens(rollout) for rollout in run(engine, params, requests)] == expected


@functools.cache
def _endless() -> tuple[tuple[int, float], ...]:
    """Threads that end by their budget alone."""
    return ((ID["</Thread>"], -math.inf), (ID["<eos>"], -math.inf))


@pytest.mark.parametrize("budget", [5, 13])
def test_threads_add_pages_for_their_own_tokens_only(engine, budget):
    """Whatever the length of the prefix: k threads cost k * (t / page + 2) pages at most."""
    set_steps(engine, 1)
    k, extra = 3, []
    text = budget + len(ids("<Thread>\n1:")) + len(ids("\n</Thread>"))
    for pages in (0, 1, 3):
        asked = request(
            1,
            THREE,
            "<bos>" + "a" * (PAGE * pages + 4),
            max_thread_tokens=budget,
            max_response_tokens=140,
            max_blocks=1,
            logit_bias=_endless(),
        )
        before = -(-(len(asked.prompt) + len(asked.forced_prefix)) // PAGE)
        most = 0
        with engine.session(make_model()[1]) as session:
            ticket = session.submit(asked)
            polled(session)
            while not session.live()[ticket].closed:
                most = max(most, session.pages_in_use)
                polled(session)
            session.cancel(ticket)
            finish(session)
        extra.append(most - before)
    # How far thread 1 is when the others start is a matter of schedule; it may be a page.
    assert max(extra) - min(extra) <= 1
    assert 0 < max(extra) <= k * (text / PAGE + 2)
