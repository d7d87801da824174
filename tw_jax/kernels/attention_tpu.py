"""Tree attention on TPUs: Pallas kernels that walk the list of live tiles.

The grid is (key heads, live tiles of all rows); its last bound is the number of live tiles, known
only at run time. The list lies in scalar memory, where it tells the pipeline which blocks to fetch
next, so that a dead tile is neither computed nor fetched. The query heads of one key head are the
rows of one matrix product: keys and values are fetched once per group, and their gradients sum
over it.

| array | shape here | block |
|---|---|---|
| q, out and their gradients | rows, kv_heads, group, q_len, dim | group, q_tile, dim |
| k, v and their gradients | rows, kv_heads, len, dim | k_tile, dim |
| span: `visible_end`, starts and stops of hidden intervals | rows, 1 + 2 depth, len | all, k_tile |
| log-sum-exp, mean gradient | rows, kv_heads, q blocks, 1, group * q_tile | 1, group * q_tile |

Checked in the TPU interpreter against a dense oracle, and compiled ahead of time for v5e, v5p, v6e
and tpu7x. **It has run on no TPU so far**: its speed there is unknown. With one key head per device
one of the two cores of a v4 or v5p chip has nothing to do. Under `vmap` the kernel runs once per
example: put rows into the batch instead.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from tw_jax.kernels import attention_tpu_kernels as kernels
from tw_jax.kernels.attention_tpu_kernels import TileOrder
from tw_jax.kernels.residuals import attention_residuals
from tw_jax.kernels.tile_plan import Hidden, TilePlan, pad_tokens

# Of the scalar memory of a core, 1 MiB; the rest is the compiler's.
_SCALAR_BYTES = 1_000_000
_LANES = 128
# Wide heads in float32 do not fit into the compiler's default share of on-chip memory, 16 MiB on
# most chips; these all have 64 MiB or more.
_WIDE_HEAD_BYTES, _WIDE_VMEM_BYTES = 512, 48 * 2**20
# Rows of a 32-bit register: the least that can be transposed.
_SUBLANES = 8


def tree_attention_tpu(
    q: Float[Array, "rows q_len heads dim"],
    k: Float[Array, "rows len kv_heads dim"],
    v: Float[Array, "rows len kv_heads dim"],
    visible_end: Int32[Array, "rows len"],
    hidden: Hidden | None,
    plan: TilePlan,
) -> Float[Array, "rows q_len heads dim"]:
    """See `tw_jax.kernels.tree_attention`.

    Raises:
      ValueError: the plan's tiles or the number of its tiles do not suit a TPU.
    """
    _check(plan)
    rows, q_len, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = _padded(q, plan.q_len).reshape(rows, plan.q_len, kv_heads, heads // kv_heads, dim)
    q = q.transpose(0, 2, 3, 1, 4)
    k, v = (_padded(x, plan.padded_len).transpose(0, 2, 1, 3) for x in (k, v))
    span = [pad_tokens(visible_end, plan.padded_len)]
    if hidden is not None:
        span += [_padded(bound, plan.padded_len) for bounds in hidden for bound in bounds]
    out = _attend(q, k, v, jnp.stack(span, axis=1), plan)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, plan.q_len, heads, dim)[:, :q_len]


def _check(plan: TilePlan) -> None:
    """Refuses what the compiler would refuse less clearly."""
    if plan.k_tile % _LANES or plan.q_tile & (plan.q_tile - 1) or plan.q_tile < _SUBLANES:
        raise ValueError(
            f"q_tile={plan.q_tile}, k_tile={plan.k_tile}: on a TPU k_tile must be a multiple of "
            f"{_LANES}, and q_tile a power of two from {_SUBLANES} on"
        )
    entries = plan.q_block.shape[0]
    if 4 * entries > _SCALAR_BYTES:
        raise ValueError(
            f"the list of {entries} tiles ({plan.rows} rows of {plan.padded_len} tokens in tiles "
            f"of {plan.q_tile} x {plan.k_tile}) does not fit into a TPU's scalar memory, which "
            f"holds {_SCALAR_BYTES // 4}: give a device fewer rows at a time (micro-batches), or "
            "let several devices share a row (parallel.context)"
        )


def _padded(x: Array, length: int) -> Array:
    """Zeros behind axis 1."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, length - x.shape[1])
    return jnp.pad(x, widths)


@jax.custom_vjp
def _attend(q, k, v, span, plan: TilePlan):
    return _forward(q, k, v, span, plan)[0]


