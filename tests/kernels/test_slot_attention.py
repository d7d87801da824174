"""Cached attention in one row or in chunks equals plain causal attention over the row's tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax.kernels.slot_attention import (
    attend_chunks,
    attend_rows,
    copy_slot,
    empty_cache,
    slot_layout,
    write_tokens,
)

ROWS, LAYERS, HEADS, KV_HEADS, DIM = 3, 2, 4, 2, 8


def dense(q, k, v, position):
    """One query over keys 0..position of one row, in NumPy."""
    q = np.asarray(q)
    k, v = (
        np.repeat(x[: position + 1], HEADS // KV_HEADS, axis=1) for x in map(np.asarray, (k, v))
    )
    scores = np.einsum("hd,khd->hk", q, k) / np.sqrt(DIM)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hk,khd->hd", weights / weights.sum(axis=-1, keepdims=True), v)


def filled(context_len, seed=0):
    """A cache whose rows hold random tokens in both layers, and those tokens."""
    layout = slot_layout(LAYERS, ROWS, context_len)
    rng = np.random.default_rng(seed)
    shape = (LAYERS, ROWS, context_len, KV_HEADS, DIM)
    k, v = (jnp.array(rng.normal(size=shape), jnp.float32) for _ in range(2))
    cache = empty_cache(layout, KV_HEADS, DIM, jnp.float32)
    rows, positions = np.mgrid[:ROWS, :context_len].astype(np.int32)
    for layer in range(LAYERS):
        valid = jnp.ones(rows.shape, bool)
        cache = write_tokens(cache, layer, rows, positions, valid, k[layer], v[layer])
    return layout, cache, k, v


@pytest.mark.parametrize("context_len", [10, 64, 150, 257])
def test_layout_holds_the_context(context_len):
    layout = slot_layout(LAYERS, ROWS, context_len)
    assert layout.blocks * layout.block_len >= context_len
    assert (layout.blocks - 1) * layout.block_len < context_len
    assert 1 <= layout.blocks <= 4


@pytest.mark.parametrize("context_len", [10, 150])
def test_one_query_per_row(context_len):
    layout, cache, k, v = filled(context_len)
    q = jnp.array(np.random.default_rng(1).normal(size=(ROWS, HEADS, DIM)), jnp.float32)
    positions = jnp.array([0, context_len // 2, context_len - 1])
    for layer in range(LAYERS):
        out = attend_rows(q, cache, layer, positions, layout.blocks)
        for row in range(ROWS):
            expected = dense(q[row], k[layer, row], v[layer, row], int(positions[row]))
            np.testing.assert_allclose(out[row], expected, atol=2e-6)


def test_fewer_blocks_are_enough_for_short_rows():
    layout, cache, _, _ = filled(150)
    q = jnp.array(np.random.default_rng(1).normal(size=(ROWS, HEADS, DIM)), jnp.float32)
    positions = jnp.array([0, 30, layout.block_len - 1])
    full = attend_rows(q, cache, 0, positions, layout.blocks)
    np.testing.assert_allclose(attend_rows(q, cache, 0, positions, 1), full, atol=1e-6)


def test_chunks():
    layout, cache, k, v = filled(150)
    rows, positions = jnp.array([2, 0]), jnp.array([[70, 71, 72, 73], [3, 4, 5, 6]])
    q = jnp.array(np.random.default_rng(2).normal(size=(2, 4, HEADS, DIM)), jnp.float32)
    out = attend_chunks(q, cache, 1, rows, positions, layout.blocks)
    for chunk in range(2):
        row = int(rows[chunk])
        for i in range(4):
            expected = dense(q[chunk, i], k[1, row], v[1, row], int(positions[chunk, i]))
            np.testing.assert_allclose(out[chunk, i], expected, atol=2e-6)


def test_invalid_tokens_and_positions_beyond_the_slot_are_not_written():
    _, cache, _, _ = filled(150)
    garbage = jnp.full((ROWS, KV_HEADS, DIM), jnp.nan)
    rows, positions = jnp.arange(ROWS), jnp.array([5, 149, 10_000])
    written = write_tokens(cache, 0, rows, positions, jnp.zeros(ROWS, bool), garbage, garbage)
    written = write_tokens(
        written, 0, rows[2:], positions[2:], jnp.ones(1, bool), garbage[2:], garbage[2:]
    )
    same = jax.tree.map(lambda a, b: bool((a == b).all()), cache, written)
    assert all(jax.tree.leaves(same))


def test_copies_one_row():
    _, cache, _, _ = filled(150)
    copied = copy_slot(cache, jnp.int32(2), jnp.int32(0))
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(copied), strict=True):
        assert (after[0] == before[2]).all()
        assert (after[1:] == before[1:]).all()
