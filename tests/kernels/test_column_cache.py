"""Attention over pages in columns equals plain causal attention over each line's tokens.

Every page is first written full of NaN: what an earlier owner left, whose model had broken down.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax.kernels.column_attention import attend_chunks, attend_rows, plan_reads
from tw_jax.kernels.column_cache import (
    ColumnCache,
    cache_layout,
    copy_page,
    empty_cache,
    keep_pages,
    write_tokens,
)

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 8
PAGE, COLUMNS, ROWS, LINES = 8, 4, 5, 7
LENGTH = PAGE * COLUMNS
EXACT = 2e-6

write = jax.jit(write_tokens, static_argnums=1, static_argnames="few_columns")
rows_attend = jax.jit(attend_rows, static_argnums=2)
chunks_attend = jax.jit(attend_chunks, static_argnums=2)
plan_of = jax.jit(plan_reads, static_argnums=2, static_argnames="same_bits")


@dataclasses.dataclass
class Filled:
    """A cache and the tokens of its lines, `[layers, lines, length, kv_heads, dim]`.

    All lines are rows in it, until it is read: then those behind ROWS are kept prefixes.
    """

    cache: ColumnCache
    table: np.ndarray
    k: np.ndarray
    v: np.ndarray


def split(cache: ColumnCache) -> ColumnCache:
    """The lines behind the rows as kept prefixes."""

    def parts(layers, rows):
        return tuple(tuple(column[rows] for column in layer) for layer in layers)

    own, kept = slice(ROWS), slice(ROWS, None)
    return ColumnCache(
        keys=parts(cache.keys, own),
        values=parts(cache.values, own),
        kept_keys=parts(cache.keys, kept),
        kept_values=parts(cache.values, kept),
    )


def stale_cache(dtype=jnp.float32) -> ColumnCache:
    """Every place of every page written with tokens that are not finite."""
    layout = cache_layout(LAYERS, LINES, LENGTH, PAGE)
    cache = empty_cache(layout, KV_HEADS, DIM, dtype)
    lines, positions = np.mgrid[:LINES, :LENGTH].astype(np.int32)
    table = np.broadcast_to(lines[:, :1, None], (LINES, LENGTH, COLUMNS))
    bad = np.full((LINES, LENGTH, KV_HEADS, DIM), np.nan, np.float32)
    bad[::2] = np.inf
    for layer in range(LAYERS):
        cache = write(cache, layer, table, positions, np.ones(lines.shape, bool), bad, bad)
    return cache


def in_their_places() -> np.ndarray:
    """A page table in which every line reads the pages at its own index."""
    return np.tile(np.arange(LINES, dtype=np.int32)[:, None], (1, COLUMNS))


def random_table(rng, shared_pages: dict[int, tuple[int, int]]) -> np.ndarray:
    """Pages anywhere; `shared_pages`: line -> (line whose first pages it has, how many)."""
    table = np.stack([rng.permutation(LINES) for _ in range(COLUMNS)], axis=1).astype(np.int32)
    for line, (source, count) in shared_pages.items():
        table[line, :count] = table[source, :count]
    return table


def fill(table, lengths, seed=0, dtype=jnp.float32) -> Filled:
    """Writes `lengths` random tokens into the lines, over what was there; shared pages once."""
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, LAYERS, LINES, LENGTH, KV_HEADS, DIM)).astype(np.float32)
    owner = np.full((LINES, COLUMNS), -1)
    for line in range(LINES):
        for column in range(COLUMNS):
            first = int(np.flatnonzero(table[:, column] == table[line, column])[0])
            span = slice(column * PAGE, (column + 1) * PAGE)
            k[:, line, span], v[:, line, span] = k[:, first, span], v[:, first, span]
            owner[line, column] = first == line
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (LINES, 1))
    ends = np.array([*lengths, *[LENGTH] * (LINES - len(lengths))])
    valid = (positions < ends[:, None]) & (owner[:, positions[0] // PAGE] == 1)
    places = np.broadcast_to(table[:, None], (LINES, LENGTH, COLUMNS))
    cache = stale_cache(dtype)
    for layer in range(LAYERS):
        cache = write(cache, layer, places, positions, valid, k[layer], v[layer])
    return Filled(cache, table, k, v)


def dense(q, k, v, position: int) -> np.ndarray:
    """One query over positions 0..position of one line, in float64."""
    q = np.asarray(q, np.float64)
    k, v = (np.repeat(np.float64(x[: position + 1]), HEADS // KV_HEADS, axis=1) for x in (k, v))
    scores = np.einsum("hd,khd->hk", q, k) / np.sqrt(DIM)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hk,khd->hd", weights / weights.sum(axis=-1, keepdims=True), v)


def queries(seed=1, rows=ROWS, *inner) -> np.ndarray:
    shape = (rows, *inner, HEADS, DIM)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def attended(filled: Filled, lengths, q, layer=0, *, same_bits=False):
    """The last position of the rows that have a query, by the plan of all; resting ones too."""
    lengths = np.array(lengths, np.int32)
    plan = plan_of(filled.table[:ROWS], lengths, PAGE, same_bits=same_bits)
    table, positions = filled.table[: len(q)], np.maximum(lengths - 1, 0)[: len(q)]
    return np.asarray(rows_attend(q, split(filled.cache), layer, table, positions, plan))


def assert_rows(out, filled, lengths, q, layer=0, atol=EXACT):
    for row, length in enumerate(lengths):
        if length:
            expected = dense(q[row], filled.k[layer, row], filled.v[layer, row], length - 1)
            np.testing.assert_allclose(out[row], expected, atol=atol, err_msg=f"row {row}")


# Rows at rest, one token, and both sides of every page border.
ALL_LENGTHS = [
    [1, PAGE, PAGE + 1, LENGTH, LENGTH - 1],
    [0, 3, 0, 2 * PAGE, 2 * PAGE + 1],
    [PAGE - 1, 0, 0, 0, 0],
    [0, 0, 0, 0, 3 * PAGE],
    [PAGE, PAGE, PAGE, PAGE, PAGE],
]


@pytest.mark.parametrize("context_len", [1, 10, 64, 150, 257])
def test_layout_holds_the_context(context_len):
    layout = cache_layout(LAYERS, LINES, context_len, 16)
    assert (layout.columns - 1) * 16 < context_len <= layout.columns * 16


@pytest.mark.parametrize("lengths", ALL_LENGTHS)
@pytest.mark.parametrize("seed", range(3))
def test_one_query_per_row_wherever_its_pages_are(lengths, seed):
    rng = np.random.default_rng(seed)
    # Line 6 is a kept prefix.
    shared = {1: (0, 1), 3: (6, 2), 4: (3, 2)} if seed else {}
    # A page is shared only where both lines have filled it.
    for line, (source, count) in list(shared.items()):
        held = [*lengths, LENGTH, LENGTH]
        shared[line] = source, min(count, held[line] // PAGE, held[source] // PAGE)
    filled = fill(random_table(rng, shared), lengths, seed)
    q = queries(seed)
    for layer in range(LAYERS):
        assert_rows(attended(filled, lengths, q, layer), filled, lengths, q, layer)


@pytest.mark.parametrize("lengths", ALL_LENGTHS)
def test_both_ways_of_reading_agree(lengths):
    filled, q = fill(in_their_places(), lengths), queries()
    plan = plan_of(filled.table[:ROWS], np.array(lengths, np.int32), PAGE)
    assert bool(plan.in_place) and int(plan.enough) == -(-max(lengths) // PAGE) - 1
    for same_bits in (False, True):
        assert_rows(attended(filled, lengths, q, same_bits=same_bits), filled, lengths, q)


@pytest.mark.parametrize("count", range(1, ROWS))
@pytest.mark.parametrize("scattered", [False, True])
def test_the_first_rows_alone(count, scattered):
    """A part of the batch reads by the plan of all of it."""
    lengths = [9, 0, LENGTH, 5, 4]
    table = random_table(np.random.default_rng(count), {}) if scattered else in_their_places()
    # Mixed: the first column is read in place either way.
    table[:, 0] = np.arange(LINES)
    filled, q = fill(table, lengths), queries()[:count]
    assert_rows(attended(filled, lengths, q), filled, lengths[:count], q)


def test_how_columns_are_read():
    """Skipped behind the longest row, gathered only where a reading row's page lies elsewhere."""
    table = in_their_places()[:ROWS]
    table[1, 0] = 0
    table[2, 2] = 5  # behind the end of row 2, so it does not matter
    plan = plan_of(table, np.array([4, 3, PAGE, 2 * PAGE + 1, 0], np.int32), PAGE)
    assert plan.modes.tolist() == [2, 1, 1, 0]
    assert not plan.in_place


