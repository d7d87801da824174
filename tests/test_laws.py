"""The five laws of DESIGN section 4, on the real model.

The oracle is a plain causal forward of one unit's context and completion, with dense attention that
shares no code with the tree attention. The native schema, whose units are no plain causal
sequences, has its own laws 1 to 4 in test_laws_native.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_trajectories import random_trajectories
from tw_jax.data.packing import LossWeights, WeightedTrie, best_fit_rows, pack_rows
from tw_jax.models import qwen3
from tw_jax.models.config import PRESETS
from tw_jax.train.scoring import token_logprobs
from tw_jax.train.update import MemoryConfig, nll_sum
from tw_jax.trajectory.trie import TokenKind

# Wide initial values: attention that is nearly uniform would hide mask errors.
CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    head_dim=16,
    initializer_range=0.1,
)
GRAPHDEF = qwen3.graphdef(CONFIG)
PARAMS = qwen3.init_params(CONFIG, 7)
ROW_LEN, ROWS, LONGEST = 512, 2, 384
DEFAULT_WEIGHTS = LossWeights()
LIMITS = {"max_blocks": 2, "max_threads": 3}
SMALL = settings(max_examples=12)


@pytest.fixture(scope="session", params=["threadweaver", "apr"])
def language(request, languages):
    """(tokenizer, schema) of a schema whose visible sets are paths."""
    return languages[request.param]


@pytest.fixture(scope="session", params=["threadweaver", "native", "apr"])
def any_language(request, languages):
    """(tokenizer, schema) of any schema."""
    return languages[request.param]


def dense_causal(q, k, v, layer, carry):
    """Softmax attention written out in full; knows nothing of tries."""
    del layer
    k, v = (jnp.repeat(x, q.shape[-2] // x.shape[-2], axis=-2) for x in (k, v))
    scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    causal = np.tril(np.ones((q.shape[0], q.shape[0]), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, v), carry


@jax.jit
def plain_logprob(params, tokens, start, end):
    """Sum of log p(tokens[i] | tokens[:i]) over start <= i < end, one causal sequence."""
    model = nnx.merge(GRAPHDEF, params)
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    hidden, _ = model.hidden_states(tokens, positions, dense_causal)
    logprobs = jax.nn.log_softmax(model.logits(hidden[:-1]))
    picked = jnp.take_along_axis(logprobs, tokens[1:, None], axis=-1)[:, 0]
    index = jnp.arange(1, len(tokens))
    return jnp.sum(jnp.where((index >= start) & (index < end), picked, 0.0))


plain_grad = jax.jit(jax.value_and_grad(plain_logprob))


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def packed_logprob(params, batch, mask):
    logprobs = token_logprobs(GRAPHDEF, params, batch, head_chunk=4096, remat="none")
    return jnp.sum(jnp.where(mask, logprobs, 0.0)), logprobs


def unit_arrays(unit):
    tokens = np.zeros(LONGEST, np.int32)
    ids = np.concatenate([unit.context, unit.completion])
    tokens[: len(ids)] = ids
    return tokens, len(unit.context), len(ids)


def assert_trees_close(actual, expected, rtol=1e-5):
    """Elementwise, relative to the largest element of each leaf of the expected tree."""
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * scale)


def draw_tries(data, tokenizer, schema, count):
    trajectories = [
        data.draw(random_trajectories(tokenizer, schema, **LIMITS)) for _ in range(count)
    ]
    return trajectories, [schema.forest([trajectory]) for trajectory in trajectories]


def pack(tries, order, weights=DEFAULT_WEIGHTS, row_len=ROW_LEN, min_rows=ROWS):
    rows = best_fit_rows([len(tries[i]) for i in order], row_len)
    laid = [
        [WeightedTrie(tries[order[i]], weights.of(tries[order[i]])) for i in row] for row in rows
    ]
    return pack_rows(laid + [[]] * max(0, min_rows - len(laid)), row_len)


@SMALL
@given(data=st.data())
def test_laws_1_and_2_of_packed_rows(data, language):
    _, tries = draw_tries(data, *language, 4)
    batch = pack(tries, data.draw(st.permutations(range(4))))
    index = np.arange(batch.row_len)
    for parent, end in zip(batch.parent, batch.visible_end, strict=True):
        roots = parent == index
        assert (parent[~roots] < index[~roots]).all()
        assert (end > index).all() and (end <= batch.row_len).all()
        visible = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])
        path = np.zeros_like(visible)
        for i in index:
            path[i] = path[parent[i]] if parent[i] != i else False
            path[i, i] = True
        np.testing.assert_array_equal(visible, path)
        # Laminar: two intervals [j, end) are nested or disjoint.
        nested = end[None, :] <= end[:, None]
        starts_inside = (index[None, :] > index[:, None]) & (index[None, :] < end[:, None])
        assert nested[starts_inside].all()


@SMALL
@given(data=st.data())
def test_law_3_every_unit_scores_and_learns_as_if_alone(data, language):
    _, schema = language
    trajectories, tries = draw_tries(data, *language, 3)
    chosen = data.draw(st.integers(0, 2))
    units = schema.units(trajectories[chosen])
    unit = units[data.draw(st.integers(0, len(units) - 1))]
    batch = pack(tries, data.draw(st.permutations(range(3))))
    mask = np.zeros(batch.tokens.shape, bool)
    row, nodes = find_unit(batch, unit)
    mask[row, nodes] = True
    (packed, _), packed_grads = packed_logprob(PARAMS, batch, mask)
    alone, alone_grads = plain_grad(PARAMS, *unit_arrays(unit))
    np.testing.assert_allclose(packed, alone, rtol=1e-5, atol=1e-5)
    assert_trees_close(packed_grads, alone_grads)


def find_unit(batch, unit):
    """The row and the nodes of a unit's completion, found by walking parents only."""
    ids = np.concatenate([unit.context, unit.completion]).tolist()
    for row in range(len(batch.tokens)):
        paths = {}
        for i in range(batch.row_len):
            parent = int(batch.parent[row, i])
            prefix = () if parent == i else paths[parent]
            paths[i] = (*prefix, int(batch.tokens[row, i]))
            if list(paths[i]) == ids:
                nodes = []
                for _ in unit.completion:
                    nodes.append(i)
                    i = int(batch.parent[row, i])
                return row, nodes
    raise AssertionError("the unit lies on no path of the packed rows")


