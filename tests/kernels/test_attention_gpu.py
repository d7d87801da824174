"""The GPU kernels in Pallas' interpreter against the dense oracle, and lowered for CUDA."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.forests import random_forests, random_hidden
from tests.kernels.dense_oracle import dense_attention, dense_mask
from tests.kernels.test_tree_attention import close, out_and_grads
from tw_jax.kernels import plan_tiles, tree_attention
from tw_jax.kernels.attention import best_backend
from tw_jax.kernels.attention_gpu import (
    Launch,
    Launches,
    default_launches,
    tree_attention_gpu,
)
from tw_jax.kernels.block_lists import full_tiles, lists_by_query, live_tiles

ROWS, ROW_LEN, TILE = 2, 75, 16  # the length is no multiple of any tile
SMALL = Launches(
    forward=Launch(TILE, 2 * TILE, warps=4, stages=2),
    dq=Launch(2 * TILE, TILE, warps=4, stages=2),
    dkv=Launch(TILE, TILE, warps=4, stages=2),
)
small_plan = jax.jit(functools.partial(plan_tiles, q_tile=TILE, k_tile=TILE))


def random_inputs(rows=ROWS, row_len=ROW_LEN, heads=4, kv_heads=2, dim=8, dtype=jnp.float32):
    """q, k, v, and a random cotangent of the output."""
    keys = jax.random.split(jax.random.key(heads), 4)
    return [
        jax.random.normal(key, (rows, row_len, count, dim), dtype)
        for key, count in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    ]


def interpreted(q, k, v, visible_end, hidden, launches=SMALL, plan=None):
    plan = plan or small_plan(visible_end, hidden)
    return tree_attention_gpu(q, k, v, visible_end, hidden, plan, launches=launches, interpret=True)


run_interpreted, run_dense = out_and_grads(interpreted), out_and_grads(dense_attention)


@settings(max_examples=6, deadline=None)
@given(random_forests(ROWS, ROW_LEN))
def test_forests_match_the_dense_oracle(forest):
    arguments = (*random_inputs(), forest.visible_end, None)
    close(run_interpreted(*arguments), run_dense(*arguments))


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_hidden_intervals_match_the_dense_oracle(data):
    forest = data.draw(random_forests(ROWS, ROW_LEN))
    hidden = data.draw(random_hidden(forest, depth=2))
    arguments = (*random_inputs(), forest.visible_end, hidden)
    close(run_interpreted(*arguments), run_dense(*arguments))


def test_one_token_trees_many_trees_and_padding():
    own = np.arange(1, ROW_LEN + 1, dtype=np.int32)
    sixty_four = np.maximum(own, 12)  # trees: one of 12 tokens, 63 of one
    causal_then_padding = np.where(own <= 50, 50, own)
    for end in ([own, sixty_four], [causal_then_padding, np.full_like(own, ROW_LEN)]):
        end = np.maximum(np.stack(end), own).astype(np.int32)
        arguments = (*random_inputs(), end, None)
        close(run_interpreted(*arguments), run_dense(*arguments))


@pytest.mark.parametrize(
    "row_len, heads, kv_heads, dim, dtype, relative_error",
    [
        (1, 1, 1, 16, jnp.float32, 1e-5),
        (33, 2, 2, 80, jnp.float32, 1e-5),
        (70, 4, 1, 32, jnp.bfloat16, 2e-2),
    ],
)
def test_default_launches(row_len, heads, kv_heads, dim, dtype, relative_error):
    inputs = random_inputs(1, row_len, heads, kv_heads, dim, dtype)
    end = np.full((1, row_len), row_len, np.int32)
    run = out_and_grads(functools.partial(interpreted, launches=None))
    out, grads = run(*inputs, end, None)
    assert all(x.dtype == dtype for x in (out, *grads))
    exact = run_dense(*(x.astype(jnp.float32) for x in inputs), end, None)
    close((out, grads), exact, relative_error)


PARTS, PART_LEN = 3, 3 * TILE  # the part's length is no multiple of the dq kernel's query tile


@jax.jit
def run_part(q, k, v, cotangent, visible_end, hidden, start):
    """Output and gradients of one part of the queries, as on a device that shares a row."""
    plan = plan_tiles(
        visible_end, hidden, q_tile=TILE, k_tile=TILE, q_start=start, q_len=q.shape[1]
    )
    out, pull = jax.vjp(
        lambda q, k, v: interpreted(q, k, v, visible_end, hidden, plan=plan), q, k, v
    )
    return out, pull(cotangent)


@settings(max_examples=4, deadline=None)
@given(st.data())
def test_parts_of_the_queries_match_the_dense_oracle(data):
    forest = data.draw(random_forests(ROWS, PARTS * PART_LEN))
    hidden = data.draw(random_hidden(forest, depth=1))
    q, k, v, cotangent = random_inputs(row_len=PARTS * PART_LEN, kv_heads=1)
    starts = [jnp.int32(part * PART_LEN) for part in range(PARTS)]
    outs, grads = [], []
    for start in starts:
        own = slice(int(start), int(start) + PART_LEN)
        out, grad = run_part(q[:, own], k, v, cotangent[:, own], forest.visible_end, hidden, start)
        # No query of this part is behind these keys.
        assert all((x[:, own.stop :] == 0).all() for x in grad[1:])
        outs.append(out)
        grads.append(grad)
    dq, dk, dv = zip(*grads, strict=True)
    together = jnp.concatenate(outs, 1), (jnp.concatenate(dq, 1), sum(dk), sum(dv))
    close(together, run_dense(q, k, v, cotangent, forest.visible_end, hidden))


def test_dead_tiles_are_not_visited():
    """NaN in a tree reaches neither outputs nor gradients of trees in other tiles."""
    q, k, v, cotangent = random_inputs()
    end = np.full((ROWS, ROW_LEN), ROW_LEN, np.int32)
    end[:, : 2 * TILE] = 2 * TILE
    q, k, v, cotangent = (x.at[:, : 2 * TILE].set(jnp.nan) for x in (q, k, v, cotangent))
    out, grads = run_interpreted(q, k, v, cotangent, end, None)
    for x in (out, *grads):
        assert np.isnan(x[:, : 2 * TILE]).all()
        assert np.isfinite(x[:, 2 * TILE :]).all()


@pytest.mark.slow
def test_under_scan_remat_and_grad():
    q, k, v, cotangent = random_inputs()
    end = np.full((ROWS, ROW_LEN), ROW_LEN, np.int32)
    end[0, 20:40], end[1, 10:30] = 40, 30
    weights = jnp.array([0.5, 1.0, 1.5])

    def loss(attention, q, k, v, weights):
        def layer(x, weight):
            return x + weight * attention(x, k, v, end, None), None

        body = jax.checkpoint(layer, prevent_cse=False)
        return (jax.lax.scan(body, q, weights)[0] * cotangent).sum()

    gradients = [
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2, 3)))(q, k, v, weights)
        for f in (interpreted, dense_attention)
    ]
    close(*gradients)


@functools.partial(jax.jit, static_argnums=2)
def tile_lists(visible_end, hidden, tiles):
    """Live tiles, full tiles and the lists of query blocks, for tiles of other sizes."""
    blocks = tuple(-(-ROW_LEN // tile) for tile in tiles)
    live = live_tiles(small_plan(visible_end, hidden), *tiles, blocks)
    padding = ((0, 0), (0, blocks[1] * tiles[1] - ROW_LEN))
    end = jnp.pad(visible_end, padding)
    bounds = tuple(tuple(jnp.pad(x, padding) for x in pair) for pair in zip(*hidden, strict=True))
    full = full_tiles(end, bounds, jnp.int32(0), ROW_LEN, *tiles, blocks[0])
    return live, full, lists_by_query(live, full)


@settings(max_examples=15, deadline=None)
@given(st.data(), st.sampled_from([(16, 32), (64, 16)]))
def test_block_lists_hold_exactly_the_live_and_the_full_tiles(data, tiles):
    forest = data.draw(random_forests(ROWS, ROW_LEN))
    hidden = data.draw(random_hidden(forest, depth=2))
    live, full, lists = tile_lists(forest.visible_end, hidden, tiles)
    _, q_blocks, k_blocks = live.shape
    mask = np.zeros((ROWS, q_blocks * tiles[0], k_blocks * tiles[1]), bool)
    mask[:, :ROW_LEN, :ROW_LEN] = dense_mask(jnp.asarray(forest.visible_end), hidden)
    mask = mask.reshape(ROWS, q_blocks, tiles[0], k_blocks, tiles[1])
    np.testing.assert_array_equal(live, mask.any((2, 4)))
    np.testing.assert_array_equal(full, mask.all((2, 4)))

    inner, counts, live, full = map(np.asarray, (*lists, live, full))
    for at in np.ndindex(ROWS, q_blocks):
        np.testing.assert_array_equal(inner[at][: counts[at][0]], np.flatnonzero(full[at]))
        assert set(inner[at][: counts[at][1]]) == set(np.flatnonzero(live[at]))


def cuda_shapes(dim, dtype, row_len=512):
    """Shapes of q, k, v and visible_end."""
    qkv = [jax.ShapeDtypeStruct((1, row_len, heads, dim), dtype) for heads in (4, 2, 2)]
    return *qkv, jax.ShapeDtypeStruct((1, row_len), jnp.int32)


def gradients(q, k, v, visible_end, hidden=None):
    def loss(q, k, v):
        return tree_attention(q, k, v, visible_end, hidden, backend="gpu").astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))(q, k, v)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
def test_lowers_for_cuda(dim, dtype):
    """Forward, dq and dkv become three Triton programs. No Triton compiler runs here."""
    lowered = jax.jit(gradients).trace(*cuda_shapes(dim, dtype)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@__gpu$xla.gpu.triton") == 3


def test_lowers_for_cuda_with_hidden_intervals():
    hidden = (jax.ShapeDtypeStruct((2, 1, 512), jnp.int32),) * 2
    traced = jax.jit(gradients).trace(*cuda_shapes(64, jnp.bfloat16), hidden)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@__gpu$xla.gpu.triton") == 3


def test_float32_products_are_not_rounded_to_tf32():
    with jax.default_matmul_precision("tensorfloat32"):
        text = str(jax.make_jaxpr(gradients)(*cuda_shapes(64, jnp.float32)))
    products = text.count("dot_general[")
    assert products > 0
    assert len(re.findall(r"precision=\(Precision.HIGHEST, Precision.HIGHEST\)", text)) == products


def test_memory_is_linear_in_the_row():
    """Nothing is larger than the float32 copies of q, and of the tiles there are only flags."""
    shapes = cuda_shapes(64, jnp.bfloat16, row_len=8192)
    jaxpr = jax.make_jaxpr(gradients)(*shapes).jaxpr
    sizes = [
        variable.aval.size * variable.aval.dtype.itemsize
        for eqn in jaxpr.eqns
        for variable in eqn.outvars
    ]
    assert max(sizes) <= 4 * shapes[0].size


def test_large_heads_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match="backend='xla'"):
        default_launches(512, jnp.bfloat16)
    with pytest.raises(ValueError, match="float64"):
        default_launches(64, jnp.float64)


@pytest.mark.parametrize(
    "platform, client, best",
    [("gpu", "cuda", "gpu"), ("gpu", "rocm", "xla"), ("cpu", "cpu", "xla"), ("tpu", "tpu", "tpu")],
)
def test_the_best_backend_of_a_device(platform, client, best):
    device = types.SimpleNamespace(platform=platform, client=types.SimpleNamespace(platform=client))
    assert best_backend(device) == best


def test_the_best_backend_here_is_that_of_cpu():
    assert best_backend(jax.devices("cpu")[0]) == "xla"
