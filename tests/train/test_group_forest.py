"""The forest update equals the update with one row per model call, in value and gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.update import as_rollout
from tests.native_oracle import positions_and_steps, visible_pairs
from tests.random_trajectories import random_trajectories
from tests.test_laws import GRAPHDEF, PARAMS, assert_trees_close
from tw_jax.data.packing import best_fit_rows, pack_rows
from tw_jax.train.group_forest import group_forest
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.objective_presets import PRESETS
from tw_jax.train.policy_sum import policy_sum
from tw_jax.train.rl_metrics import merge_sums
from tw_jax.train.token_regions import NO_REGION, TokenRegion
from tw_jax.train.update import MemoryConfig

PROMPT = np.array([2, 15, 16, 94], np.int32)
ROW_LEN, LONGEST = 768, 256
CALLS = 7  # at most, of one rollout with two blocks of two threads


def draw_group(data, tokenizer, schema, size):
    """Rollouts that share a prompt; some threads closed by the engine."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    group = []
    for _ in range(size):
        drawn = data.draw(random_trajectories(tokenizer, schema, max_blocks=2, max_threads=2))
        shift = len(PROMPT) - drawn.prompt_len
        group.append(as_rollout(schema, _shifted(drawn, shift), rng))
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


def one_row_per_call(tokenizer, schema, unit):
    """A unit's context and completion in a row of its own: ids, positions, mask, completion."""
    ids = np.concatenate([unit.context, unit.completion])
    positions, visible = np.arange(len(ids)), np.tri(len(ids), dtype=bool)
    if schema.name == "native":
        pieces = [tokenizer.convert_ids_to_tokens(int(token)) for token in ids]
        positions, blocks, steps = positions_and_steps(pieces)
        visible = visible_pairs(blocks, steps)
    mask = np.eye(LONGEST, dtype=bool)
    mask[: len(ids), : len(ids)] = visible
    completion = np.zeros(LONGEST, bool)
    completion[len(unit.context) : len(ids)] = True
    padding = (0, LONGEST - len(ids))
    return (
        np.pad(ids, padding).astype(np.int32),
        np.pad(positions, padding).astype(np.int32),
        mask,
        completion,
    )


