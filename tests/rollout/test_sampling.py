import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rollout.host_oracle import changed_logits
from tw_jax.rollout.logit_changes import change_logits, wants_change
from tw_jax.rollout.request import SamplingParams
from tw_jax.rollout.sampling import keep_likely, sample_tokens, token_noise, unit_number
from tw_jax.rollout.sampling_table import sampling_table

ROWS, VOCAB = 4, 11
KEEP_LIKELY = jax.jit(keep_likely)


def table(*params, entries=3, vocab=VOCAB):
    return jax.tree.map(
        jnp.asarray, sampling_table(dict(enumerate(params)), len(params), vocab, entries)
    )


def no_context(rows):
    """Of rows that count no tokens."""
    nothing = jnp.zeros(rows, jnp.int32)
    return lambda: (nothing[:, None], nothing, nothing)


def sorted_oracle(logits, top_k, top_p, min_p):
    """Top-k, top-p over what is left, by sorting; then min-p."""
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    probability = np.exp(logits[order] - logits[order].max())
    probability /= probability.sum()
    before = np.cumsum(probability) - probability
    if top_p < 1:
        order = order[before < top_p]
    ratio = np.exp(logits[order] - logits.max())
    return set(order[ratio >= min_p].tolist())


@settings(max_examples=60)
@given(
    st.integers(0, 2**31 - 1),
    st.lists(st.integers(0, VOCAB + 2), min_size=ROWS, max_size=ROWS),
    st.lists(st.sampled_from([0.05, 0.3, 0.55, 0.9, 1.0]), min_size=ROWS, max_size=ROWS),
    st.lists(st.sampled_from([0.0, 0.02, 0.2, 0.7, 1.0]), min_size=ROWS, max_size=ROWS),
)
def test_candidates_equal_those_of_sorting(seed, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(size=(ROWS, VOCAB)).astype(np.float32) * 2
    asked = (jnp.array(top_k), jnp.array(top_p, jnp.float32), jnp.array(min_p, jnp.float32))
    kept = np.asarray(KEEP_LIKELY(logits, *asked))
    for row in range(ROWS):
        expected = sorted_oracle(logits[row], top_k[row], top_p[row], min_p[row])
        assert set(np.flatnonzero(np.isfinite(kept[row])).tolist()) == expected
        assert (kept[row] == logits[row])[list(expected)].all()


def test_ties_are_kept_together():
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0, -jnp.inf]])
    kept = keep_likely(logits, jnp.array([1]), jnp.array([1.0]), jnp.array([0.0]))
    assert np.isfinite(np.asarray(kept[0])).tolist() == [False, True, True, False, False]


def test_noise_depends_on_request_unit_and_position_only():
    keys = jnp.array([[0, 7], [0, 7], [0, 8], [0, 7]], jnp.uint32)
    units = jnp.array([unit_number(0, 1), unit_number(0, 1), unit_number(0, 1), unit_number(1, 0)])
    noise = token_noise(keys, units, jnp.array([5, 5, 5, 5]), VOCAB)
    assert (noise[0] == noise[1]).all()
    assert not (noise[0] == noise[2]).any()
    assert not (noise[0] == noise[3]).any()
    key = jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(7), 1), 5)
    assert (noise[0] == jax.random.gumbel(key, (VOCAB,))).all()


def test_draws_follow_the_distribution():
    """Chi-square over 20,000 draws; 99.99 % of a right sampler's runs pass."""
    draws, temperature = 20_000, 0.8
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5], np.float32)
    keys = jnp.stack([jnp.zeros(draws, jnp.uint32), jnp.arange(draws, dtype=jnp.uint32)], axis=1)
    zeros = jnp.zeros(draws, jnp.int32)
    token, logprob = sample_tokens(
        jnp.broadcast_to(jnp.array(logits), (draws, 5)),
        lambda: token_noise(keys, zeros, zeros, 5),
        table(SamplingParams(temperature=temperature), vocab=5).take(zeros),
        jnp.ones(draws, bool),
        no_context(draws),
    )
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum() * draws
    counts = np.bincount(np.asarray(token), minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 23.5  # 4 degrees of freedom
    log_softmax = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(logprob, log_softmax[np.asarray(token)], atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_cold_sampling_is_greedy(temperature):
    logits = jnp.array([[0.1, 2.0, 2.0, 1.0], [3.0, 0.0, 0.0, 0.0]])
    noise = jnp.zeros((2, 4))
    token, _ = sample_tokens(
        logits,
        lambda: noise,
        table(*[SamplingParams(temperature=temperature)] * 2, vocab=4),
        jnp.ones(2, bool),
        no_context(2),
    )
    assert token.tolist() == [1, 0], "the first of equals"


CONTEXT_LEN = 9
PARAMS = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.3, 4.0]),
    repetition_scope=st.sampled_from(["unit", "context"]),
    logit_bias=st.dictionaries(
        st.integers(0, VOCAB - 1), st.sampled_from([-math.inf, -3.5, 0.0, 2.25]), max_size=3
    ).map(lambda entries: tuple(entries.items())),
)


@jax.jit
def changed(logits, asked, tokens, start, end):
    return change_logits(logits, asked, lambda: (tokens, start, end)), wants_change(asked)


@settings(max_examples=60)
@given(st.integers(0, 2**31 - 1), st.lists(PARAMS, min_size=ROWS, max_size=ROWS))
def test_changed_logits_equal_those_of_plain_numpy(seed, params):
    """Row by row; a row that asks for nothing keeps its logits to the last bit."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(ROWS, VOCAB)).astype(np.float32) * 2
    tokens = rng.integers(0, VOCAB, (ROWS, CONTEXT_LEN))
    end = rng.integers(1, CONTEXT_LEN + 1, ROWS)
    start = np.array([rng.integers(0, e + 1) for e in end])
    ours, wants = map(np.asarray, changed(logits, table(*params), tokens, start, end))
    for row, asked in enumerate(params):
        context = tokens[row, : end[row]].tolist()
        expected = changed_logits(logits[row], asked, context, start[row])
        np.testing.assert_allclose(ours[row], expected, rtol=1e-6)
        asks = asked.repetition_penalty != 1 or any(bias for _, bias in asked.logit_bias)
        assert wants[row] == asks
        if not asks:
            assert (ours[row] == logits[row]).all()


def test_recorded_logprobs_are_those_of_the_raw_logits():
    logits = jnp.array([[0.1, 2.0, 1.5, 1.0]] * 2)
    params = SamplingParams(temperature=0.0, logit_bias=((1, -math.inf),))
    penalty = SamplingParams(temperature=0.0, repetition_penalty=3.0)
    tokens = jnp.array([[0, 0], [1, 2]])
    token, logprob = sample_tokens(
        logits,
        lambda: jnp.zeros((2, 4)),
        table(params, penalty, vocab=4),
        jnp.ones(2, bool),
        lambda: (tokens, jnp.array([0, 0]), jnp.array([2, 2])),
    )
    assert token.tolist() == [2, 3], "greedy knows bias and penalty"
    np.testing.assert_allclose(logprob, jax.nn.log_softmax(logits)[jnp.arange(2), token])


def test_no_room_for_biases_takes_no_memory():
    asked = table(SamplingParams(repetition_penalty=2.0), entries=0)
    assert asked.bias.size == asked.bias_ids.size == 0
    one = jnp.ones(1, jnp.int32)
    changed_, wants = changed(jnp.ones((1, VOCAB)), asked, jnp.array([[4, 5]]), 0 * one, one)
    assert wants.tolist() == [True]
    assert changed_[0].tolist() == [0.5 if token == 4 else 1.0 for token in range(VOCAB)]
