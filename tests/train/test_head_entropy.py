"""Entropies beside log-probabilities, in chunks: value, gradient, and what they cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.test_scoring import CONFIG, DEF, PARAMS, ROW_LEN, ROWS, one_chain, packed
from tw_jax.models import graphdef, init_params
from tw_jax.train.lm_head import head_scores
from tw_jax.train.scoring import score_tokens

WIDTH, VOCAB = 12, 37


def inputs():
    rng = np.random.default_rng(0)
    head = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    hidden = 2 * rng.normal(size=(ROWS, ROW_LEN, WIDTH)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (ROWS, ROW_LEN), np.int32)
    weights = rng.normal(size=(2, ROWS, ROW_LEN)).astype(np.float32)
    return head, hidden, targets, weights


def by_definition(head, hidden, targets):
    every = jax.nn.log_softmax(hidden @ head)
    logprobs = jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0]
    return logprobs, -jnp.sum(jnp.exp(every) * every, axis=-1)


def value_and_slopes(scores, head, hidden, targets, weights):
    def total(head, hidden):
        logprobs, entropy = scores(head, hidden, targets)
        return jnp.sum(weights[0] * logprobs + weights[1] * entropy), (logprobs, entropy)

    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, values), slopes = run(head, hidden)
    return values, slopes


@pytest.mark.parametrize("head_chunk", [ROWS * ROW_LEN, 14])
def test_entropy_and_its_gradient(head_chunk):
    case = inputs()

    def scores(*arguments):
        return head_scores(*arguments, head_chunk, entropy_use="gradient")

    got, expected = (value_and_slopes(f, *case) for f in (scores, by_definition))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))


@pytest.mark.parametrize("head_chunk", [ROWS * ROW_LEN, 14])
def test_an_entropy_to_look_at_has_no_gradient(head_chunk):
    head, hidden, targets, weights = inputs()

    def slopes(use, weights):
        def scores(*arguments):
            return head_scores(*arguments, head_chunk, entropy_use=use)

        return value_and_slopes(scores, head, hidden, targets, weights)

    looked_at, both = slopes("value", weights)
    _, logprobs_only = slopes("gradient", weights * np.array([1, 0], np.float32)[:, None, None])
    np.testing.assert_allclose(looked_at[1], by_definition(head, hidden, targets)[1], rtol=1e-5)
    for a, b in zip(both, logprobs_only, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_extreme_logits_stay_finite():
    head, hidden, targets, weights = inputs()

    def scores(*arguments):
        return head_scores(*arguments, 99, entropy_use="gradient")

    values, slopes = value_and_slopes(scores, 1e4 * head, hidden, targets, weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((values, slopes)))
    np.testing.assert_allclose(values[1], 0, atol=1e-3)


def test_entropies_of_scored_tokens_are_asked_for():
    batch = packed(one_chain(ROW_LEN))

    def score(use):
        def run(batch):
            return score_tokens(DEF, PARAMS, batch, head_chunk=14, remat="none", entropy_use=use)

        return jax.jit(run)(batch)

    assert score("none").entropy is None
    scores = score("value")
    assert scores.entropy.shape == scores.logprobs.shape
    assert (scores.entropy[:, 0] == 0).all() and (scores.entropy[:, 1:] > 0).all()
    np.testing.assert_array_equal(scores.logprobs, score("none").logprobs)


def test_what_is_not_asked_for_is_not_worked_out():
    """The number of exponentials in the program tells: one for logsumexp, one more for entropy."""
    head, hidden, targets, _ = inputs()

    def exponentials(use):
        def scores(head, hidden):
            return head_scores(head, hidden, targets, 14, entropy_use=use).logprobs.sum()

        return str(jax.make_jaxpr(scores)(head, hidden)).count(" exp ")

    assert exponentials("none") == 1
    assert exponentials("value") > 1


def test_no_array_of_tokens_by_vocabulary_exists():
    config = dataclasses.replace(CONFIG, vocab_size=20_000, num_hidden_layers=1)
    batch = packed(one_chain(256))

    def total(params):
        scores = score_tokens(
            graphdef(config), params, batch, head_chunk=16, remat="none", entropy_use="gradient"
        )
        return scores.logprobs.sum() + scores.entropy.sum()

    params = jax.eval_shape(lambda: init_params(config, 0))
    compiled = jax.jit(jax.grad(total)).lower(params).compile()
    all_logits = batch.tokens.size * config.vocab_size * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.7 * all_logits
