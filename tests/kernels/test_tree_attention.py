import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.forests import random_forests, random_hidden
from tests.kernels.dense_oracle import dense_attention, dense_mask
from tw_jax.kernels import plan_tiles, tree_attention
from tw_jax.kernels.tile_sizes import default_tile, tile_sizes

ROWS, ROW_LEN, TILE = 2, 75, 16  # the length is no multiple of the tile
HEADS, KV_HEADS, DIM = 4, 2, 8
RELATIVE_ERROR = 1e-5


def random_inputs(
    rows=ROWS,
    row_len=ROW_LEN,
    seed=0,
    dtype=jnp.float32,
    heads=HEADS,
    kv_heads=KV_HEADS,
    dim=DIM,
):
    """q, k, v, and a random cotangent of the output."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return [
        jax.random.normal(key, (rows, row_len, count, dim), dtype)
        for key, count in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    ]


def close(actual, expected, relative_error=RELATIVE_ERROR):
    """Compares each array to its largest entry.

    A gradient that is exactly 0 (q of a lone token) is the difference of two equal numbers as large
    as the other gradients, so it is compared to a tenth of the largest entry of all.
    """
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]
    largest = max(np.abs(b).max() for _, b in pairs)
    for a, b in pairs:
        assert np.abs(a - b).max() <= relative_error * max(np.abs(b).max(), largest / 10)


def out_and_grads(attention):
    """Jitted: the output and the gradients of q, k and v under a given cotangent."""

    @jax.jit
    def run(q, k, v, cotangent, visible_end, hidden):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, visible_end, hidden), q, k, v)
        return out, pull(cotangent)

    return run


small_plan = jax.jit(functools.partial(plan_tiles, q_tile=TILE, k_tile=TILE))


def tiled(q, k, v, visible_end, hidden):
    plan = small_plan(visible_end, hidden)
    return tree_attention(q, k, v, visible_end, hidden, plan=plan)


run_tiled, run_dense = out_and_grads(tiled), out_and_grads(dense_attention)


@settings(max_examples=25, deadline=None)
@given(random_forests(ROWS, ROW_LEN), st.integers(0, 99))
def test_forests_match_the_dense_oracle(forest, seed):
    arguments = (*random_inputs(seed=seed), forest.visible_end, None)
    close(run_tiled(*arguments), run_dense(*arguments))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_hidden_intervals_match_the_dense_oracle(data):
    forest = data.draw(random_forests(ROWS, ROW_LEN))
    hidden = data.draw(random_hidden(forest, depth=2))
    arguments = (*random_inputs(), forest.visible_end, hidden)
    close(run_tiled(*arguments), run_dense(*arguments))


@pytest.mark.parametrize(
    "row_len, tiles", [(7, (None, None)), (64, (16, 32)), (75, (64, 16)), (130, (None, None))]
)
def test_any_length_and_any_tile(row_len, tiles):
    *qkv, cotangent = random_inputs(row_len=row_len)
    end = np.full((ROWS, row_len), row_len, np.int32)
    end[1, : row_len // 2] = row_len // 2

    def attention(q, k, v, visible_end, hidden):
        plan = plan_tiles(visible_end, hidden, q_tile=tiles[0], k_tile=tiles[1])
        return tree_attention(q, k, v, visible_end, hidden, plan=plan)

    arguments = (*qkv, cotangent, end, None)
    close(out_and_grads(attention)(*arguments), run_dense(*arguments))


PARTS = 3


def in_parts(q, k, v, visible_end, hidden):
    """Each part of the queries on its own, as devices do that share a row."""
    q_len = q.shape[1] // PARTS

    def attend_part(part):
        plan = plan_tiles(
            visible_end, hidden, q_tile=TILE, k_tile=TILE, q_start=part * q_len, q_len=q_len
        )
        own = jax.lax.dynamic_slice_in_dim(q, part * q_len, q_len, axis=1)
        return tree_attention(own, k, v, visible_end, hidden, plan=plan)

    return jnp.concatenate([attend_part(jnp.int32(part)) for part in range(PARTS)], axis=1)


run_in_parts = out_and_grads(in_parts)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_parts_of_the_queries_match_the_dense_oracle(data):
    forest = data.draw(random_forests(ROWS, PARTS * 2 * TILE))
    hidden = data.draw(random_hidden(forest, depth=1))
    arguments = (*random_inputs(row_len=PARTS * 2 * TILE), forest.visible_end, hidden)
    close(run_in_parts(*arguments), run_dense(*arguments))


def test_a_part_that_is_not_whole_tiles_is_refused():
    end = np.full((ROWS, 4 * TILE), 4 * TILE, np.int32)
    with pytest.raises(ValueError, match="q_len=24"):
        plan_tiles(end, q_tile=TILE, k_tile=TILE, q_start=24, q_len=24)


def test_depth_zero_hides_nothing():
    q, k, v, _ = random_inputs()
    end = jnp.full((ROWS, ROW_LEN), ROW_LEN, jnp.int32)
    nothing = jnp.zeros((2, 0, ROWS, ROW_LEN), jnp.int32)
    outputs = [jax.jit(tree_attention)(q, k, v, end, hidden) for hidden in (tuple(nothing), None)]
    close(*outputs, relative_error=0)


def test_bfloat16_inputs_keep_a_float32_softmax():
    inputs = random_inputs(dtype=jnp.bfloat16)
    end = np.full((ROWS, ROW_LEN), ROW_LEN, np.int32)
    out, grads = run_tiled(*inputs, end, None)
    assert out.dtype == jnp.bfloat16
    assert all(grad.dtype == jnp.bfloat16 for grad in grads)
    exact = run_dense(*(x.astype(jnp.float32) for x in inputs), end, None)
    close((out, grads), exact, relative_error=2e-2)


def test_under_scan_remat_and_grad():
    q, k, v, cotangent = random_inputs()
    forest_end = np.full((ROWS, ROW_LEN), ROW_LEN, np.int32)
    forest_end[0, 20:40], forest_end[1, 10:30] = 40, 30
    weights = jnp.array([0.5, 1.0, 1.5])

    def loss(attention, q, k, v, weights):
        def layer(x, weight):
            return x + weight * attention(x, k, v, forest_end, None), None

        body = jax.checkpoint(layer, prevent_cse=False)
        return (jax.lax.scan(body, q, weights)[0] * cotangent).sum()

    gradients = [
        jax.jit(jax.grad(lambda *args, f=f: loss(f, *args), (0, 1, 2, 3)))(q, k, v, weights)
        for f in (tiled, dense_attention)
    ]
    close(*gradients)


def brute_force_tiles(visible_end, hidden, tile):
    """Number of tiles with a visible pair, from the dense mask."""
    mask = np.asarray(dense_mask(jnp.asarray(visible_end), hidden))
    rows, row_len, _ = mask.shape
    extra = -row_len % tile
    mask = np.pad(mask, ((0, 0), (0, extra), (0, extra)))
    blocks = (row_len + extra) // tile
    if extra:  # padding sees itself, in the last diagonal tile, which is live already
        assert mask[:, -tile:, -tile:].any()
    return mask.reshape(rows, blocks, tile, blocks, tile).any((2, 4))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_plan_lists_exactly_the_live_tiles(data):
    forest = data.draw(random_forests(ROWS, ROW_LEN))
    hidden = data.draw(st.none() | random_hidden(forest, depth=2))
    plan = small_plan(forest.visible_end, hidden)
    live = brute_force_tiles(forest.visible_end, hidden, TILE)
    row, q_block, k_block = np.nonzero(live)
    blocks = live.shape[1]
    assert plan.count == live.sum()
    np.testing.assert_array_equal(plan.q_block[: plan.count], row * blocks + q_block)
    np.testing.assert_array_equal(plan.k_block[: plan.count], row * blocks + k_block)


def test_dead_tiles_are_not_visited():
    """NaN keys and values in tiles that nobody sees reach no output."""
    row_len = 4 * TILE
    q, k, v, _ = random_inputs(rows=1, row_len=row_len)
    end = np.repeat(np.arange(1, 5, dtype=np.int32) * TILE, TILE)[None]  # one tree per tile
    poisoned = [x.at[:, :TILE].set(jnp.nan) for x in (k, v)]
    out = jax.jit(tiled)(q, *poisoned, end, None)
    assert np.isnan(out[:, :TILE]).all()
    assert np.isfinite(out[:, TILE:]).all()


def test_temporary_memory_is_linear_in_the_row():
    def temporary_bytes(attention, row_len):
        q, k, v, cotangent = (
            jax.ShapeDtypeStruct((1, row_len, heads, DIM), jnp.float32)
            for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
        )
        end = jax.ShapeDtypeStruct((1, row_len), jnp.int32)

        def run(q, k, v, cotangent, end, plan):
            _, pull = jax.vjp(lambda q, k, v: attention(q, k, v, end, plan), q, k, v)
            return pull(cotangent)

        plan = jax.eval_shape(plan_tiles, end)
        lowered = jax.jit(run).lower(q, k, v, cotangent, end, plan)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    def sparse(q, k, v, end, plan):
        return tree_attention(q, k, v, end, plan=plan)

    def dense(q, k, v, end, plan):
        return dense_attention(q, k, v, end)

    short, long = (temporary_bytes(sparse, row_len) for row_len in (1024, 2048))
    assert long <= 2.1 * short
    assert temporary_bytes(dense, 2048) >= 20 * long


def test_default_tile_grows_with_the_row():
    lengths = (5, 16, 17, 48, 64, 2048, 4096)
    assert [default_tile(n) for n in lengths] == [16, 16, 32, 64, 64, 64, 256]


def test_default_tiles_divide_a_part_of_the_queries():
    assert tile_sizes("xla", row_len=8192, q_len=8192 // 4) == (256, 256)
    assert tile_sizes("xla", row_len=8320, q_len=8320 // 2) == (64, 256)
    assert tile_sizes("xla", row_len=128, q_len=16) == (16, 64)


def test_the_mask_of_a_long_row_stays_small():
    end = jax.ShapeDtypeStruct((1, 40_960), jnp.int32)
    arrays = jax.tree.leaves((end, jax.eval_shape(plan_tiles, end)))
    assert sum(x.size * x.dtype.itemsize for x in arrays) <= 500_000


def test_errors_name_the_choices():
    q, k, v, _ = random_inputs()
    end = np.full((ROWS, ROW_LEN), ROW_LEN, np.int32)
    with pytest.raises(ValueError, match="choose one of xla"):
        tree_attention(q, k, v, end, backend="abacus")
    with pytest.raises(ValueError, match="do not group"):
        tree_attention(q[:, :, :3], k, v, end)
    with pytest.raises(ValueError, match="the plan is for"):
        tree_attention(q, k, v, end, plan=plan_tiles(end[:, :10]))
    with pytest.raises(ValueError, match="the plan is for 1 rows"):
        tree_attention(q, k, v, end, plan=plan_tiles(end[:1]))
    with pytest.raises(ValueError, match="multiple of the other"):
        plan_tiles(end, q_tile=48, k_tile=32)
