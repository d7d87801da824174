"""The sampler's log-probabilities are the trainer's, token by token, through spawns and joins."""

import jax
import numpy as np
import pytest

from tw_jax.data.packing import best_fit_rows, pack_rows
from tw_jax.models import qwen3
from tw_jax.models.config import PRESETS
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import Request, SamplingParams
from tw_jax.train.group_forest import group_forest
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.scoring import token_logprobs

OUTLINES = (
    "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n"
    "<Outline>12: c</Outline>\n</Outlines>"
)
BOUND = 1e-4


@pytest.fixture(scope="module", params=["tiny", "tiny-moe"])
def rollouts(request, tokenizer, schema):
    """Random text in three threads and behind their join, from a tiny preset."""
    config = PRESETS[request.param]
    graphdef, params = qwen3.graphdef(config), qwen3.init_params(config, 3)
    engine = RolloutEngine(
        graphdef,
        schema,
        EngineConfig(context_len=192, rows=12, requests=4, max_threads=3, max_blocks=2),
    )
    prefix = tuple(tokenizer(OUTLINES, add_special_tokens=False).input_ids)
    sampling = SamplingParams(
        max_response_tokens=150, max_thread_tokens=20, max_threads=3, max_blocks=2
    )
    requests = [
        Request(np.array([2, 15 + i], np.int32), seed=i, sampling=sampling, forced_prefix=prefix)
        for i in range(8)
    ]
    return graphdef, params, engine.generate(params, requests)


def test_every_sampled_token_has_the_same_log_probability(rollouts, schema):
    graphdef, params, sampled = rollouts
    objective = ObjectiveConfig()
    forests = [group_forest(schema, [r], [1.0], [i], objective) for i, r in enumerate(sampled)]
    rows = best_fit_rows([len(forest.trie) for forest in forests], 512)
    batch = pack_rows([[forests[i] for i in row] for row in rows], 512)
    trained = jax.jit(lambda p, b: token_logprobs(graphdef, p, b, head_chunk=4096, remat="none"))(
        params, batch
    )
    mask = batch.loss_weight > 0
    assert mask.sum() == sum(len(unit.completion) for r in sampled for unit in r.units)
    apart = np.abs(np.asarray(trained) - batch.sampler_logprob)[mask]
    assert apart.max() <= BOUND


def test_the_rollouts_really_fork_and_join(rollouts):
    _, _, sampled = rollouts
    kinds = [unit.kind for r in sampled for unit in r.units]
    assert kinds.count("thread") == 3 * len(sampled)
    reasons = {unit.finish_reason for r in sampled for unit in r.units if unit.kind == "thread"}
    assert {"length"} <= reasons
    assert all(r.units[-1].kind == "segment" for r in sampled)
