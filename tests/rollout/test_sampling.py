import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tw_jax.rollout.sampling import keep_likely, sample_tokens, token_noise, unit_number

ROWS, VOCAB = 4, 11
KEEP_LIKELY = jax.jit(keep_likely)


def sorted_oracle(logits, top_k, top_p):
    """Top-k, then top-p over what is left, by sorting."""
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    probability = np.exp(logits[order] - logits[order].max())
    probability /= probability.sum()
    before = np.cumsum(probability) - probability
    if top_p < 1:
        order = order[before < top_p]
    return set(order.tolist())


@settings(max_examples=60)
@given(
    st.integers(0, 2**31 - 1),
    st.lists(st.integers(0, VOCAB + 2), min_size=ROWS, max_size=ROWS),
    st.lists(st.sampled_from([0.05, 0.3, 0.55, 0.9, 1.0]), min_size=ROWS, max_size=ROWS),
)
def test_candidates_equal_those_of_sorting(seed, top_k, top_p):
    logits = np.random.default_rng(seed).normal(size=(ROWS, VOCAB)).astype(np.float32) * 2
    kept = np.asarray(KEEP_LIKELY(logits, jnp.array(top_k), jnp.array(top_p, jnp.float32)))
    for row in range(ROWS):
        expected = sorted_oracle(logits[row], top_k[row], top_p[row])
        assert set(np.flatnonzero(np.isfinite(kept[row])).tolist()) == expected
        assert (kept[row] == logits[row])[list(expected)].all()


def test_ties_are_kept_together():
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0, -jnp.inf]])
    kept = keep_likely(logits, jnp.array([1]), jnp.array([1.0]))
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
        jnp.full(draws, temperature),
        zeros,
        jnp.ones(draws),
        jnp.ones(draws, bool),
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
        jnp.full(2, temperature),
        jnp.zeros(2, jnp.int32),
        jnp.ones(2),
        jnp.ones(2, bool),
    )
    assert token.tolist() == [1, 0], "the first of equals"
