"""Laws 1 to 4 of DESIGN section 4 for the native schema, on the real model.

The oracle is a forward of one unit's context and completion, with dense attention under the mask
and at the positions that `tests.native_oracle` reads from the unit's text.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tests.native_oracle import positions_and_steps, visible_pairs
from tests.random_trajectories import native_block, random_trajectories
from tests.test_laws import (
    GRAPHDEF,
    LIMITS,
    LONGEST,
    PARAMS,
    ROW_LEN,
    SMALL,
    assert_trees_close,
    packed_logprob,
)
from tw_jax.data.packing import LossWeights, WeightedTrie, pack_rows, row_starts
from tw_jax.kernels import tree_attention


@pytest.fixture(scope="session")
def language(languages):
    """(tokenizer, schema)."""
    return languages["native"]


def pieces_of(tokenizer, tokens):
    return [tokenizer.convert_ids_to_tokens(int(token)) for token in tokens]


@jax.jit
@functools.partial(jax.value_and_grad)
def masked_logprob(params, tokens, positions, mask, start, end):
    """Sum of log p(tokens[i] | what tokens[i - 1] sees) over start <= i < end."""

    def attend(q, k, v, layer, carry):
        del layer
        k, v = (jnp.repeat(x, q.shape[-2] // x.shape[-2], axis=-2) for x in (k, v))
        scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        return jnp.einsum("hqk,khd->qhd", weights, v), carry

    model = nnx.merge(GRAPHDEF, params)
    hidden, _ = model.hidden_states(tokens, positions, attend)
    logprobs = jax.nn.log_softmax(model.logits(hidden[:-1]))
    picked = jnp.take_along_axis(logprobs, tokens[1:, None], axis=-1)[:, 0]
    index = jnp.arange(1, len(tokens))
    return jnp.sum(jnp.where((index >= start) & (index < end), picked, 0.0))


def alone(tokenizer, unit):
    """Log-probability of a unit and its gradient, from the unit's own sequence."""
    ids = np.concatenate([unit.context, unit.completion])
    positions, blocks, steps = positions_and_steps(pieces_of(tokenizer, ids))
    mask = np.eye(LONGEST, dtype=bool)
    mask[: len(ids), : len(ids)] = visible_pairs(blocks, steps)
    padding = (0, LONGEST - len(ids))
    return masked_logprob(
        PARAMS,
        np.pad(ids, padding).astype(np.int32),
        np.pad(positions, padding).astype(np.int32),
        mask,
        len(unit.context),
        len(ids),
    )


def nodes_of(unit, trajectory, trie):
    """Places of a unit's completion in its trie, in order."""
    if unit.thread:
        before = [
            len(thread.replaced)
            for index, block in enumerate(trajectory.blocks)
            for ordinal, thread in enumerate(block.threads, start=1)
            if (index, ordinal) < (unit.block, unit.thread)
        ]
        thread = trajectory.blocks[unit.block].threads[unit.thread - 1]
        first = len(trajectory.tokens) + sum(before)
        sources = [*range(thread.body, thread.sampled_end)]
        sources += range(first, first + len(thread.replaced))
    else:
        start = trajectory.response_start
        if unit.block:
            start = trajectory.blocks[unit.block - 1].join_end
        sources = range(start, start + len(unit.completion))
    place = {int(source): i for i, source in enumerate(trie.source)}
    nodes = [place[source] for source in sources]
    assert trie.tokens[nodes].tolist() == unit.completion.tolist()
    return nodes


def pack(tries):
    """One row, tries in order, and where each begins."""
    weights = LossWeights()
    batch = pack_rows([[WeightedTrie(trie, weights.of(trie)) for trie in tries]], 2 * ROW_LEN)
    return batch, row_starts([len(trie) for trie in tries], 2 * ROW_LEN)


def packed_mask(batch):
    """Boolean [len, len] of the batch's only row."""
    index = np.arange(batch.row_len)
    query, key = index[:, None], index[None, :]
    mask = (key <= query) & (query < batch.visible_end[0][None, :])
    for start, end in zip(batch.hidden_start[:, 0], batch.hidden_end[:, 0], strict=True):
        mask &= ~((start[None, :] <= query) & (query < end[None, :]))
    return mask


