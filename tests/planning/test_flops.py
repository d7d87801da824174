"""Operations counted on traced programs: formulas, and the compiler's own products."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tw_jax.data.packed_batch import PackedBatch
from tw_jax.kernels import plan_tiles, tree_attention
from tw_jax.kernels.grouped_matmul import SCOPE, grouped_matmul, tile_rows
from tw_jax.models import graphdef, init_params
from tw_jax.models.config import preset
from tw_jax.models.remat import rematerialised
from tw_jax.planning.flops import clean_scope, count_flops
from tw_jax.planning.hlo import parse_hlo
from tw_jax.planning.hlo_cost import RAGGED_DOT, ProgramCost
from tw_jax.train.update import MemoryConfig, nll_sum


def count(function, *arguments, **scopes):
    return count_flops(jax.make_jaxpr(function)(*arguments), scopes)


def test_products_loops_and_branches():
    x = jnp.ones((8, 16))
    w = jnp.ones((16, 16))

    def f(x, w, which):
        with jax.named_scope("loop"):
            x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]
        with jax.named_scope("branch"):
            return jax.lax.cond(which, lambda x: x @ w @ w, lambda x: x @ w, x)

    found = count(f, x, w, True)
    one = 2 * 8 * 16 * 16
    assert found.by_scope == {"loop": 5 * one, "branch": 2 * one}
    assert found.total == 7 * one


def test_backward_and_recomputation_of_a_scope_are_one_entry():
    def f(x, w):
        def body(x):
            with jax.named_scope("layer"):
                return jnp.tanh(jnp.tanh(x @ w) @ w)

        return jax.checkpoint(body)(x).sum()

    found = count(jax.value_and_grad(f, (0, 1)), jnp.ones((8, 16)), jnp.ones((16, 16)))
    one = 2 * 8 * 16 * 16
    # Forward 2, recomputed 2 (tanh needs its output), backward 2 each for x and w.
    assert found.by_scope == {"layer": 8 * one}
    assert found.recomputed == 2 * one


def test_what_nobody_reads_does_not_count():
    def f(x, which):
        def branch(x):
            x @ x @ x  # the last layer of a prefill, of which only the cache is wanted
            return x @ x

        return jax.lax.scan(lambda x, _: (jax.lax.cond(which, branch, branch, x), None), x, None, 3)

    assert count(f, jnp.ones((16, 16)), True).total == 3 * 2 * 16**3


def test_data_dependent_loops():
    def f(x, trips):
        with jax.named_scope("tiles"):
            return jax.lax.fori_loop(0, trips, lambda _, x: x @ x, x)

    x = jnp.ones((16, 16))
    assert count(f, x, 3, tiles=11.0).total == 11 * 2 * 16**3
    unknown = count(f, x, 3).total
    assert unknown != unknown


def test_shard_map_multiplies_by_its_devices():
    mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)

    def f(x, w):
        def local(x, w):
            return x @ w

        split = jax.shard_map(
            local, mesh=mesh, in_specs=(P("fsdp"), P(None, "tensor")), out_specs=P("fsdp", "tensor")
        )
        return split(x, w)

    x, w = jnp.ones((8, 16)), jnp.ones((16, 32))
    assert count(f, x, w).total == 2 * 8 * 16 * 32


def test_ragged_products_and_convolutions():
    def ragged(x, w, sizes):
        return jax.lax.ragged_dot(x, w, sizes)

    x, w, sizes = jnp.ones((24, 8)), jnp.ones((3, 8, 5)), jnp.array([8, 8, 8])
    assert count(ragged, x, w, sizes).total == 2 * 24 * 8 * 5

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (2,), [(3, 2)], (2,), (3,), feature_group_count=3
        )

    image, kernel = jnp.ones((2, 6, 9)), jnp.ones((12, 2, 4))
    text = jax.jit(convolve).lower(image, kernel).compile().as_text()
    assert text is not None
    assert count(convolve, image, kernel).total == ProgramCost(parse_hlo(text)).flops


def test_kernels_count_once_per_point_of_their_grid():
    def attend(q, k, v, end):
        plan = plan_tiles(end, backend="tpu", group=2, q_tile=64, k_tile=128)
        return tree_attention(q, k, v, end, plan=plan).astype(jnp.float32).sum()

    q, kv = (jax.ShapeDtypeStruct((2, 512, h, 64), jnp.bfloat16) for h in (6, 3))
    end = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    found = count(jax.grad(attend, (0, 1, 2)), q, kv, kv, end, tree_attention=5.0)
    # Of each of three key heads and five live tiles; forward 2 products, backward 3 and 4.
    product = 3 * 5 * 2 * (2 * 64) * 128 * 64
    assert found.within("tree_attention_forward") == 2 * product
    assert found.within("tree_attention_backward") == 7 * product
    assert found.total == 9 * product


def test_scope_names():
    assert clean_scope("/transpose(jvp(head))//rematted_computation/lm_head") == "head/lm_head"
    assert clean_scope("/jvp()") == ""


def batch_of(rows: int, row_len: int) -> PackedBatch:
    ints = jax.ShapeDtypeStruct((rows, row_len), jnp.int32)
    floats = jax.ShapeDtypeStruct((rows, row_len), jnp.float32)
    depths = jax.ShapeDtypeStruct((0, rows, row_len), jnp.int32)
    return PackedBatch(ints, ints, ints, ints, depths, depths, floats)


@pytest.mark.parametrize(
    "remat", ["none", "full", *(pytest.param(r, marks=pytest.mark.slow) for r in ("dots", "block"))]
)
def test_the_training_gradient_agrees_with_its_compiled_program(remat):
    config = preset("tiny")
    loss = nll_sum(graphdef(config), MemoryConfig(remat=remat, head_chunk=128))
    params = jax.eval_shape(lambda: init_params(config, 0))
    batch = batch_of(2, 128)
    traced = jax.jit(jax.grad(loss, has_aux=True)).trace(params, batch)
    text = traced.lower().compile().as_text()
    assert text is not None

    # Two rows of two blocks of 64: three tiles each on or below the diagonal.
    scopes = {"tree_attention": 6.0}
    counted = count_flops(traced.jaxpr, scopes)
    assert counted.total == ProgramCost(parse_hlo(text), scopes).flops

    if remat in ("dots", "block"):
        assert 0 < counted.recomputed < counted.total
        return
    tokens, pair = 2 * 128, 64 * 64 * config.head_dim * config.num_attention_heads
    forwards = 2 if remat == "full" else 1
    assert counted.within("tree_attention_forward") == forwards * 3 * 6 * 2 * 2 * pair
    assert counted.within("tree_attention_backward") == 3 * 6 * 5 * 2 * pair
    # Per token 6 operations per parameter of a matrix product; the chunked head runs twice
    # forward, and recomputed layers leave out what nobody needs: the last product.
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256
    matrices = 3 * layer * 6 + config.vocab_size * 128 * (6 + 2)
    if remat == "full":
        matrices += 3 * 2 * (layer - 128 * 256)
    assert counted.total - counted.within("tree_attention_forward") - counted.within(
        "tree_attention_backward"
    ) == (tokens * matrices)


def test_grouped_products_count_the_rows_of_the_platforms_branch():
    """On TPU the share of rows that belong to a group; elsewhere whole tiles, as often as said."""
    x, kernels = jnp.zeros((64, 8)), jnp.zeros((4, 8, 5))
    sizes = jnp.full(4, 8, jnp.int32)
    traced = jax.make_jaxpr(grouped_matmul)(x, kernels, sizes)
    scopes = {SCOPE: 6.0, RAGGED_DOT: 0.5}
    assert count_flops(traced, scopes, "tpu").total == 2 * 64 * 8 * 5 * 0.5
    assert count_flops(traced, scopes, "cuda").total == 6 * 2 * tile_rows(64, 4) * 8 * 5


def test_a_kernel_whose_results_nobody_reads_is_not_counted():
    """Under a policy that keeps attention's result, its forward kernel runs once."""
    end = jnp.full((1, 256), 256, jnp.int32)
    plan = plan_tiles(end, backend="tpu")

    def forward_work(remat):
        def layer(x, _):
            return x + tree_attention(x, x, x, end, plan=plan), None

        def loss(x):
            body = rematerialised(layer, remat, in_scan=True)
            return jax.lax.scan(body, x, jnp.arange(2))[0].sum()

        traced = jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 256, 1, 128)))
        return count_flops(traced, {"tree_attention": 1.0}, "tpu").within("tree_attention_forward")

    assert forward_work("block") == forward_work("none") > 0
    assert forward_work("full") == 2 * forward_work("none")
