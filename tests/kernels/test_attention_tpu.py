"""The TPU kernels in the TPU interpreter against the dense oracle, and lowered for a TPU.

The interpreter fills what nobody has written with NaN and refuses to write a block twice.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from tests.forests import random_forests, random_hidden
from tests.kernels.dense_oracle import dense_attention
from tests.kernels.test_tree_attention import close, out_and_grads
from tw_jax.kernels import plan_tiles, tree_attention
from tw_jax.kernels.tile_sizes import tile_sizes

ROWS, ROW_LEN = 2, 300  # the length is no multiple of the tile
TILES = {"q_tile": 64, "k_tile": 128}
few = functools.partial(
    settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def interpreter():
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture
def plain_interpreter():
    """Checks less, but has no side effects, which `jax.checkpoint` would refuse."""
    with pltpu.force_tpu_interpret_mode(True):
        yield


def random_inputs(rows=ROWS, row_len=ROW_LEN, heads=4, kv_heads=2, dim=32, dtype="float32"):
    """q, k, v, and a random cotangent of the output."""
    keys = jax.random.split(jax.random.key(heads), 4)
    return [
        jax.random.normal(key, (rows, row_len, count, dim), jnp.dtype(dtype))
        for key, count in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    ]


def on_tpu(q, k, v, visible_end, hidden, **tiles):
    plan = plan_tiles(visible_end, hidden, backend="tpu", group=q.shape[2] // k.shape[2], **tiles)
    return tree_attention(q, k, v, visible_end, hidden, plan=plan)


run_tpu = out_and_grads(functools.partial(on_tpu, **TILES))
run_default, run_dense = out_and_grads(on_tpu), out_and_grads(dense_attention)


def trees(*lengths):
    """`visible_end` of a row of causal trees; one of negative length is padding."""
    ends, start = [], 0
    for length in lengths:
        stop = start + abs(length)
        own = np.arange(start + 1, stop + 1)
        ends.append(own if length < 0 else np.full(length, stop))
        start = stop
    return np.concatenate(ends).astype(np.int32)


@few(max_examples=3)
@given(forest=random_forests(ROWS, ROW_LEN))
def test_forests_match_the_dense_oracle(interpreter, forest):
    arguments = (*random_inputs(), forest.visible_end, None)
    close(run_tpu(*arguments), run_dense(*arguments))


@pytest.mark.slow
@few(max_examples=20)
@given(data=st.data())
def test_hidden_intervals_match_the_dense_oracle(interpreter, data):
    forest = data.draw(random_forests(ROWS, ROW_LEN))
    hidden = data.draw(random_hidden(forest, data.draw(st.integers(1, 2))))
    arguments = (*random_inputs(), forest.visible_end, hidden)
    close(run_tpu(*arguments), run_dense(*arguments))


@pytest.mark.slow
def test_one_token_trees_many_trees_and_padding(interpreter):
    rows = [
        trees(12, *[1] * 188, -100),
        trees(150, -150),
        trees(*[4] * 64, 44),
        trees(-300),
    ]
    for pair in (rows[:2], rows[2:]):
        arguments = (*random_inputs(), np.stack(pair), None)
        close(run_tpu(*arguments), run_dense(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("dtype, relative_error", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(
    "row_len, heads, kv_heads, dim",
    [
        (1, 1, 1, 32),
        (127, 4, 1, 64),
        (128, 2, 1, 80),
        (257, 2, 2, 96),
        (600, 2, 1, 128),
        (1100, 1, 1, 256),
    ],
)
def test_default_tiles(interpreter, row_len, heads, kv_heads, dim, dtype, relative_error):
    inputs = random_inputs(1, row_len, heads, kv_heads, dim, dtype)
    end = trees(row_len // 3, row_len - row_len // 3)[None]
    out, grads = run_default(*inputs, end, None)
    assert all(x.dtype == jnp.dtype(dtype) for x in (out, *grads))
    exact = run_dense(*(x.astype(jnp.float32) for x in inputs), end, None)
    close((out, grads), exact, relative_error)


PARTS, PART_LEN = 3, 128


@jax.jit
def run_part(q, k, v, cotangent, visible_end, hidden, start):
    """Output and gradients of one part of the queries, as on a device that shares a row."""

    def attend(q, k, v):
        return on_tpu(q, k, v, visible_end, hidden, q_start=start, q_len=PART_LEN, **TILES)

    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(cotangent)


@pytest.mark.slow
@few(max_examples=4)
@given(data=st.data())
def test_parts_of_the_queries_match_the_dense_oracle(interpreter, data):
    forest = data.draw(random_forests(ROWS, PARTS * PART_LEN))
    hidden = data.draw(random_hidden(forest, depth=1))
    q, k, v, cotangent = random_inputs(row_len=PARTS * PART_LEN)
    outs, grads = [], []
    for start in range(0, PARTS * PART_LEN, PART_LEN):
        own, own_cotangent = (x[:, start : start + PART_LEN] for x in (q, cotangent))
        out, grad = run_part(own, k, v, own_cotangent, forest.visible_end, hidden, start)
        outs.append(out)
        grads.append(grad)
        # Nobody in this part sees the keys behind it.
        assert not any(x[:, start + PART_LEN :].any() for x in grad[1:])
    whole = (
        jnp.concatenate(outs, 1),
        (jnp.concatenate([g[0] for g in grads], 1), *(sum(g[i] for g in grads) for i in (1, 2))),
    )
    close(whole, run_dense(q, k, v, cotangent, forest.visible_end, hidden))


def test_dead_tiles_are_neither_computed_nor_summed(interpreter):
    """NaN in tiles that nobody sees reaches neither output nor gradients."""
    inputs = random_inputs()
    end = np.stack([trees(128, 172), trees(128, 1, 171)])
    poisoned = [x.at[:, :128].set(jnp.nan) for x in inputs]
    out, grads = run_tpu(*poisoned, end, None)
    exact = run_dense(*inputs, end, None)
    close(
        jax.tree.map(lambda x: x[:, 128:], (out, grads)), jax.tree.map(lambda x: x[:, 128:], exact)
    )
    assert np.isnan(out[:, :128]).all()


@pytest.mark.slow
def test_under_scan_remat_and_grad(plain_interpreter):
    q, k, v, cotangent = random_inputs(rows=1)
    end = trees(200, 50, -50)[None]
    weights = jnp.array([0.5, 1.5])
    plan = plan_tiles(end, backend="tpu", **TILES)

    def loss(attention, q, k, v, weights):
        def layer(x, weight):
            return x + weight * attention(x, k, v), None

        body = jax.checkpoint(layer, prevent_cse=False)
        return (jax.lax.scan(body, q, weights)[0] * cotangent).sum()

    gradients = [
        jax.jit(jax.grad(functools.partial(loss, attention), (0, 1, 2, 3)))(q, k, v, weights)
        for attention in (
            lambda q, k, v: tree_attention(q, k, v, end, plan=plan),
            lambda q, k, v: dense_attention(q, k, v, end),
        )
    ]
    close(*gradients)


@pytest.mark.slow
def test_vmap_over_rows(interpreter):
    q, k, v, cotangent = random_inputs()
    end = np.stack([trees(300), trees(60, 100, 140)])

    def one(q, k, v, cotangent, end):
        return out_and_grads(functools.partial(on_tpu, **TILES))(
            *(x[None] for x in (q, k, v, cotangent, end)), None
        )

    found = jax.tree.map(lambda x: x[:, 0], jax.jit(jax.vmap(one))(q, k, v, cotangent, end))
    close(found, run_dense(q, k, v, cotangent, end, None))


@few(max_examples=10)
@given(data=st.data())
def test_both_orders_list_the_same_tiles(data):
    forest = data.draw(random_forests(ROWS, ROW_LEN))
    part = data.draw(st.booleans())
    plan = _plan_of_a_part(forest.visible_end) if part else _whole_plan(forest.visible_end)
    count = int(plan.count)
    assert plan.by_key is not None
    by_query = list(zip(*(x[:count].tolist() for x in (plan.q_block, plan.k_block)), strict=True))
    by_key = list(zip(*(x[:count].tolist() for x in plan.by_key), strict=True))
    assert by_query == sorted(by_key)
    assert by_key == sorted(by_key, key=lambda tile: tile[::-1])
    reference = plan_tiles(
        forest.visible_end, **TILES, **({"q_start": 128, "q_len": 128} if part else {})
    )
    assert reference.by_key is None
    np.testing.assert_array_equal(plan.q_block[:count], reference.q_block[:count])
    np.testing.assert_array_equal(plan.k_block[:count], reference.k_block[:count])


_whole_plan = jax.jit(functools.partial(plan_tiles, backend="tpu", **TILES))
_plan_of_a_part = jax.jit(
    lambda end: plan_tiles(end, backend="tpu", q_start=jnp.int32(128), q_len=128, **TILES)
)


@pytest.mark.parametrize(
    "row_len, q_len, group, tiles",
    [
        (1, None, 4, (128, 128)),
        (300, None, 4, (256, 512)),
        (40_960, None, 4, (256, 512)),
        (40_960, None, 8, (256, 512)),
        (40_960, None, 16, (128, 512)),
        (40_960, None, 32, (128, 256)),
        (40_960, None, 128, (64, 128)),
        (40_960, 10_240, 4, (256, 512)),
        (960, 320, 1, (64, 512)),
    ],
)
def test_tiles_fit_on_the_chip(row_len, q_len, group, tiles):
    assert tile_sizes("tpu", row_len=row_len, q_len=q_len, group=group) == tiles
    assert group * tiles[0] * tiles[1] <= 2**20


def test_errors_name_the_remedy():
    q, k, v, _ = random_inputs()
    end = np.full((ROWS, ROW_LEN), ROW_LEN, np.int32)

    def attend(**plan):
        tree_attention(q, k, v, end, plan=plan_tiles(end, **plan), backend="tpu")

    with pytest.raises(ValueError, match="the backend 'xla', and 'tpu' needs one of its own"):
        jax.eval_shape(lambda: attend())
    with pytest.raises(ValueError, match="k_tile must be a multiple of 128"):
        jax.eval_shape(lambda: attend(backend="tpu", q_tile=64, k_tile=64))
    with pytest.raises(ValueError, match="multiple of 16 queries per device"):
        plan_tiles(end, backend="tpu", q_start=0, q_len=100)


def lowered(rows: int, row_len: int, tiles: dict[str, int]) -> str:
    """The program of output and gradients for the platform `tpu`."""
    q, kv = (jax.ShapeDtypeStruct((rows, row_len, heads, 128), jnp.bfloat16) for heads in (16, 4))
    end = jax.ShapeDtypeStruct((rows, row_len), jnp.int32)
    run = out_and_grads(functools.partial(on_tpu, **tiles))
    return run.trace(q, kv, kv, q, end, None).lower(lowering_platforms=("tpu",)).as_text()


def test_the_tpu_program_holds_three_kernels():
    """Forward, gradient of the queries, gradient of the keys; no other loop over tiles."""
    text = lowered(2, 1024, {})
    assert text.count("@tpu_custom_call(") == 3
    for name in ("forward", "query_gradient", "key_gradient"):
        assert f"tree_attention_{name}" in text


def test_rows_whose_list_is_too_long_are_refused():
    lowered(38, 40_960, {})
    with pytest.raises(ValueError, match=r"39 rows of 40960 tokens in tiles of 256 x 512.*micro-b"):
        lowered(39, 40_960, {})