@SMALL
@given(data=st.data())
def test_laws_1_and_2_visible_is_the_text_before_without_siblings(data, language):
    tokenizer, schema = language
    drawn = random_trajectories(tokenizer, schema, **LIMITS)
    trajectories = [data.draw(drawn) for _ in range(2)]
    tries = [schema.forest([trajectory]) for trajectory in trajectories]
    batch, starts = pack(tries)
    mask, parent, end = packed_mask(batch), batch.parent[0], batch.visible_end[0]
    index = np.arange(batch.row_len)
    assert (parent[parent != index] < index[parent != index]).all()
    inside = (index[None, :] > index[:, None]) & (index[None, :] < end[:, None])
    assert (end[None, :] <= end[:, None])[inside].all()
    for trajectory, trie, start in zip(trajectories, tries, starts, strict=False):
        n = len(trajectory.tokens)
        positions, blocks, steps = positions_and_steps(pieces_of(tokenizer, trajectory.tokens))
        rows = start + np.flatnonzero(trie.source < n)
        np.testing.assert_array_equal(batch.tokens[0][rows], trajectory.tokens)
        np.testing.assert_array_equal(batch.positions[0][rows], positions)
        np.testing.assert_array_equal(schema.positions(trajectory), positions)
        np.testing.assert_array_equal(mask[np.ix_(rows, rows)], visible_pairs(blocks, steps))
        own = np.zeros(batch.row_len, bool)
        own[start : start + len(trie)] = True
        assert not mask[np.ix_(own, ~own)].any() and not mask[np.ix_(~own, own)].any()
        leaves = start + np.flatnonzero(trie.source >= n)
        others = np.setdiff1d(index, leaves)
        assert not mask[np.ix_(others, leaves)].any(), "text sees a token that was replaced"


@SMALL
@given(data=st.data())
def test_law_3_every_unit_scores_and_learns_as_if_alone(data, language):
    tokenizer, schema = language
    drawn = random_trajectories(tokenizer, schema, **LIMITS)
    trajectories = [data.draw(drawn) for _ in range(2)]
    tries = [schema.forest([trajectory]) for trajectory in trajectories]
    batch, starts = pack(tries)
    chosen = data.draw(st.integers(0, 1))
    units = schema.units(trajectories[chosen])
    unit = units[data.draw(st.integers(0, len(units) - 1))]
    mask = np.zeros(batch.tokens.shape, bool)
    mask[0, starts[chosen] + np.array(nodes_of(unit, trajectories[chosen], tries[chosen]))] = True
    (packed, _), packed_grads = packed_logprob(PARAMS, batch, mask)
    expected, expected_grads = alone(tokenizer, unit)
    np.testing.assert_allclose(packed, expected, rtol=1e-5, atol=1e-5)
    assert_trees_close(packed_grads, expected_grads)


def test_law_3_holds_in_a_group_of_rollouts(language):
    tokenizer, schema = language
    texts = [
        "12=" + native_block((("a", "xyz"), ("b", "y"))) + "u",
        "12=abc",
        "12=" + native_block((("a", "x"),)),
    ]
    trajectories = [
        schema.parse(np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32), 3)
        for text in texts
    ]
    forest = schema.forest(trajectories)
    batch, _ = pack([forest])
    for rollout, trajectory in enumerate(trajectories):
        own = np.flatnonzero(forest.rollout == rollout)
        part = dataclasses.replace(forest, source=forest.source[own], tokens=forest.tokens[own])
        for unit in schema.units(trajectory):
            mask = np.zeros(batch.tokens.shape, bool)
            mask[0, own[nodes_of(unit, trajectory, part)]] = True
            (packed, _), _ = packed_logprob(PARAMS, batch, mask)
            np.testing.assert_allclose(packed, alone(tokenizer, unit)[0], rtol=1e-5, atol=1e-5)


@jax.jit
def hidden_states(params, batch):
    hidden = (batch.hidden_start, batch.hidden_end)

    def attend(q, k, v, layer, carry):
        return tree_attention(q, k, v, batch.visible_end, hidden), carry

    return nnx.merge(GRAPHDEF, params).hidden_states(batch.tokens, batch.positions, attend)[0]


@SMALL
@given(data=st.data())
def test_law_4_only_visible_tokens_move_a_prediction(data, language):
    tokenizer, schema = language
    trajectory = data.draw(random_trajectories(tokenizer, schema, **LIMITS))
    batch, _ = pack([schema.forest([trajectory])])
    n = len(trajectory.tokens)
    _, blocks, steps = positions_and_steps(pieces_of(tokenizer, trajectory.tokens))
    visible = visible_pairs(blocks, steps)
    place = np.flatnonzero(schema.forest([trajectory]).source < n)
    changed = data.draw(st.integers(0, n - 1))
    tokens = batch.tokens.copy()
    tokens[0, place[changed]] = (tokens[0, place[changed]] + 7) % 100 + 5
    before = hidden_states(PARAMS, batch)[0, place]
    after = hidden_states(PARAMS, dataclasses.replace(batch, tokens=tokens))[0, place]
    moved = np.abs(before - after).max(axis=-1)
    assert (moved[~visible[:, changed]] == 0).all()
    assert (moved[visible[:, changed]] > 1e-6).all()
