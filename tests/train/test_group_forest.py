"""The forest update equals the update with one row per model call, in value and gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_trajectories import random_trajectories
from tests.test_laws import GRAPHDEF, PARAMS, assert_trees_close, plain_grad, unit_arrays
from tw_jax.data.packing import best_fit_rows, pack_rows
from tw_jax.rollout.rollout import Rollout, RolloutUnit
from tw_jax.train.group_forest import group_forest
from tw_jax.train.objective import ObjectiveConfig, token_weights
from tw_jax.train.update import MemoryConfig, policy_sum

PROMPT = np.array([2, 15, 16, 94], np.int32)


def as_rollout(trajectory, schema, rng):
    """A rollout whose sampler log-probabilities are random but known."""
    units = []
    start = trajectory.response_start
    for unit in schema.units(trajectory):
        if unit.kind == "thread":
            unit_start = trajectory.blocks[unit.block].threads[unit.thread - 1].body
        else:
            unit_start = start if unit.block == 0 else trajectory.blocks[unit.block - 1].join_end
        units.append(
            RolloutUnit(
                kind=unit.kind,
                parent=-1,
                block=unit.block,
                thread=unit.thread,
                context_len=len(unit.context),
                start=unit_start,
                completion=unit.completion,
                logprobs=-rng.random(len(unit.completion)).astype(np.float32),
                finish_reason="eos",
                row=0,
                start_step=0,
                end_step=0,
            )
        )
    return Rollout(trajectory, tuple(units), "eos", 0, 0)


def draw_group(data, tokenizer, schema, size):
    """Rollouts that share a prompt; some threads closed by the engine."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    group = []
    for _ in range(size):
        drawn = data.draw(random_trajectories(tokenizer, schema, max_blocks=2, max_threads=3))
        shift = len(PROMPT) - drawn.prompt_len
        group.append(as_rollout(_shifted(drawn, shift), schema, rng))
    return group


def _shifted(trajectory, shift):
    """The same response behind `PROMPT`."""

    def moved(span):
        indices = ("start", "body", "sampled_end", "end", "outlines_end", "join_end")
        changes = {
            name: getattr(span, name) + shift
            for name in indices
            if name in {field.name for field in dataclasses.fields(span)}
        }
        return dataclasses.replace(span, **changes)

    blocks = tuple(
        dataclasses.replace(
            moved(block),
            outlines=tuple(map(moved, block.outlines)),
            threads=tuple(map(moved, block.threads)),
        )
        for block in trajectory.blocks
    )
    tokens = np.concatenate([PROMPT, trajectory.tokens[trajectory.prompt_len :]])
    return dataclasses.replace(trajectory, tokens=tokens, prompt_len=len(PROMPT), blocks=blocks)


policy_grad = jax.jit(
    jax.value_and_grad(policy_sum(GRAPHDEF, ObjectiveConfig(), MemoryConfig()), has_aux=True)
)


@settings(max_examples=10)
@given(data=st.data())
def test_forest_update_equals_one_row_per_call(data, tokenizer, schema):
    groups = [draw_group(data, tokenizer, schema, 2) for _ in range(2)]
    advantages = [[0.7, -0.3], [-1.1, 0.4]]
    aggregation = data.draw(st.sampled_from(["token_mean", "sequence_mean", "rollout_mean"]))
    forests = [
        group_forest(schema, group, adv, [2 * g, 2 * g + 1], aggregation)
        for g, (group, adv) in enumerate(zip(groups, advantages, strict=True))
    ]
    rows = best_fit_rows([len(f.trie) for f in forests], 768)
    batch = pack_rows([[forests[i] for i in row] for row in rows] + [[]] * (2 - len(rows)), 768)
    (_, sums), grads = policy_grad(PARAMS, batch)
    grads = jax.tree.map(lambda g: g / sums["weight"], grads)

    total_weight, expected = 0.0, jax.tree.map(jnp.zeros_like, PARAMS)
    tokens = 0
    for group, adv in zip(groups, advantages, strict=True):
        for rollout, advantage in zip(group, adv, strict=True):
            units = schema.units(rollout.trajectory)
            weights = token_weights([len(unit.completion) for unit in units], aggregation)
            for unit, weight in zip(units, weights, strict=True):
                _, unit_grad = plain_grad(PARAMS, *unit_arrays(unit))
                scale = -advantage * weight
                expected = jax.tree.map(lambda e, g, s=scale: e + s * g, expected, unit_grad)
                total_weight += weight * len(unit.completion)
                tokens += len(unit.completion)
    expected = jax.tree.map(lambda e: e / total_weight, expected)
    np.testing.assert_allclose(float(sums["weight"]), total_weight, rtol=1e-5)
    assert int(sums["tokens"]) == tokens
    assert_trees_close(grads, expected)


@given(data=st.data())
def test_every_sampled_token_carries_its_own_sampler_logprob(data, tokenizer, schema):
    group = draw_group(data, tokenizer, schema, 3)
    forest = group_forest(schema, group, [1.0, 2.0, 3.0], [10, 11, 12], "token_mean")
    for index, rollout in enumerate(group):
        mine = forest.rollout_id == 10 + index
        assert (forest.advantage[mine] == index + 1.0).all()
        recorded = np.concatenate([unit.logprobs for unit in rollout.units])
        np.testing.assert_allclose(
            np.sort(forest.sampler_logprob[mine]), np.sort(recorded), rtol=1e-6
        )
        pairs = {
            (int(t), float(lp))
            for unit in rollout.units
            for t, lp in zip(unit.completion, unit.logprobs, strict=True)
        }
        got = zip(forest.trie.tokens[mine], forest.sampler_logprob[mine], strict=True)
        assert {(int(t), float(lp)) for t, lp in got} == pairs
    assert (forest.rollout_id[forest.loss_weight == 0] == -1).all()