@jax.jit
def call_scores(params, tokens, positions, mask):
    """Log-probability of every token of every call given the one before, and the entropy there."""
    model = nnx.merge(GRAPHDEF, params)

    def one_call(tokens, positions, mask):
        def attend(q, k, v, layer, carry):
            del layer
            k, v = (jnp.repeat(x, q.shape[-2] // x.shape[-2], axis=-2) for x in (k, v))
            scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
            weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
            return jnp.einsum("hqk,khd->qhd", weights, v), carry

        hidden, _ = model.hidden_states(tokens, positions, attend)
        every = jax.nn.log_softmax(model.logits(hidden[:-1]))
        picked = jnp.take_along_axis(every, tokens[1:, None], axis=-1)[:, 0]
        entropy = -jnp.sum(jnp.exp(every) * every, axis=-1)
        return jnp.pad(picked, (1, 0)), jnp.pad(entropy, (1, 0))

    return jax.vmap(one_call)(tokens, positions, mask)


def other_policies(recorded):
    """Log-probabilities of an old policy and of a reference, made up from the sampler's."""
    return recorded + 0.2 * jnp.sin(40 * recorded), recorded + 0.3 * jnp.cos(30 * recorded)


@functools.partial(jax.jit, static_argnames="objective")
@functools.partial(jax.grad, has_aux=True)
def call_gradient(params, calls, recorded, advantage, objective):
    """The objective's gradient as its paper writes it, over rows of single calls.

    Args:
      params: the model's.
      calls: ids, positions, masks and completions, `[calls, ...]`.
      recorded: `[calls, LONGEST]` the sampler's log-probabilities.
      advantage: `[rollouts]`.
      objective: static. `calls` come rollout by rollout, `CALLS` each, some of them empty.
    """
    tokens, positions, mask, completion = calls
    logprob, entropy = call_scores(params, tokens, positions, mask)
    old, reference = other_policies(recorded)
    if objective.ratio == "on_policy":
        old = jax.lax.stop_gradient(logprob)
    rollouts = len(advantage)
    logprob, entropy, old, reference, recorded, drawn = (
        x.reshape(rollouts, CALLS, LONGEST)
        for x in (logprob, entropy, old, reference, recorded, completion)
    )
    per_call = drawn.sum(2)
    per_rollout = per_call.sum(1)
    calls_of = (per_call > 0).sum(1)
    log_ratio = jnp.where(drawn, logprob - old, 0.0)
    if objective.ratio_level == "sequence":
        log_ratio = (log_ratio.sum((1, 2)) / per_rollout)[:, None, None]
    ratio, a = jnp.exp(log_ratio), advantage[:, None, None]
    gain = ratio * a
    if objective.ratio == "ppo_clip":
        low, high = 1 - objective.clip_low, 1 + objective.clip_high
        gain = jnp.minimum(gain, jnp.clip(ratio, low, high) * a)
        if objective.dual_clip is not None:
            gain = jnp.where(a < 0, jnp.maximum(gain, objective.dual_clip * a), gain)
    elif objective.ratio == "detached":
        gain = jax.lax.stop_gradient(ratio) * a * logprob
    if objective.importance_cap is not None:
        mismatch = jax.lax.stop_gradient(jnp.exp(old - recorded))
        gain = jnp.minimum(mismatch, objective.importance_cap) * gain
    apart = logprob - reference
    kl = {"k1": apart, "k2": apart**2 / 2, "k3": jnp.exp(-apart) - 1 + apart}[objective.kl_estimate]
    loss = -gain - objective.entropy_coefficient * entropy
    # A ratio of whole sequences leaves one number per rollout.
    loss, kl = (jnp.where(drawn, x, 0.0) for x in (jnp.broadcast_to(loss, drawn.shape), kl))
    if objective.aggregation == "token_mean":
        loss, kl = (x.sum() / drawn.sum() for x in (loss, kl))
    elif objective.aggregation == "sequence_mean":
        loss, kl = (jnp.mean(x.sum((1, 2)) / per_rollout) for x in (loss, kl))
    elif objective.aggregation == "token_sum":
        loss, kl = (jnp.mean(x.sum((1, 2))) / objective.token_budget for x in (loss, kl))
    else:
        means, kl_means = (x.sum(2) / jnp.maximum(per_call, 1) for x in (loss, kl))
        loss = jnp.sum(means / calls_of[:, None]) / calls_of.sum()
        kl = kl_means.sum() / calls_of.sum()
    total = loss + objective.kl_coefficient * kl
    return total, (total, drawn.sum())


@functools.partial(jax.jit, static_argnames="objective")
def forest_gradient(params, batch, objective):
    loss = policy_sum(GRAPHDEF, objective, MemoryConfig(), rollouts=4, measure_entropy=True)
    return jax.grad(loss, has_aux=True)(params, batch)


EVERYTHING = ObjectiveConfig(
    normalizer="group_std",
    ratio="ppo_clip",
    dual_clip=1.1,
    aggregation="sequence_mean",
    kl_coefficient=0.3,
    kl_estimate="k2",
    entropy_coefficient=0.2,
    importance_cap=1.05,
)
OBJECTIVES = PRESETS | {
    "everything": EVERYTHING,
    "detached": ObjectiveConfig(ratio="detached", kl_coefficient=0.3, kl_estimate="k1"),
}
FAST = ("pgrpo", "gspo")


def check_against_one_row_per_call(data, languages, objective):
    language = data.draw(st.sampled_from(["threadweaver", "native", "apr"]))
    tokenizer, schema = languages[language]
    group = [draw_group(data, tokenizer, schema, 2) for _ in range(2)]
    drawn = [rollout for rollouts in group for rollout in rollouts]
    advantages = np.array([0.7, -0.3, -1.1, 0.4], np.float32)

    rows, places = [], []
    empty = (np.zeros(LONGEST, np.int32),) * 2 + (np.eye(LONGEST, dtype=bool),)
    for index, rollout in enumerate(drawn):
        units = schema.units(rollout.trajectory)
        assert len(units) <= CALLS
        places += [(index, number, len(unit.context)) for number, unit in enumerate(units)]
        rows += [one_row_per_call(tokenizer, schema, unit) for unit in units]
        rows += [(*empty, np.zeros(LONGEST, bool))] * (CALLS - len(units))
    calls = tuple(np.stack(column) for column in zip(*rows, strict=True))
    # The sampler's log-probabilities are near the policy's, so that no ratio is extreme.
    noise = np.random.default_rng(0).normal(0, 0.2, calls[0].shape)
    recorded = np.asarray(call_scores(PARAMS, *calls[:3])[0] + noise, np.float32)
    units_of = [list(rollout.units) for rollout in drawn]
    for index, number, start in places:
        unit = units_of[index][number]
        logprobs = recorded[index * CALLS + number, start : start + len(unit.completion)]
        units_of[index][number] = dataclasses.replace(unit, logprobs=logprobs)
    drawn = [
        dataclasses.replace(rollout, units=tuple(units))
        for rollout, units in zip(drawn, units_of, strict=True)
    ]
    expected, (loss, tokens) = call_gradient(PARAMS, calls, recorded, advantages, objective)

    # Groups whole or apart, in any order, in one or two rows of one to four micro-batches.
    split = [data.draw(st.booleans()) for _ in range(2)]
    members = [
        m for g in range(2) for m in ([[2 * g], [2 * g + 1]] if split[g] else [[2 * g, 2 * g + 1]])
    ]
    forests = [
        group_forest(
            schema, [drawn[i] for i in ids], [float(advantages[i]) for i in ids], ids, objective
        )
        for ids in data.draw(st.permutations(members))
    ]
    packed = best_fit_rows([len(f.trie) for f in forests], ROW_LEN)
    if data.draw(st.booleans()):
        packed = [[i] for i in range(len(forests))]
    packed += [[]] * (-len(packed) % 2)
    summed, grads = {}, jax.tree.map(jnp.zeros_like, PARAMS)
    for first in range(0, len(packed), 2):
        batch = pack_rows(
            [[forests[i] for i in row] for row in packed[first : first + 2]], ROW_LEN, policy=True
        )
        old, reference = other_policies(batch.sampler_logprob)
        batch = dataclasses.replace(batch, old_logprob=old, reference_logprob=reference)
        more, sums = forest_gradient(PARAMS, batch, objective)
        grads = jax.tree.map(jnp.add, grads, more)
        summed = merge_sums(summed, sums)
    assert summed["tokens"] == tokens
    assert summed["loss"] / summed["weight"] == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
    assert_trees_close(jax.tree.map(lambda g: g / summed["weight"], grads), expected)


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=2)
@given(data=st.data())
def test_forest_update_equals_one_row_per_call(data, languages, name):
    check_against_one_row_per_call(data, languages, OBJECTIVES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=10)
@given(data=st.data())
def test_every_objectives_forest_update_equals_one_row_per_call(data, languages, name):
    check_against_one_row_per_call(data, languages, OBJECTIVES[name])


@given(data=st.data())
def test_every_sampled_token_carries_what_belongs_to_it(data, languages):
    tokenizer, schema = languages[data.draw(st.sampled_from(["threadweaver", "native", "apr"]))]
    group = draw_group(data, tokenizer, schema, 3)
    forest = group_forest(schema, group, [1.0, 2.0, 3.0], [10, 11, 12], ObjectiveConfig())
    policy = forest.policy
    for index, rollout in enumerate(group):
        mine = policy.rollout_id == 10 + index
        assert (policy.advantage[mine] == index + 1.0).all()
        pairs = sorted(
            (int(t), float(lp))
            for unit in rollout.units
            for t, lp in zip(unit.completion, unit.logprobs, strict=True)
        )
        got = zip(forest.trie.tokens[mine].tolist(), policy.sampler_logprob[mine], strict=True)
        assert sorted((t, float(lp)) for t, lp in got) == pairs
        # Regions: tags are tags; of the rest, threads are what threads sampled.
        tag = np.isin(forest.trie.tokens, schema.tag_ids)
        assert ((policy.region == TokenRegion.TAGS)[mine] == tag[mine]).all()
        threads = [u.completion for u in rollout.units if u.kind == "thread"]
        in_threads = sum(int((~np.isin(c, schema.tag_ids)).sum()) for c in threads)
        assert ((policy.region == TokenRegion.THREAD) & mine).sum() == in_threads
        outlines = [
            rollout.trajectory.tokens[block.start : block.outlines_end]
            for block in rollout.trajectory.blocks
        ]
        in_outlines = sum(int((~np.isin(o, schema.tag_ids)).sum()) for o in outlines)
        assert ((policy.region == TokenRegion.OUTLINE) & mine).sum() == in_outlines
    without_loss = forest.loss_weight == 0
    assert (policy.rollout_id[without_loss] == -1).all()
    assert (policy.region[without_loss] == NO_REGION).all()
    assert (policy.region[~without_loss] >= 0).all()
