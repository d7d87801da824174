"""Paged attention in XLA against its definition, and what its bits do not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.paged_oracle import (
    DIM,
    GROUP,
    KV_HEADS,
    LAYER,
    Rows,
    dense,
    lay_out,
    random_queries,
    random_rows,
)
from tw_jax.kernels import tree_attention
from tw_jax.kernels.page_pool import PagedShape, empty_pool, write_tokens
from tw_jax.kernels.paged_attention import best_paged_backend, paged_attention

ROWS, RUN, CONTEXT = 4, 8, 160
PAGE_SIZES = (4, 16, 128)


@jax.jit
def attend(q, pool, kv_lens, page_indices, q_lens=None):
    """`q` and the result are `[rows, run, heads, dim]`."""
    flat = q.reshape(-1, *q.shape[2:])
    out = paged_attention(flat, pool, LAYER, kv_lens, page_indices, q_lens, backend="xla")
    return out.reshape(q.shape)


@st.composite
def page_tables(draw):
    """A page size, and lengths and shared pages of `ROWS` rows, corners among them."""
    page_size = draw(st.sampled_from(PAGE_SIZES))
    corners = st.sampled_from([0, 1, page_size - 1, page_size, 64, 128, CONTEXT])
    lens = st.lists(st.one_of(corners, st.integers(0, CONTEXT)), min_size=ROWS, max_size=ROWS)
    shared = st.lists(st.integers(0, CONTEXT // page_size), min_size=ROWS, max_size=ROWS)
    return page_size, draw(lens), draw(shared)


def pages_per_row(page_size):
    return -(-CONTEXT // page_size) + 1


@settings(max_examples=40, deadline=None)
@given(page_tables(), st.integers(0, 1000))
def test_decode(table, seed):
    page_size, kv_lens, shared = table
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, kv_lens, page_size, shared)
    pool, page_indices = lay_out(rng, rows, page_size, pages_per_row(page_size))
    q = random_queries(rng, ROWS, 1)
    out = attend(q, pool, rows.kv_lens, page_indices)
    np.testing.assert_allclose(out, dense(q, rows, np.minimum(kv_lens, 1)), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(page_tables(), st.lists(st.integers(0, RUN), min_size=ROWS, max_size=ROWS), st.integers(0))
def test_prefill(table, q_lens, seed):
    page_size, kv_lens, shared = table
    q_lens = np.minimum(q_lens, kv_lens).astype(np.int32)
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, kv_lens, page_size, shared)
    pool, page_indices = lay_out(rng, rows, page_size, pages_per_row(page_size))
    q = random_queries(rng, ROWS, RUN)
    out = attend(q, pool, rows.kv_lens, page_indices, q_lens)
    np.testing.assert_allclose(out, dense(q, rows, q_lens), atol=1e-5)


@pytest.mark.parametrize("run", [1, RUN])
def test_bfloat16(run):
    rng = np.random.default_rng(0)
    rows = random_rows(rng, [160, 0, 7, 64], 16)
    pool, page_indices = lay_out(rng, rows, 16, 11, jnp.bfloat16)
    q = jnp.array(random_queries(rng, ROWS, run), jnp.bfloat16)
    out = attend(q, pool, rows.kv_lens, page_indices)
    assert out.dtype == jnp.bfloat16
    rounded = Rows(
        *([np.array(jnp.bfloat16(x), np.float32) for x in xs] for xs in (rows.k, rows.v)),
        rows.shared,
    )
    expected = dense(q, rounded, np.minimum(rows.kv_lens, run))
    np.testing.assert_allclose(np.array(out, np.float32), expected, atol=2e-2)


@pytest.mark.parametrize("run", [1, RUN])
def test_bits_depend_on_the_row_alone(run):
    """Not on its pages and their size, its slot, its batch mates, or how long those are."""
    rng = np.random.default_rng(0)
    kv_lens = [100, 33, 0, 64]
    rows = random_rows(rng, kv_lens, 16)
    q = random_queries(rng, ROWS, run)

    def run_with(rows, q, page_size, extra=0):
        pool, page_indices = lay_out(rng, rows, page_size, pages_per_row(page_size) + extra)
        return np.asarray(attend(q, pool, rows.kv_lens, page_indices))

    first = run_with(rows, q, 16)
    assert np.isfinite(first).all()
    for page_size in (16, *PAGE_SIZES, 64):
        np.testing.assert_array_equal(run_with(rows, q, page_size), first)
    np.testing.assert_array_equal(run_with(rows, q, 16, extra=9), first)

    order = [3, 0, 2, 1]
    permuted = Rows([rows.k[i] for i in order], [rows.v[i] for i in order], rows.shared)
    np.testing.assert_array_equal(run_with(permuted, q[order], 16), first[order])

    for mates in ([33, 0, 0, 0], [33, 160, 160, 160], [33, 1, 64, 17]):
        others = random_rows(rng, mates, 16)
        others = Rows([rows.k[1], *others.k[1:]], [rows.v[1], *others.v[1:]], others.shared)
        other_q = np.concatenate([q[1:2], random_queries(rng, ROWS - 1, run)])
        np.testing.assert_array_equal(run_with(others, other_q, 16)[0], first[1])


def test_rows_at_rest_return_zeros():
    rng = np.random.default_rng(0)
    rows = random_rows(rng, [0] * ROWS, 16)
    pool, page_indices = lay_out(rng, rows, 16, 11)
    out = attend(random_queries(rng, ROWS, 1), pool, rows.kv_lens, page_indices)
    np.testing.assert_array_equal(out, 0)


def test_layer_may_be_traced():
    rng = np.random.default_rng(0)
    rows = random_rows(rng, [100, 33, 0, 64], 16)
    pool, page_indices = lay_out(rng, rows, 16, 11)
    q = random_queries(rng, ROWS, 1)
    static = attend(q, pool, rows.kv_lens, page_indices)
    by_layer = jax.jit(functools.partial(paged_attention, backend="xla"))
    traced = by_layer(q[:, 0], pool, jnp.int32(LAYER), rows.kv_lens, page_indices)
    np.testing.assert_array_equal(traced, static[:, 0])


def test_prefill_then_decode_equals_causal_attention():
    """One row, fed in chunks and then token by token beside a row at rest."""
    length, page_size = 75, 16
    rng = np.random.default_rng(0)
    q = jnp.array(random_queries(rng, 1, length))
    k, v = (jnp.array(random_queries(rng, 1, length, KV_HEADS)) for _ in range(2))
    expected = tree_attention(q, k, v, jnp.full((1, length), length, jnp.int32), backend="xla")
    pool = empty_pool(2, 9, page_size, KV_HEADS, DIM, jnp.float32)
    page_indices = jnp.array([[0] * 6, [7, 2, 5, 8, 1, 3]])

    @functools.partial(jax.jit, static_argnames="run")
    def feed(pool, done, size, run):
        position = done + jnp.arange(run)
        valid = jnp.arange(run) < size
        page = page_indices[1, position // page_size]
        fed = (jnp.pad(x[0], ((0, run), (0, 0), (0, 0)))[position] for x in (k, v))
        pool = write_tokens(pool, LAYER, page, position % page_size, valid, *fed)
        queries = jnp.pad(q[0], ((0, run), (0, 0), (0, 0)))[position]
        q_lens = jnp.stack([0, size])
        out = paged_attention(
            jnp.concatenate([jnp.ones_like(queries), queries]),
            pool,
            LAYER,
            jnp.stack([0, done + size]),
            page_indices,
            q_lens,
            backend="xla",
        )
        return pool, out[run:]

    out, done = [], 0
    for size, run in [(32, 32), (32, 32), (5, 32), *[(1, 1)] * 6]:
        pool, attended = feed(pool, jnp.int32(done), jnp.int32(size), run)
        out.append(attended[:size])
        done += size
    np.testing.assert_allclose(np.concatenate(out), expected[0], atol=1e-5)


def shape_with(**changed):
    fields = dict(
        rows=64,
        run=1,
        heads=32,
        kv_heads=8,
        head_dim=128,
        page_size=16,
        pages_per_row=256,
        dtype=jnp.dtype(jnp.bfloat16),
    )
    return PagedShape(**{**fields, **changed})


@pytest.mark.parametrize(
    ("platform", "changed", "name", "why"),
    [
        ("cpu", {}, "xla", "no kernel for the platform cpu"),
        ("rocm", {}, "xla", "no kernel for the platform rocm"),
        ("tpu", {}, "tpu", "supports this shape"),
        ("tpu", {"head_dim": 64}, "xla", "head_dim is 64"),
        ("tpu", {"kv_heads": 3, "heads": 6}, "xla", "3 key heads"),
        ("tpu", {"dtype": jnp.dtype(jnp.float16)}, "xla", "pages of float16"),
        ("tpu", {"rows": 128, "pages_per_row": 2560}, "xla", "choose larger pages"),
        ("tpu", {"page_size": 512}, "xla", "at most 256"),
        ("cuda", {}, "gpu", "supports this shape"),
        ("cuda", {"head_dim": 80}, "xla", "head_dim is 80"),
        ("cuda", {"dtype": jnp.dtype(jnp.int8)}, "xla", "pages of int8"),
    ],
)
def test_choice_of_backend(platform, changed, name, why):
    found, reason = best_paged_backend(shape_with(**changed), platform)
    assert found == name and why in reason


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"backend": "cuda"}, "no paged attention 'cuda': choose one of xla, tpu, gpu"),
        ({"backend": "tpu"}, "'tpu' cannot run this: head_dim is 16"),
        ({"q": (5, 4, DIM)}, "5 queries are no whole number for each of 2 rows"),
        ({"q": (2, 3, DIM)}, "3 query heads do not group over 2 key heads"),
        ({"q": (2, 4, 8)}, "queries are 8 wide, keys 16"),
    ],
)
def test_refuses_what_cannot_be(changed, message):
    pool = empty_pool(1, 3, 4, KV_HEADS, DIM, jnp.float32)
    q = jnp.zeros(changed.pop("q", (2, KV_HEADS * GROUP, DIM)))
    with pytest.raises(ValueError, match=message):
        paged_attention(q, pool, 0, jnp.ones(2, int), jnp.zeros((2, 2), int), **changed)