@pytest.mark.parametrize("row,length", [(0, 3), (2, PAGE), (4, LENGTH - 3)])
def test_same_bits_whatever_the_table_and_the_others(row, length):
    seen = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        table = random_table(rng, {}) if seed % 2 else in_their_places()
        lengths = rng.integers(0, LENGTH + 1, size=ROWS)
        lengths[row] = length
        if seed == 4:
            lengths[np.arange(ROWS) != row] = 0
        filled = fill(table, lengths, seed)
        # The same tokens in this row; everything else differs.
        filled.k[:, row], filled.v[:, row] = np.random.default_rng(99).normal(
            size=(2, LAYERS, LENGTH, KV_HEADS, DIM)
        )
        positions = np.arange(LENGTH, dtype=np.int32)
        places = np.broadcast_to(table[row], (LENGTH, COLUMNS))
        valid = positions < length
        cache = write(filled.cache, 1, places, positions, valid, filled.k[1, row], filled.v[1, row])
        filled = dataclasses.replace(filled, cache=cache)
        q = queries(seed)
        q[row] = queries(99)[row]
        seen.append(attended(filled, lengths, q, 1, same_bits=True)[row])
        assert_rows(seen[-1][None], _one(filled, row), [length], q[row : row + 1], 1)
    for other in seen[1:]:
        np.testing.assert_array_equal(seen[0], other)