def _forward(q, k, v, span, plan: TilePlan):
    call = _Call(q, k, span, plan)
    rows, kv_heads, group, q_len, dim = q.shape
    n = group * plan.q_tile
    shape = (rows, kv_heads, q_len // plan.q_tile, 1, n)
    with jax.named_scope("tree_attention_forward"):
        out, log_total = call(
            kernels.forward,
            (q, k, v, span),
            "qkks",
            outputs=(jax.ShapeDtypeStruct(q.shape, q.dtype), _float32(*shape)),
            outputs_at="qt",
            scratch=[(n, _LANES), (n, _LANES), (n, dim)],
            products=2,
        )
    return out, log_total


def _attend_fwd(q, k, v, span, plan):
    out, log_total = attention_residuals(*_forward(q, k, v, span, plan))
    return out, (q, k, v, span, plan, out, log_total)


def _attend_bwd(saved, d_out):
    q, k, v, span, plan, out, log_total = saved
    group, _, dim = q.shape[2:]
    with jax.named_scope("tree_attention_backward"):
        # sum_j weight_ij * d_weight_ij, the part of the softmax gradient shared by a query's keys.
        mean_grad = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
        mean_grad = mean_grad.reshape(*mean_grad.shape[:3], -1, plan.q_tile).swapaxes(2, 3)
        inputs = (q, k, v, span, d_out, log_total, mean_grad.reshape(log_total.shape))
        inputs_at = "qkksqtt"
        (dq,) = _Call(q, k, span, plan)(
            kernels.query_gradient,
            inputs,
            inputs_at,
            outputs=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
            outputs_at="q",
            scratch=[(group * plan.q_tile, dim)],
            products=3,
        )
        # A key block that no query of this part sees is not in the list and stays zero.
        dk, dv = _Call(q, k, span, plan, by_key=True)(
            kernels.key_gradient,
            inputs,
            inputs_at,
            outputs=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)),
            outputs_at="kk",
            scratch=[(plan.k_tile, dim)] * 2,
            products=4,
            initial=(jnp.zeros_like(k), jnp.zeros_like(v)),
        )
    # Integers have no gradient.
    return dq, dk, dv, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class _Call:
    """Calls kernels over the live tiles of a plan, in one of its two orders."""

    def __init__(self, q: Array, k: Array, span: Array, plan: TilePlan, *, by_key: bool = False):
        self.plan = plan
        rows, self.kv_heads, self.group, q_len, self.dim = q.shape
        q_blocks, k_blocks = q_len // plan.q_tile, plan.padded_len // plan.k_tile
        if by_key:
            assert plan.by_key is not None  # plans for this backend have it
            q_block, k_block = plan.by_key
        else:
            q_block, k_block = plan.q_block, plan.k_block
        self.order = TileOrder(q_blocks, k_blocks, by_key)
        self.tiles = self.order.pack(q_block, k_block)
        self.scalars = jnp.stack([plan.count, plan.q_start])
        self.blocks = self._blocks(span.shape[1])

    def _blocks(self, span_rows: int) -> dict[str, pl.BlockSpec]:
        plan, split = self.plan, self.order.split

        def at_query(place: Callable) -> Callable:
            def index(head, tile, tiles, scalars):
                row, q, _ = split(tiles[tile])
                return place(row, head, q)

            return index

        def at_key(place: Callable) -> Callable:
            def index(head, tile, tiles, scalars):
                row, _, k = split(tiles[tile])
                return place(row, head, k)

            return index

        q_shape = (None, None, self.group, plan.q_tile, self.dim)
        log_shape = (None, None, None, 1, self.group * plan.q_tile)
        return {
            "q": pl.BlockSpec(q_shape, at_query(lambda row, head, q: (row, head, 0, q, 0))),
            "t": pl.BlockSpec(log_shape, at_query(lambda row, head, q: (row, head, q, 0, 0))),
            "k": pl.BlockSpec(
                (None, None, plan.k_tile, self.dim),
                at_key(lambda row, head, k: (row, head, k, 0)),
            ),
            "s": pl.BlockSpec(
                (None, span_rows, plan.k_tile), at_key(lambda row, head, k: (row, 0, k))
            ),
        }

    def __call__(
        self,
        kernel: Callable,
        inputs: Sequence[Array],
        inputs_at: str,
        *,
        outputs: Sequence[jax.ShapeDtypeStruct],
        outputs_at: str,
        scratch: Sequence[tuple[int, int]],
        products: int,
        initial: Sequence[Array] = (),
    ) -> Sequence[Array]:
        """Runs a kernel.

        Args:
          kernel: one of `attention_tpu_kernels`.
          inputs: its arrays.
          inputs_at: the block that it sees of each, as keys of `blocks`.
          outputs: shapes of its results.
          outputs_at: the block that it writes of each.
          scratch: shapes of float32 accumulators.
          products: matrix products per tile.
          initial: what the outputs hold where no tile writes; absent if all of them are written.
        """
        call = pl.pallas_call(
            functools.partial(kernel, self.order, self.plan.q_tile, self.plan.k_tile),
            out_shape=tuple(outputs),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(self.kv_heads, self.plan.count),
                in_specs=[self.blocks[at] for at in inputs_at]
                + [pl.BlockSpec(memory_space=pl.ANY) for _ in initial],
                out_specs=tuple(self.blocks[at] for at in outputs_at),
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            input_output_aliases={2 + len(inputs) + i: i for i in range(len(initial))},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=_WIDE_VMEM_BYTES
                if self.dim * inputs[0].dtype.itemsize > _WIDE_HEAD_BYTES
                else None,
            ),
            cost_estimate=self._cost(inputs, products),
            # For readers of the compiled program, who know better how many tiles are live.
            metadata={
                "flops_per_tile": str(self.kv_heads * self._tile_flops(products)),
                "bytes_per_tile": str(self.kv_heads * self._tile_bytes(inputs[0].dtype.itemsize)),
            },
            name=f"tree_attention_{kernel.__name__}",
        )
        return call(self.tiles, self.scalars, *inputs, *initial)

    def _cost(self, inputs: Sequence[Array], products: int) -> pl.CostEstimate:
        """Of all tiles that the list has room for: the number of live ones is not known yet."""
        tiles = self.kv_heads * self.tiles.size
        whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in inputs)
        return pl.CostEstimate(
            flops=tiles * self._tile_flops(products),
            transcendentals=tiles * self.group * self.plan.q_tile * self.plan.k_tile,
            bytes_accessed=whole + tiles * self._tile_bytes(inputs[0].dtype.itemsize),
        )

    def _tile_flops(self, products: int) -> int:
        """Work of one tile of one key head."""
        return products * 2 * self.group * self.plan.q_tile * self.plan.k_tile * self.dim

    def _tile_bytes(self, item_bytes: int) -> int:
        """What one tile of one key head fetches: two blocks of the side that changes each time."""
        moving = self.group * self.plan.q_tile if self.order.by_key else self.plan.k_tile
        return 2 * moving * self.dim * item_bytes
