"""The TPU path: its metadata with the kernel's own reference, and the kernel compiled for TPUs.

Nothing here runs on a TPU, and the kernel has no interpreter: what it computes is not tested.
"""

import functools
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from tests.kernels import compile_paged_tpu
from tests.kernels.paged_oracle import LAYER, dense, lay_out, random_queries, random_rows
from tests.libtpu import needs_libtpu
from tw_jax.kernels.page_pool import PagedShape
from tw_jax.kernels.paged_attention_tpu import paged_attention_tpu, ragged_batch, tpu_obstacle
from tw_jax.planning.tpu_environment import compiler_environment


def reference_kernel(q, pages, kv_lens, page_indices, cu_q_lens, num_seqs, *, sm_scale, **blocks):
    """Checks what the kernel takes for granted, then runs its reference.

    Tokens behind the last sequence's hold no numbers, as the kernel leaves them.
    """
    assert blocks.keys() == {"num_kv_pages_per_block", "num_queries_per_block"}
    count = int(num_seqs[0])
    counts = np.diff(cu_q_lens)[:count]
    assert count >= 1
    assert (counts >= 1).all() and (counts <= kv_lens[:count]).all()
    assert (page_indices >= 0).all() and (page_indices < len(pages)).all()
    out = ref_ragged_paged_attention(
        q, pages, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale=sm_scale
    )
    return jnp.full(q.shape, jnp.nan, out.dtype).at[: len(out)].set(out)


@pytest.mark.parametrize(
    ("kv_lens", "run", "q_lens"),
    [
        ([17, 0, 4, 1], 1, [1, 0, 1, 1]),
        ([0, 0, 20, 0], 1, [0, 0, 1, 0]),
        ([9, 0, 5, 20], 4, [4, 0, 1, 3]),
        ([9, 8, 5, 20], 4, [0, 4, 0, 2]),
        ([4, 4, 4, 4], 4, [4, 4, 4, 4]),
    ],
)
def test_metadata_with_the_reference_kernel(kv_lens, run, q_lens):
    rng = np.random.default_rng(0)
    rows = random_rows(rng, kv_lens, 4, shared=[0, 1, 0, 1])
    pool, page_indices = lay_out(rng, rows, 4, 6)
    q = random_queries(rng, 4, run)
    q_lens = np.array(q_lens, np.int32)
    out = paged_attention_tpu(
        jnp.array(q),
        pool,
        LAYER,
        jnp.array(rows.kv_lens),
        page_indices,
        jnp.array(q_lens),
        kernel=reference_kernel,
    )
    np.testing.assert_allclose(out, dense(q, rows, q_lens), atol=1e-5)


def test_if_all_rows_rest_one_sequence_remains():
    """With none, the kernel would start to fetch pages and never wait for them."""
    zeros = jnp.zeros(3, jnp.int32)
    batch = ragged_batch(zeros, zeros, jnp.zeros((3, 2), jnp.int32), 2)
    assert batch.num_seqs == 1 and batch.kv_lens[0] == 1
    np.testing.assert_array_equal(batch.cu_q_lens[:2], [0, 1])
    assert not batch.valid.any()


def shape_of(**changed):
    fields = {**compile_paged_tpu.FIELDS, "dtype": jnp.dtype(jnp.bfloat16), **changed}
    return PagedShape(**fields)


@pytest.mark.parametrize("changed", compile_paged_tpu.CASES, ids=str)
def test_cases_that_compile_have_no_obstacle(changed):
    changed = dict(changed)
    dtype = jnp.dtype(changed.pop("dtype", "bfloat16"))
    assert tpu_obstacle(shape_of(**changed, dtype=dtype)) is None


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_for_tpus(topology):
    """Every case in a process of its own environment, as `tw-jax plan` compiles."""
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=600)
    done = run(
        [sys.executable, "-m", "tests.kernels.compile_paged_tpu", topology],
        env=compiler_environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [[1, 0]] * len(compile_paged_tpu.CASES)