def _one(filled: Filled, row: int) -> Filled:
    return dataclasses.replace(filled, k=filled.k[:, row : row + 1], v=filled.v[:, row : row + 1])


@pytest.mark.parametrize("seed", range(3))
def test_chunks(seed):
    rng = np.random.default_rng(seed)
    lengths = [LENGTH, PAGE + 3, 3 * PAGE, 6, LENGTH - 1]
    filled = fill(random_table(rng, {1: (0, 1), 2: (0, 2)} if seed else {}), lengths, seed)
    rows = np.array([2, 0, 1])
    starts = np.array([PAGE - 2, 2 * PAGE, 0])
    positions = (starts[:, None] + np.arange(5)).astype(np.int32)
    q = queries(seed, 3, 5)
    longest = jnp.int32(positions.max() + 1)
    for layer in range(LAYERS):
        out = chunks_attend(q, split(filled.cache), layer, filled.table[rows], positions, longest)
        for chunk, row in enumerate(rows):
            for i in range(5):
                expected = dense(
                    q[chunk, i], filled.k[layer, row], filled.v[layer, row], positions[chunk, i]
                )
                np.testing.assert_allclose(out[chunk, i], expected, atol=EXACT)


def test_chunks_are_multiplied_in_the_dtype_of_their_queries():
    """As in training: bfloat16 queries round the keys, values and weights that they meet."""
    filled = fill(in_their_places(), [LENGTH] * ROWS)
    rows, positions = np.arange(2), np.array([[PAGE + 1, PAGE + 2], [4, 5]], np.int32)
    q = jnp.asarray(queries(3, 2, 2), jnp.bfloat16)
    where = filled.table[rows], positions, jnp.int32(LENGTH)
    cache = split(filled.cache)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), cache)
    out = chunks_attend(q, cache, 0, *where)
    np.testing.assert_array_equal(out, chunks_attend(q, rounded, 0, *where))
    exact = chunks_attend(jnp.float32(q), cache, 0, *where)
    assert not jnp.array_equal(out, exact.astype(jnp.bfloat16))
    np.testing.assert_allclose(jnp.float32(out), exact, atol=0.03)


def test_a_cache_in_bfloat16():
    lengths = [LENGTH, 3, PAGE, 0, 2 * PAGE + 1]
    filled, q = fill(in_their_places(), lengths, dtype=jnp.bfloat16), queries()
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(filled.cache))
    for same_bits in (False, True):
        out = attended(filled, lengths, q, same_bits=same_bits)
        assert out.dtype == np.float32
        assert_rows(out, filled, lengths, q, atol=0.03)