@SMALL
@given(data=st.data())
def test_law_4_only_visible_tokens_move_a_prediction(data, language):
    _, tries = draw_tries(data, *language, 3)
    batch = pack(tries, range(3))
    row = 0
    used = np.flatnonzero(batch.parent[row] != np.arange(ROW_LEN)).max() + 1
    query = data.draw(st.integers(0, int(used) - 1))
    changed = data.draw(st.integers(0, int(used) - 1))
    tokens = batch.tokens.copy()
    tokens[row, changed] = (tokens[row, changed] + 7) % 100 + 5
    visible = changed <= query < batch.visible_end[row, changed]
    before = hidden_states(PARAMS, batch)[row, query]
    after = hidden_states(PARAMS, dataclasses.replace(batch, tokens=tokens))[row, query]
    if visible:
        assert np.abs(before - after).max() > 1e-6
    else:
        np.testing.assert_array_equal(before, after)


@jax.jit
def hidden_states(params, batch):
    from tw_jax.kernels import tree_attention

    def attend(q, k, v, layer, carry):
        return tree_attention(q, k, v, batch.visible_end), carry

    return nnx.merge(GRAPHDEF, params).hidden_states(batch.tokens, batch.positions, attend)[0]


sum_and_grad = jax.jit(jax.value_and_grad(nll_sum(GRAPHDEF, MemoryConfig()), has_aux=True))


@SMALL
@given(data=st.data())
def test_law_5_packing_padding_and_micro_batches_change_nothing(data, any_language):
    _, tries = draw_tries(data, *any_language, 4)
    weights = LossWeights(joined=0.5)

    def loss_and_grads(batches):
        parts = [sum_and_grad(PARAMS, batch) for batch in batches]
        weight = sum(float(sums["weight"]) for (_, sums), _ in parts)
        loss = sum(float(total) for (total, _), _ in parts) / weight
        grads = jax.tree.map(lambda *g: sum(g) / weight, *[grads for _, grads in parts])
        return loss, grads

    together = loss_and_grads([pack(tries, range(4), weights)])
    order = data.draw(st.permutations(range(4)))
    cut = data.draw(st.integers(1, 3))
    apart = loss_and_grads(
        [pack(tries, order[:cut], weights, 768, 1), pack(tries, order[cut:], weights, 640, 3)]
    )
    np.testing.assert_allclose(together[0], apart[0], rtol=1e-5)
    assert_trees_close(together[1], apart[1])


def test_weights_follow_kinds(tokenizer, schema):
    weights = LossWeights(sampled=1.0, joined=0.25, forced=0.125)
    text = (
        "q<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>\n"
    )
    text += "<Thread>\n1: x\n</Thread><Thread>\n2: y\n</Thread>\n</Parallel>"
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)
    trie = schema.forest([schema.parse(ids, 1)])
    by_kind = {
        TokenKind.PROMPT: 0.0,
        TokenKind.SAMPLED: 1.0,
        TokenKind.JOINED: 0.25,
        TokenKind.FORCED: 0.125,
    }
    assert weights.of(trie).tolist() == [by_kind[TokenKind(kind)] for kind in trie.kind]
