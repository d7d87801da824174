"""The Triton kernel, interpreted on CPU and lowered for CUDA; nothing here runs on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.paged_oracle import LAYER, dense, lay_out, random_queries, random_rows
from tw_jax.kernels.page_pool import empty_pool
from tw_jax.kernels.paged_attention import paged_attention
from tw_jax.kernels.paged_attention_gpu import paged_attention_gpu


@pytest.mark.parametrize(
    ("page_size", "run", "q_lens"),
    [(4, 1, [1, 0, 1]), (16, 8, [8, 0, 3]), (128, 8, [2, 0, 1]), (16, 40, [33, 0, 40])],
)
def test_interpreted(page_size, run, q_lens):
    """The last case takes two tiles of queries per row."""
    rng = np.random.default_rng(0)
    rows = random_rows(rng, [130, 0, 64], page_size, shared=[0, 0, 0])
    pool, page_indices = lay_out(rng, rows, page_size, -(-160 // page_size))
    q = random_queries(rng, 3, run)
    q_lens = np.array(q_lens, np.int32)
    out = paged_attention_gpu(
        jnp.array(q),
        pool,
        LAYER,
        jnp.array(rows.kv_lens),
        page_indices,
        jnp.array(q_lens),
        interpret=True,
    )
    np.testing.assert_allclose(out, dense(q, rows, q_lens), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "page_size", "run"),
    [(32, 4, 2, 16, 1), (128, 32, 8, 64, 1), (128, 32, 8, 16, 32), (256, 8, 8, 32, 1)],
)
def test_lowers_for_cuda(dtype, head_dim, heads, kv_heads, page_size, run):
    rows, pages_per_row = 6, 10
    pool = jax.eval_shape(lambda: empty_pool(2, 100, page_size, kv_heads, head_dim, dtype))
    q = jax.ShapeDtypeStruct((rows * run, heads, head_dim), dtype)
    lens = jax.ShapeDtypeStruct((rows,), jnp.int32)
    table = jax.ShapeDtypeStruct((rows, pages_per_row), jnp.int32)

    @jax.jit
    def attend(q, pool, lens, table):
        return paged_attention(q, pool, 1, lens, table, backend="gpu")

    text = attend.trace(q, pool, lens, table).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text
