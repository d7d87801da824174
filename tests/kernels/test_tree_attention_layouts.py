"""Rows at the edges of what is allowed, native blocks and head sizes, against the dense oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.forests import forest_row, native_row, side_by_side
from tests.kernels.dense_oracle import dense_mask
from tests.kernels.test_tree_attention import (
    TILE,
    close,
    out_and_grads,
    random_inputs,
    run_dense,
    run_tiled,
    tiled,
)
from tw_jax.kernels import plan_tiles, tree_attention

ROW_LEN = 150  # nine tiles and a part of one


def forest_end(segments, row_len=ROW_LEN):
    return forest_row(segments, row_len)[1]


def padding(length):
    return forest_end([], length)


LONE_TREE = (ROW_LEN, 1)  # climbs past any root: a new tree of one token
TREE = forest_end([(0, 9), (4, 12), (12, 8), (3, 21)], 50)
LAYOUTS = {
    "only_padding": padding(ROW_LEN),
    "one_token_trees": forest_end([LONE_TREE] * ROW_LEN),
    "padding_in_the_middle": side_by_side(TREE, padding(37), TREE, padding(5), TREE[:8] * 0 + 8),
    "padding_first": side_by_side(padding(2 * TILE + 3), TREE, padding(ROW_LEN - 85)),
    "one_chain": forest_end([(0, ROW_LEN)]),
    # A spine; from each of its tokens hangs a leaf, and the next spine token is the leaf's sibling.
    "a_branch_at_each_token": forest_end([(0, 2)] + [(1, 2)] * (ROW_LEN // 2 - 1)),
    # All branches at the root: depth 1, and the root's key is seen by all.
    "a_star": forest_end([(0, 2)] + [(1, 1)] * (ROW_LEN - 2)),
    "64_tries": forest_end([(ROW_LEN, 1 + i % 3) for i in range(64)]),
}


def test_layouts_are_what_they_are_called():
    """`forest_row` could drop tokens or cut a tree, and the cases would test something else."""
    assert all(end.shape == (ROW_LEN,) for end in LAYOUTS.values())
    own_end = np.arange(1, ROW_LEN + 1)
    for name in ("only_padding", "one_token_trees"):
        np.testing.assert_array_equal(LAYOUTS[name], own_end)
    parent, _, depth = forest_row([(0, 2)] + [(1, 2)] * (ROW_LEN // 2 - 1), ROW_LEN)
    assert depth.max() == ROW_LEN // 2
    assert (np.bincount(parent)[:-2:2] >= 2).all()  # every spine token but the last has two
    assert (LAYOUTS["one_chain"] == ROW_LEN).all()
    parent, _, depth = forest_row([(ROW_LEN, 1 + i % 3) for i in range(64)], ROW_LEN)
    used = sum(1 + i % 3 for i in range(64))
    assert (depth[:used] == 0).sum() == 64 and used < ROW_LEN


@pytest.mark.parametrize("other", ["one_chain", "only_padding"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_match_the_dense_oracle(name, other):
    """Beside another row, which must not matter to it."""
    end = np.stack([LAYOUTS[name], LAYOUTS[other]])
    arguments = (*random_inputs(row_len=ROW_LEN), end, None)
    found, wanted = run_tiled(*arguments), run_dense(*arguments)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    close(found, wanted)


def test_a_token_that_sees_itself_only_returns_its_value():
    q, k, v, cotangent = random_inputs(rows=1, row_len=ROW_LEN)
    out, (dq, dk, dv) = run_tiled(q, k, v, cotangent, LAYOUTS["only_padding"][None], None)
    group = q.shape[2] // v.shape[2]
    np.testing.assert_allclose(out, np.repeat(v, group, axis=2), rtol=1e-6)
    per_key_head = cotangent.reshape(*v.shape[:3], group, -1).sum(3)
    np.testing.assert_allclose(dv, per_key_head, rtol=1e-5, atol=1e-6)
    assert max(np.abs(dq).max(), np.abs(dk).max()) <= 1e-5


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_one_token(rows):
    arguments = (*random_inputs(rows=rows, row_len=1), np.ones((rows, 1), np.int32), None)
    close(run_tiled(*arguments), run_dense(*arguments))


INNER = ([5], [11, 3], [2])
BLOCKS = {
    "one_block": [7, ([20], [13], [31]), 79],
    "two_blocks": [7, ([20], [13]), 17, ([9], [1], [25]), 58],
    "nested": [7, ([4, INNER, 6], [19], [3, ([17], [8]), 2]), 63],
    "nested_first_and_last": [([INNER], [30, INNER]), 78],
    "blocks_in_sequence_inside_a_thread": [3, ([2, INNER, 2, INNER, 1], [40]), 60],
}
DEPTH = 2


def native(name):
    start, stop, where = native_row(BLOCKS[name], DEPTH)
    assert len(where) == ROW_LEN
    return start, stop, where


def by_definition(where):
    """Query i sees key j before it unless they are in different threads of one block."""
    return np.array(
        [
            [
                j <= i and all(where[j].get(block, own) == own for block, own in where[i].items())
                for j in range(len(where))
            ]
            for i in range(len(where))
        ]
    )


@pytest.mark.parametrize("name", BLOCKS)
def test_native_blocks_match_the_dense_oracle(name):
    """Threads do not see each other, and are all seen after the join; the second row is causal."""
    start, stop, where = native(name)
    nothing = np.zeros_like(start)
    hidden = tuple(np.stack([bound, nothing], axis=1) for bound in (start, stop))
    end = np.full((2, ROW_LEN), ROW_LEN, np.int32)
    np.testing.assert_array_equal(dense_mask(jnp.asarray(end), hidden)[0], by_definition(where))
    arguments = (*random_inputs(row_len=ROW_LEN), end, hidden)
    close(run_tiled(*arguments), run_dense(*arguments))


def test_tiles_between_sibling_threads_are_dead():
    parts = [TILE, ([2 * TILE], [2 * TILE], [2 * TILE]), TILE]
    start, stop, where = native_row(parts, 1)
    end = np.full((1, len(where)), len(where), np.int32)
    plan = plan_tiles(end, (start[:, None], stop[:, None]), q_tile=TILE, k_tile=TILE)
    # Eight blocks of rows: the prefix, three threads of two, and one that sees everything.
    assert int(plan.count) == 1 + 3 * (2 + 3) + 8


@pytest.mark.parametrize(
    "dim, heads, kv_heads", [(64, 4, 2), (80, 6, 2), (96, 3, 3), (128, 4, 1), (256, 4, 2)]
)
@pytest.mark.parametrize("name", ["a_branch_at_each_token", "nested"])
def test_head_sizes_match_the_dense_oracle(dim, heads, kv_heads, name):
    inputs = random_inputs(1, ROW_LEN, heads=heads, kv_heads=kv_heads, dim=dim)
    end, hidden = np.full((1, ROW_LEN), ROW_LEN, np.int32), None
    if name in BLOCKS:
        start, stop, _ = native(name)
        hidden = (start[:, None], stop[:, None])
    else:
        end = LAYOUTS[name][None]
    close(run_tiled(*inputs, end, hidden), run_dense(*inputs, end, hidden))


def alone(q, k, v, visible_end, hidden):
    """One row without its axis."""
    one = [x[None] for x in (q, k, v, visible_end)]
    return tiled(*one, tuple(bound[:, None] for bound in hidden))[0]


def attention_row_by_row(q, k, v, visible_end, hidden):
    return jax.vmap(alone, in_axes=(0, 0, 0, 0, 1))(q, k, v, visible_end, hidden)


@pytest.mark.parametrize("dtype, error", [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_vmap_over_rows_is_the_batched_call(dtype, error):
    """Rows with lists of very different length, which the loop under `vmap` must all respect."""
    start, stop, _ = native("nested")
    nothing = np.zeros_like(start)
    hidden = tuple(np.stack([bound, nothing, nothing], axis=1) for bound in (start, stop))
    end = np.stack([LAYOUTS[name] for name in ("one_chain", "64_tries", "padding_in_the_middle")])
    arguments = (*random_inputs(3, ROW_LEN, dtype=dtype), end, hidden)
    found = out_and_grads(attention_row_by_row)(*arguments)
    assert all(x.dtype == dtype for x in jax.tree.leaves(found))
    close(found, run_tiled(*arguments), error)


@pytest.mark.parametrize("name", ["padding_in_the_middle", "a_branch_at_each_token", "nested"])
def test_bfloat16_matches_the_dense_oracle(name):
    inputs = random_inputs(1, ROW_LEN, dtype=jnp.bfloat16)
    end = LAYOUTS.get(name, np.full(ROW_LEN, ROW_LEN, np.int32))[None]
    hidden = None
    if name in BLOCKS:
        start, stop, _ = native(name)
        hidden = (start[:, None], stop[:, None])
    found = run_tiled(*inputs, end, hidden)
    exact = run_dense(*(x.astype(jnp.float32) for x in inputs), end, hidden)
    close(found, exact, 2e-2)


def test_default_tiles_on_a_long_row():
    """Rows beyond 2,048 tokens have larger tiles; trees begin and end inside them."""
    row_len = 2304
    tree = forest_end([(0, 300), (150, 200), (250, 157)], 657)
    end = side_by_side(tree, padding(100), tree, tree, padding(row_len - 100 - 3 * 657))[None]
    assert plan_tiles(end).q_tile == 256
    inputs = random_inputs(1, row_len, heads=2, kv_heads=1)

    def default(q, k, v, visible_end, hidden):
        return tree_attention(q, k, v, visible_end, hidden, backend="xla")

    close(out_and_grads(default)(*inputs, end, None), run_dense(*inputs, end, None))