def test_who_sees_a_broken_token_gets_nan_and_nobody_else_does():
    lengths = [PAGE + 2, PAGE + 2, 5, 0, LENGTH]
    filled, q = fill(in_their_places(), lengths), queries()
    bad = np.full((1, KV_HEADS, DIM), np.nan, np.float32)
    place = filled.table[:1], np.array([4], np.int32), np.ones(1, bool)
    good = filled.k[0, :1, 4]
    for k, v in ((good, bad), (bad, good), (good, bad * 0 + np.inf)):
        filled.cache = write(filled.cache, 0, *place, k, v)
        out = attended(filled, lengths, q)
        assert np.isnan(out[0]).all()
        assert_rows(out[1:], _without_first(filled), lengths[1:], q[1:])


def _without_first(filled: Filled) -> Filled:
    return dataclasses.replace(filled, k=filled.k[:, 1:], v=filled.v[:, 1:])


def same(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y, equal_nan=True)), a, b)
    return all(jax.tree.leaves(equal))


def test_invalid_tokens_and_positions_beyond_the_line_are_not_written():
    filled = fill(in_their_places(), [LENGTH] * ROWS)
    garbage = np.full((3, KV_HEADS, DIM), 7.0, np.float32)
    table, invalid = filled.table[:3], np.zeros(3, bool)
    for few in (False, True):
        put = functools.partial(write, filled.cache, 0, table, few_columns=few)
        assert same(
            put(np.array([0, 5, LENGTH - 1], np.int32), invalid, garbage, garbage), filled.cache
        )
        beyond = np.array([LENGTH, 10_000, -1], np.int32)
        assert same(put(beyond, ~invalid, garbage, garbage), filled.cache)
        written = put(np.array([0, 5, LENGTH], np.int32), ~invalid, garbage, garbage)
        assert not same(written, filled.cache)


def test_skipping_columns_writes_the_same():
    filled = fill(in_their_places(), [LENGTH] * ROWS)
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, ROWS, KV_HEADS, DIM)).astype(np.float32)
    positions = np.array([0, 3, PAGE, 2, PAGE + 7], np.int32)  # the last two columns rest
    valid = np.array([True, True, True, False, True])
    args = filled.cache, 1, filled.table[:ROWS], positions, valid, k, v
    plain = write(*args)
    assert same(write(*args, few_columns=True), plain)
    assert not same(plain, filled.cache)
    assert same(plain.keys[0], filled.cache.keys[0]), "the other layer"


def test_copies_one_page():
    filled = fill(in_their_places(), [LENGTH] * ROWS)
    copied = copy_page(filled.cache, jnp.int32(1), jnp.int32(2), jnp.int32(0))
    for before, after in zip(
        (*filled.cache.keys, *filled.cache.values), (*copied.keys, *copied.values), strict=True
    ):
        for column in range(COLUMNS):
            expected = np.array(before[column])
            if column == 1:
                expected[0] = expected[2]
            np.testing.assert_array_equal(after[column], expected)


def test_copying_in_no_column_changes_nothing():
    filled = fill(in_their_places(), [LENGTH] * ROWS)
    copied = copy_page(filled.cache, jnp.int32(COLUMNS), jnp.int32(2), jnp.int32(0))
    assert same(copied, filled.cache)


def test_pages_are_kept_and_copied_back():
    """The first pages of a line, wherever they lie, in the place of a kept prefix."""
    whole = fill(in_their_places(), [LENGTH] * ROWS).cache
    cache = split(whole)
    pages = np.array([3, 6, 1, 0], np.int32)  # the second one is kept already
    kept = keep_pages(cache, pages, jnp.int32(0), jnp.int32(3))
    assert same((kept.keys, kept.values), (cache.keys, cache.values))
    every = [(whole.keys, cache.kept_keys, kept.kept_keys)]
    every += [(whole.values, cache.kept_values, kept.kept_values)]
    for lines, before, after in every:
        for layer in range(LAYERS):
            for column in range(COLUMNS):
                found = after[layer][column]
                origin = lines[layer][column][pages[column]]
                assert same(found[0], origin if column < 3 else before[layer][column][0])
                assert same(found[1], before[layer][column][1])
    back = copy_page(kept, jnp.int32(2), jnp.int32(ROWS), jnp.int32(4))
    assert same(back.keys[1][2][4], whole.keys[1][2][1])
    assert same(back.keys[1][2][:4], whole.keys[1][2][:4])
