"""What the engine promises besides its tokens: no recompilation, no copies, clear errors."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compiled_copies import compiled_copies
from tests.rollout.page_checker import check_idle_pages
from tests.rollout.scenarios import (
    ENGINE,
    LOOP,
    MAX_DIGITS,
    plans,
    request,
    scenarios,
    small_requests,
)
from tests.rollout.small_world import ID, ids, make_model, make_schema
from tests.rollout.tiny_language import CONFIG
from tw_jax.errors import UserError
from tw_jax.models import graphdef
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import Request


@pytest.fixture(scope="module")
def compiled():
    return RolloutEngine(make_model()[0], make_schema(), LOOP)


@pytest.fixture
def engine(compiled):
    """Every test leaves an engine without any page in use, or none at all after a failure."""
    yield compiled
    if compiled.state is not None:
        check_idle_pages(compiled)


def changed_requests():
    """Requests with and without penalties and biases."""
    return [
        *small_requests(3),
        *small_requests(3, repetition_penalty=1.4, min_p=0.05),
        *small_requests(3, repetition_penalty=1.7, repetition_scope="unit", temperature=0.0),
        *small_requests(3, logit_bias=((ID["a"], -math.inf), (ID["b"], 2.0)), top_p=0.9),
    ]


def token_lists(rollouts):
    return [rollout.trajectory.tokens.tolist() for rollout in rollouts]


def test_streams_more_requests_than_slots_and_reports_each(engine):
    seen = []
    requests = small_requests()
    rollouts = engine.generate(
        make_model()[1], requests, on_finish=lambda i, rollout: seen.append((i, rollout))
    )
    assert sorted(i for i, _ in seen) == list(range(len(requests)))
    assert all(rollouts[i] is rollout for i, rollout in seen)
    for request_, rollout in zip(requests, rollouts, strict=True):
        assert (rollout.prompt == request_.prompt).all()
        assert tuple(rollout.response[: len(request_.forced_prefix)]) == request_.forced_prefix


def test_nothing_compiles_after_the_first_call(engine):
    """A mixed workload: other lengths, budgets, temperatures, modes, numbers of requests."""
    params = make_model()[1]
    engine.generate(params, small_requests(2))
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1)(jnp.ones(17)).block_until_ready()
        assert compiled, "the listener hears compilations"
        compiled.clear()
        engine.generate(params, small_requests(9, temperature=0.5))
        engine.generate(params, small_requests(3, top_k=3, top_p=0.9, max_thread_tokens=30))
        engine.generate(params, [request(0, mode="sequential", prompt="<bos>" + "abc" * 20)])
        engine.generate(params, changed_requests())
        engine.generate(params, [])
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_tokens_do_not_depend_on_batch_order_or_neighbours(engine):
    params, requests = make_model()[1], small_requests()
    together = token_lists(engine.generate(params, requests))
    reverse = token_lists(engine.generate(params, requests[::-1]))[::-1]
    alone = token_lists(engine.generate(params, [requests[3]]))
    assert together == reverse
    assert together[3] == alone[0]


def test_penalties_and_biases_do_not_reach_the_neighbours(engine):
    """Any order, and alone: a row changes its own logits only, and by its own text only."""
    params, requests = make_model()[1], changed_requests()
    together = token_lists(engine.generate(params, requests))
    order = np.random.default_rng(0).permutation(len(requests))
    shuffled = token_lists(engine.generate(params, [requests[i] for i in order]))
    assert [together[i] for i in order] == shuffled
    assert together[:3] == token_lists(engine.generate(params, requests[:3]))
    assert together[4] == token_lists(engine.generate(params, [requests[4]]))[0]


def test_the_scope_of_a_penalty_is_what_it_counts(engine):
    """Only tokens of the prompt are penalised at first: the scope of the unit knows none."""
    params = make_model()[1]

    def first_token(**sampling):
        asked = request(3, prompt="<bos>abcdef", temperature=0.0, max_response_tokens=1, **sampling)
        return int(engine.generate(params, [asked])[0].response[0])

    plain, rewarded = first_token(), first_token(repetition_penalty=0.01)
    assert plain not in ids("<bos>abcdef")
    assert rewarded in ids("<bos>abcdef")
    assert first_token(repetition_penalty=0.01, repetition_scope="unit") == plain


def test_a_banned_token_is_never_sampled(engine):
    """Wherever the unbanned model samples it; the engine itself may still write it."""
    banned = [ID["a"], ID["</Thread>"], ID["\n"]]
    ban = tuple((token, -math.inf) for token in banned)
    params = make_model()[1]

    def sampled(**sampling):
        requests = [*small_requests(8, **sampling), *small_requests(4, top_k=3, **sampling)]
        rollouts = engine.generate(params, requests)
        return {int(t) for r in rollouts for unit in r.units for t in unit.completion}, rollouts

    assert sampled()[0] >= set(banned)
    tokens, rollouts = sampled(logit_bias=ban)
    assert not tokens & set(banned)
    assert any(ID["</Thread>"] in rollout.response for rollout in rollouts)
    assert all(np.isfinite(unit.logprobs).all() for r in rollouts for unit in r.units)


def test_the_timeline_is_a_schedule(engine):
    """A row runs one unit at a time, children follow their parents, steps start at 0."""
    rollouts = engine.generate(make_model()[1], small_requests(20))
    busy = []
    for rollout in rollouts:
        for unit in rollout.units:
            assert 0 <= unit.start_step <= unit.end_step
            if len(unit.completion):
                assert unit.end_step - unit.start_step + 1 >= len(unit.completion)
                busy.append((unit.row, unit.start_step, unit.end_step))
            parent = rollout.units[unit.parent] if unit.parent >= 0 else None
            if parent is not None and len(parent.completion):
                assert parent.end_step < unit.start_step
        assert rollout.timeline == tuple((u.row, u.start_step, u.end_step) for u in rollout.units)
    assert min(start for _, start, _ in busy) < LOOP.steps_per_dispatch
    busy.sort()
    for (row, _, end), (next_row, start, _) in zip(busy, busy[1:], strict=False):
        assert row != next_row or end < start
    assert {row for row, _, _ in busy} <= set(range(LOOP.rows))


def test_threads_run_side_by_side(engine):
    """One request in an idle engine: its threads overlap in time."""
    (rollout,) = engine.generate(make_model()[1], [request(5, plans("1", "2", "3"))])
    threads = [unit for unit in rollout.units if unit.block == 0 and unit.kind == "thread"]
    assert len(threads) == 3
    assert max(t.start_step for t in threads) <= min(t.start_step for t in threads) + 3
    assert len({t.row for t in threads}) == 3
    segment = rollout.units[0]
    assert threads[0].row == segment.row, "thread 1 stays in its parent's row"


def test_an_exception_in_the_callback_leaves_a_usable_engine(engine):
    params, requests = make_model()[1], small_requests(4)

    def fail(index, rollout):
        raise KeyboardInterrupt

    expected = token_lists(engine.generate(params, requests))
    with pytest.raises(KeyboardInterrupt):
        engine.generate(params, requests, on_finish=fail)
    assert token_lists(engine.generate(params, requests)) == expected


def test_no_progress_raises(engine, monkeypatch):
    def stuck(params, state, max_steps, max_finished):
        return state, np.array([1] * 2 * LOOP.requests + [0, 5, 3])

    monkeypatch.setattr(engine, "advance", stuck)
    with pytest.raises(RuntimeError, match="no progress at step 5"):
        engine.generate(make_model()[1], small_requests(1))


@pytest.mark.parametrize("kept", [0, 3])
def test_the_loop_copies_neither_cache_nor_token_store(engine, kept):
    """Silent copies of the whole cache are what ruins such a loop; see the optimised program."""
    params = make_model()[1]
    if kept:
        engine = RolloutEngine(
            make_model()[0],
            make_schema(),
            dataclasses.replace(engine.config, kept_prefixes=kept),
        )
    engine.generate(params, small_requests(1))
    text = engine.advance.lower(engine.weights(params), engine.state, 4, 1).compile().as_text()
    arrays = [*jax.tree.leaves(engine.state.cache), engine.state.tokens]
    shapes = {array.shape for array in arrays if array.size}
    assert all(f"[{','.join(map(str, shape))}]" in text for shape in shapes)
    assert not [dims for dims in compiled_copies(text) if dims in shapes]


def test_deterministic_logprobs_do_not_depend_on_the_schedule():
    """Bit for bit, with other neighbours, another order, and threads that spawn late."""
    config = dataclasses.replace(LOOP, deterministic=True, rows=6, requests=4)
    graphdef_, params = make_model()
    engine = RolloutEngine(graphdef_, make_schema(), config)
    requests = list(scenarios()[0].values())[:20]
    requests = [r for r in requests if len(r.prompt) < 60]
    together = engine.generate(params, requests)
    reverse = engine.generate(params, requests[::-1])[::-1]
    alone = [engine.generate(params, [r])[0] for r in requests[:3]]
    for other in (reverse, alone):
        for a, b in zip(together, other, strict=False):
            for ours, theirs in zip(a.units, b.units, strict=True):
                assert (ours.logprobs == theirs.logprobs).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": 4, "requests": 5}, "every active request holds a row"),
        ({"rows": 0}, "engine.rows=0"),
        ({"prefill_rows": 99}, "engine.prefill_rows=99"),
        ({"prefill_chunk": 999}, "engine.prefill_chunk=999"),
        ({"max_logit_bias": -1}, "engine.max_logit_bias=-1: must be at least 0"),
        ({"max_threads": 5000}, "engine.max_threads=5000"),
    ],
)
def test_refuses_sizes_that_do_not_fit(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        dataclasses.replace(ENGINE, **fields)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(0, prompt=""), "the prompt is empty"),
        (request(0, prompt="<bos>" + "a" * 129), "leave no room in engine.context_len=130"),
        (request(0, max_response_tokens=0), "sampling.max_response_tokens=0 must be at least 1"),
        (request(0, "a" * 90), "spends the budget of max_response_tokens=90"),
        (request(0, max_threads=9), "sampling.max_threads=9 must lie in 1..4"),
        (request(0, max_blocks=9), "sampling.max_blocks=9 must lie in 1..3"),
        (request(0, max_thread_tokens=0), "max_thread_tokens"),
        (request(0, temperature=-1.0), "temperature"),
        (request(0, temperature=float("nan")), "temperature"),
        (request(0, top_p=0.0), "top_p"),
        (request(0, top_k=-1), "top_k"),
        (request(0, min_p=1.5), "min_p=1.5 must lie in 0..1"),
        (request(0, min_p=float("nan")), "min_p=nan"),
        (request(0, repetition_penalty=0.0), "repetition_penalty=0.0 must lie in 0.01..100"),
        (request(0, repetition_penalty=math.inf), "repetition_penalty=inf"),
        (request(0, repetition_scope="all"), "repetition_scope='all'"),
        (request(0, logit_bias=((24, 1.0),)), "names token 24: ids lie in 0..23"),
        (request(0, logit_bias=((-1, 1.0),)), "names token -1"),
        (request(0, logit_bias=((1, 1.0), (1, 2.0))), "names token 1 twice"),
        (request(0, logit_bias=((1, math.inf),)), "gives token 1 inf"),
        (request(0, logit_bias=((1, math.nan),)), "gives token 1 nan"),
        (request(0, logit_bias=((1, -1001.0),)), "must lie in -1000..1000, or be -inf"),
        (request(0, logit_bias=tuple((i, 1.0) for i in range(40))), "engine.max_logit_bias=32"),
        (request(0, logit_bias=tuple((i, -math.inf) for i in range(24))), "bans every token"),
        (request(-1), "seed=-1"),
        (request(2**64), "seed="),
        (request(0, mode="both"), "mode='both'"),
        (Request(np.array([0, 99], np.int32), 0), "token ids must lie in 0..23"),
    ],
)
def test_refuses_a_request_that_it_cannot_serve(engine, bad, message):
    with pytest.raises(UserError, match="request 1: .*" + re.escape(message)):
        engine.generate(make_model()[1], [request(0), bad])


def test_one_row_serves_sequential_requests_only():
    config = dataclasses.replace(ENGINE, rows=1, requests=1, prefill_rows=1)
    engine = RolloutEngine(make_model()[0], make_schema(), config)
    with pytest.raises(UserError, match="set engine.rows to at least 2"):
        engine.generate(make_model()[1], [request(0)])


def test_refuses_models_and_schemas_that_do_not_fit():
    schema = make_schema()
    with pytest.raises(UserError, match="engine.context_len=600"):
        RolloutEngine(make_model()[0], schema, EngineConfig(context_len=600))
    small = graphdef(dataclasses.replace(CONFIG, vocab_size=20))
    with pytest.raises(UserError, match="24 tokens, the model only 20"):
        RolloutEngine(small, schema, ENGINE)

    other = dataclasses.replace(schema, join_rule="message")
    with pytest.raises(UserError, match="joins by 'message' at 'contiguous' positions"):
        RolloutEngine(make_model()[0], other, ENGINE)


def test_numbers_longer_than_the_engine_holds_are_dropped():
    """A fact that the scenarios rely on."""
    assert MAX_DIGITS == ENGINE.max_number_digits == 2 < len(ids("123"))
