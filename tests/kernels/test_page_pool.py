"""Writes and copies of pages, and that a decoding loop does neither on a copy of the pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compiled_copies import compiled_copies
from tw_jax.kernels.page_pool import PagePool, copy_page, empty_pool, write_tokens
from tw_jax.kernels.paged_attention import paged_attention

LAYERS, PAGES, PAGE_SIZE, KV_HEADS, DIM = 3, 5, 4, 2, 8


def random_pool(seed=0):
    shape = (LAYERS * PAGES, PAGE_SIZE, 2 * KV_HEADS, DIM)
    return PagePool(jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32), LAYERS)


def random_tokens(*shape):
    rng = np.random.default_rng(1)
    return (jnp.array(rng.normal(size=(*shape, KV_HEADS, DIM)), jnp.float32) for _ in range(2))


def test_empty_pool():
    pool = empty_pool(LAYERS, PAGES, PAGE_SIZE, KV_HEADS, DIM, jnp.bfloat16)
    assert pool.pages.shape == (LAYERS * PAGES, PAGE_SIZE, 2 * KV_HEADS, DIM)
    assert (pool.pages_per_layer, pool.page_size, pool.kv_heads) == (PAGES, PAGE_SIZE, KV_HEADS)
    assert pool.pages.dtype == jnp.bfloat16 and not pool.pages.any()
    with pytest.raises(ValueError, match="page_size=6 is not a power of two"):
        empty_pool(LAYERS, PAGES, 6, KV_HEADS, DIM, jnp.float32)


def test_writes_keys_at_even_and_values_at_odd_heads():
    pool, (k, v) = random_pool(), random_tokens(2, 1)
    page, offset = jnp.array([[4], [0]]), jnp.array([[1], [3]])
    written = write_tokens(pool, 1, page, offset, jnp.ones((2, 1), bool), k, v)
    expected = np.array(pool.pages).reshape(LAYERS, PAGES, PAGE_SIZE, KV_HEADS, 2, DIM)
    for token, place in enumerate([(1, 4, 1), (1, 0, 3)]):
        expected[place][:, 0], expected[place][:, 1] = k[token, 0], v[token, 0]
    np.testing.assert_array_equal(written.pages, expected.reshape(pool.pages.shape))


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(
    ("page", "offset", "valid"),
    [(0, 0, False), (PAGES, 0, True), (-1, 0, True), (0, PAGE_SIZE, True), (0, -1, True)],
)
def test_writes_nothing_where_it_must_not(layer, page, offset, valid):
    """Above all not into the neighbouring layer."""
    pool, (k, v) = random_pool(), random_tokens(1)
    written = write_tokens(
        pool, layer, jnp.array([page]), jnp.array([offset]), jnp.array([valid]), k, v
    )
    np.testing.assert_array_equal(written.pages, pool.pages)


def test_copies_one_page_in_all_layers():
    pool = random_pool()
    copied = copy_page(pool, jnp.int32(2), jnp.int32(4))
    expected = np.array(pool.pages).reshape(LAYERS, PAGES, PAGE_SIZE, 2 * KV_HEADS, DIM)
    expected[:, 4] = expected[:, 2]
    np.testing.assert_array_equal(copied.pages, expected.reshape(pool.pages.shape))


def test_copies_several_pages_but_not_invalid_ones():
    pool = random_pool()
    source, target = jnp.array([0, 1, 2]), jnp.array([3, 4, PAGES])
    copied = copy_page(pool, source, target, jnp.array([False, True, True]))
    expected = np.array(pool.pages).reshape(LAYERS, PAGES, PAGE_SIZE, 2 * KV_HEADS, DIM)
    expected[:, 4] = expected[:, 1]
    np.testing.assert_array_equal(copied.pages, expected.reshape(pool.pages.shape))


def decode(pool, kv_lens, page_indices, q, steps):
    """A loop like the engine's: write, attend, layer by layer; then maybe a page is copied."""

    def step(index, state):
        pool, kv_lens, q = state
        place = kv_lens // PAGE_SIZE
        page = jnp.take_along_axis(page_indices, place[:, None], axis=1)[:, 0]
        for layer in range(LAYERS):
            k, v = q[:, :KV_HEADS], q[:, KV_HEADS:]
            valid = kv_lens >= 0
            pool = write_tokens(pool, layer, page, kv_lens % PAGE_SIZE, valid, k, v)
            q = paged_attention(q, pool, layer, kv_lens + 1, page_indices, backend="xla")
        # As in the engine, what was attended to decides: else XLA may copy before it reads.
        spawns = q.sum() > index
        pool = jax.lax.cond(spawns, lambda p: copy_page(p, page[0], page[1]), lambda p: p, pool)
        return pool, kv_lens + 1, q

    return jax.lax.fori_loop(0, steps, step, (pool, kv_lens, q))


def test_a_decoding_loop_makes_no_copy_of_the_pool():
    pages = 512
    pool = jax.eval_shape(lambda: empty_pool(LAYERS, pages, PAGE_SIZE, KV_HEADS, DIM, jnp.float32))
    rows = jax.ShapeDtypeStruct((2,), jnp.int32)
    table = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    q = jax.ShapeDtypeStruct((2, 2 * KV_HEADS, DIM), jnp.float32)
    compiled = jax.jit(decode, donate_argnums=0).lower(
        pool, rows, table, q, jax.ShapeDtypeStruct((), jnp.int32)
    )
    compiled = compiled.compile()
    text = compiled.as_text()
    shape = ",".join(map(str, pool.pages.shape))
    assert f"f32[{shape}]" in text
    assert pool.pages.shape not in compiled_copies(text)
    # Under another shape neither: all temporaries together are smaller than the pool.
    assert compiled.memory_analysis().temp_size_in_bytes < pool.pages.size * 4 / 2
