"""The client against `tw-jax serve`: the same greedy rollouts as the engine in this process."""

import dataclasses

import numpy as np
import pytest

from tests.rollout.completions_server import SmallWorldCodec
from tests.rollout.scenarios import ENGINE, named_requests
from tests.rollout.small_world import make_model, make_schema
from tw_jax.rollout.client import ClientConfig, RolloutClient
from tw_jax.rollout.engine import RolloutEngine

small_server = pytest.importorskip("tests.serve.small_server", reason="there is no server here")


def test_greedy_rollouts_equal_the_engines(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    requests = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, temperature=0.0))
        for r in named_requests().values()
        # JSON has no infinity: a banned token is one with a bias of -100 there.
        if all(np.isfinite(bias) for _, bias in r.sampling.logit_bias)
    ]
    expected = RolloutEngine(make_model()[0], make_schema(), ENGINE).generate(
        make_model()[1], requests
    )
    with small_server.serving() as running:
        config = ClientConfig(f"{running.url}/v1", dialect="tw_jax")
        client = RolloutClient(config, make_schema(), SmallWorldCodec())
        rollouts = client.generate(requests)
    for ours, theirs in zip(rollouts, expected, strict=True):
        assert ours.trajectory.tokens.tolist() == theirs.trajectory.tokens.tolist()
        assert ours.trajectory.blocks == theirs.trajectory.blocks
        assert ours.finish_reason == theirs.finish_reason
        for one, two in zip(ours.units, theirs.units, strict=True):
            assert one.completion.tolist() == two.completion.tolist()
            assert one.finish_reason == two.finish_reason
            np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4, rtol=0)
