"""How many known tokens a step feeds."""

import dataclasses

import numpy as np
import pytest

from tests.rollout.scenarios import ENGINE, request
from tests.rollout.sessions import finish, polled, set_steps
from tests.rollout.small_world import ids, make_model, make_schema
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.lanes import chunk_lengths

CHUNK = 4
MOST_CHUNKS = 8
LONG = "<bos>" + "abc" * 20


@pytest.fixture(scope="module")
def engine():
    config = dataclasses.replace(ENGINE, prefill_chunk=CHUNK, steps_per_dispatch=1)
    return RolloutEngine(make_model()[0], make_schema(), config)


def cached(session) -> list[int]:
    """Cached tokens of rows that are live."""
    rows = session.state.rows
    return np.asarray(rows.n_kv)[np.asarray(rows.live)].tolist()


def test_chunk_follows_chunk_while_no_row_could_sample(engine):
    set_steps(engine, 1)
    with engine.session(make_model()[1]) as session:
        session.submit(request(0, prompt=LONG, max_response_tokens=5))
        fed = []
        for _ in range(3):
            polled(session)
            fed += cached(session)
        # The decode lane adds one token a step. The last known one is its own.
        prompt_len = len(ids(LONG))
        assert fed == [CHUNK * MOST_CHUNKS + 1, prompt_len, prompt_len + 1]
        finish(session)


def test_short_ends_have_a_shorter_chunk(engine):
    def lengths(**changes):
        return chunk_lengths(dataclasses.replace(engine.program, **changes))

    assert lengths(prefill_chunk=40) == (40, 10)
    assert lengths(prefill_chunk=31) == (31,), "a quarter of it would be too short to pay"
    assert lengths(prefill_chunk=40, deterministic=True) == (40,)


def test_one_chunk_beside_a_row_that_samples(engine):
    set_steps(engine, 1)
    with engine.session(make_model()[1]) as session:
        session.submit(request(0, prompt="<bos>ab", max_response_tokens=60))
        polled(session)
        session.submit(request(1, prompt=LONG, max_response_tokens=5))
        seen = []
        for _ in range(3):
            polled(session)
            seen.append(cached(session))
        assert [second for _, second in seen] == [(CHUNK + 1) * step for step in (1, 2, 3)]
        assert np.diff([first for first, _ in seen]).tolist() == [1, 1]
        finish(session)
