import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.forests import Forest, random_forests, random_hidden
from tests.kernels.dense_oracle import dense_attention
from tw_jax.data.packed_batch import PackedBatch
from tw_jax.models import graphdef, init_params, preset
from tw_jax.models.remat import Remat
from tw_jax.train.scoring import token_logprobs

ROWS, ROW_LEN = 2, 30
CONFIG = preset(
    "tiny",
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.3,
)
DEF, PARAMS = graphdef(CONFIG), init_params(CONFIG, 0)


def packed(forest: Forest, hidden=None, seed: int = 0) -> PackedBatch:
    """A batch over a forest with random tokens and loss weights.

    Without hidden intervals it holds empty ones, so that all tests share their compilations.
    """
    rng = np.random.default_rng(seed)
    shape = forest.parent.shape
    start, end = hidden or np.zeros((2, 2, *shape), np.int32)
    return PackedBatch(
        tokens=rng.integers(0, CONFIG.vocab_size, shape, dtype=np.int32),
        positions=forest.depth,
        parent=forest.parent,
        visible_end=forest.visible_end,
        hidden_start=start,
        hidden_end=end,
        loss_weight=rng.random(shape, dtype=np.float32),
    )


def scored(head_chunk: int, remat: Remat = "none"):
    """Jitted: log-probabilities and the gradient of their weighted sum."""

    @jax.jit
    def run(params, batch):
        def total(params):
            logprobs = token_logprobs(DEF, params, batch, head_chunk=head_chunk, remat=remat)
            return (batch.loss_weight * logprobs).sum(), logprobs

        (_, logprobs), gradient = jax.value_and_grad(total, has_aux=True)(params)
        return logprobs, gradient

    return run


def causal(q, k, v, layer, carry):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), carry


@jax.jit
def path_by_path(params, paths, tokens, lengths, weights):
    """The definition: each token scored by a plain causal forward over its own path.

    Args:
      params: the parameters.
      paths: `[tokens, longest]` token ids from the root, padded behind.
      tokens: `[tokens]` the scored token.
      lengths: `[tokens]` tokens before it on its path; 0 for roots.
      weights: `[tokens]` loss weights.

    Returns:
      Log-probabilities and the gradient of their weighted sum.
    """

    def total(params):
        model = nnx.merge(DEF, params)
        positions = jnp.broadcast_to(jnp.arange(paths.shape[1]), paths.shape)
        hidden, _ = model.hidden_states(paths, positions, causal)
        last = hidden[jnp.arange(len(paths)), jnp.maximum(lengths - 1, 0)]
        logprobs = jax.nn.log_softmax(model.logits(last))[jnp.arange(len(paths)), tokens]
        logprobs = jnp.where(lengths > 0, logprobs, 0.0)
        return (weights * logprobs).sum(), logprobs

    (_, logprobs), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return logprobs, gradient


@jax.jit
def dense_scores(params, batch):
    """Log-probabilities through the dense mask and full logits."""
    model = nnx.merge(DEF, params)
    hidden = (batch.hidden_start, batch.hidden_end)

    def attend(q, k, v, layer, carry):
        return dense_attention(q, k, v, batch.visible_end, hidden), carry

    states, _ = model.hidden_states(batch.tokens, batch.positions, attend)
    every = jax.nn.log_softmax(model.logits(states))
    at_parent = jnp.take_along_axis(every, batch.parent[..., None], axis=1)
    logprobs = jnp.take_along_axis(at_parent, batch.tokens[..., None], axis=-1)[..., 0]
    return jnp.where(batch.parent == jnp.arange(ROW_LEN), 0.0, logprobs)


def close(actual, expected, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1.0)


unchunked, in_chunks = scored(head_chunk=ROWS * ROW_LEN), scored(head_chunk=14, remat="full")


@settings(max_examples=10, deadline=None)
@given(random_forests(ROWS, ROW_LEN))
def test_every_token_is_scored_on_its_own_path(forest):
    batch = packed(forest)
    paths = np.zeros((ROWS, ROW_LEN, ROW_LEN), np.int32)
    lengths = np.zeros((ROWS, ROW_LEN), np.int32)
    for row in range(ROWS):
        for index in range(ROW_LEN):
            before = forest.path(row, index)[:-1]
            paths[row, index, : len(before)] = batch.tokens[row, before]
            lengths[row, index] = len(before)
    logprobs, gradient = path_by_path(
        PARAMS,
        paths.reshape(-1, ROW_LEN),
        batch.tokens.reshape(-1),
        lengths.reshape(-1),
        batch.loss_weight.reshape(-1),
    )
    close(unchunked(PARAMS, batch), (logprobs.reshape(ROWS, ROW_LEN), gradient))


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_hidden_intervals_match_the_dense_reference(data):
    forest = data.draw(random_forests(ROWS, ROW_LEN))
    batch = packed(forest, data.draw(random_hidden(forest, depth=2)))
    close(unchunked(PARAMS, batch)[0], dense_scores(PARAMS, batch))


@settings(max_examples=10, deadline=None)
@given(random_forests(ROWS, ROW_LEN))
def test_chunks_and_remat_change_nothing(forest):
    batch = packed(forest)
    close(in_chunks(PARAMS, batch), unchunked(PARAMS, batch))


def test_depth_zero_is_depth_two_with_empty_intervals():
    batch = packed(one_chain(ROW_LEN))
    no_depth = np.zeros((0, 1, ROW_LEN), np.int32)
    bare = dataclasses.replace(batch, hidden_start=no_depth, hidden_end=no_depth)
    score = jax.jit(lambda batch: token_logprobs(DEF, PARAMS, batch, head_chunk=99, remat="none"))
    close(score(bare), score(batch))


def one_chain(row_len: int) -> Forest:
    index = np.arange(row_len, dtype=np.int32)[None]
    return Forest(np.maximum(index - 1, 0), np.full_like(index, row_len), index)


def test_no_array_of_tokens_by_vocabulary_exists():
    """With a wide vocabulary, temporary memory stays below that of all logits."""
    config = dataclasses.replace(CONFIG, vocab_size=20_000, num_hidden_layers=1)
    batch = packed(one_chain(256))

    def total(params):
        return token_logprobs(graphdef(config), params, batch, head_chunk=16, remat="none").sum()

    params = jax.eval_shape(lambda: init_params(config, 0))
    compiled = jax.jit(jax.grad(total)).lower(params).compile()
    all_logits = batch.tokens.size * config.vocab_size * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.7 * all_logits


def test_a_chunk_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="head_chunk=0"):
        token_logprobs(DEF, PARAMS, packed(one_chain(8)), head_chunk=0, remat="none")
