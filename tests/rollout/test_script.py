"""A scripted rollout takes the script's tokens, with the log-probabilities of the model."""

import dataclasses

import numpy as np
import pytest

from tests.rollout.scenarios import LOOP, plans, request, small_requests
from tests.rollout.small_world import make_model, make_schema
from tw_jax.errors import UserError
from tw_jax.rollout.engine import RolloutEngine


@pytest.fixture(scope="module")
def engine():
    return RolloutEngine(make_model()[0], make_schema(), dataclasses.replace(LOOP, scripts=True))


def scripted(asked, rollout):
    """The request again, told what it sampled; another seed and temperature."""
    sampling = dataclasses.replace(asked.sampling, temperature=0.0)
    return dataclasses.replace(asked, script=rollout.trajectory, seed=99, sampling=sampling)


def test_a_script_is_played_with_its_logprobs(engine):
    params = make_model()[1]
    asked = [request(5, plans("1", "2", "3")), *small_requests(8)]
    sampled = engine.generate(params, asked)
    played = engine.generate(params, [scripted(*pair) for pair in zip(asked, sampled, strict=True)])
    threads = 0
    for a, b in zip(sampled, played, strict=True):
        assert a.trajectory.tokens.tolist() == b.trajectory.tokens.tolist()
        assert a.trajectory.blocks == b.trajectory.blocks
        for x, y in zip(a.units, b.units, strict=True):
            assert x.completion.tolist() == y.completion.tolist()
            assert x.finish_reason == y.finish_reason
            np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-5)
        threads += sum(unit.kind == "thread" for unit in b.units)
    assert threads > 10


def test_sequential_decoding_plays_the_joined_text(engine):
    params, asked = make_model()[1], request(5, plans("1", "2"))
    (rollout,) = engine.generate(params, [asked])
    again = dataclasses.replace(
        asked, mode="sequential", script=rollout.trajectory, seed=99, forced_prefix=()
    )
    (played, free) = engine.generate(params, [again, dataclasses.replace(again, script=None)])
    assert played.trajectory.tokens.tolist() == rollout.trajectory.tokens.tolist()
    assert len(played.units) == 1
    assert free.trajectory.tokens.tolist() != played.trajectory.tokens.tolist()


def test_scripts_that_cannot_be_played_are_refused(engine):
    params, asked = make_model()[1], request(1)
    (rollout,) = engine.generate(params, [asked])
    other = dataclasses.replace(request(2, prompt="<bos>ba"), script=rollout.trajectory)
    with pytest.raises(UserError, match="request 0: its script is for another prompt"):
        engine.generate(params, [other])
    plain = RolloutEngine(make_model()[0], make_schema(), LOOP)
    with pytest.raises(UserError, match="needs engine.scripts=true"):
        plain.generate(params, [dataclasses.replace(asked, script=rollout.trajectory)])
