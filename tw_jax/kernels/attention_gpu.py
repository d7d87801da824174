"""Tree attention in Pallas for NVIDIA GPUs, by way of Triton.

Three kernels: forward, dq, and dkv. Each program owns one block of one head of one row, queries or
keys, and loops over its own list of live tiles; unequal lengths are normal for GPU programs, so no
compact grid is needed. The lists come from the plan's exact liveness, regrouped into the tiles
that suit each kernel (`block_lists`). Arrays stay as they are, `[rows, len, heads, dim]`: nothing
is transposed, only a length that is no multiple of the tile is padded. Memory is that of the
inputs, outputs and two numbers per query and head, beside the lists.

Inputs are bfloat16, float16 or float32; softmax and sums are float32 always. Products of float32
inputs are true float32 (Triton's IEEE mode, not TF32), whatever `jax.default_matmul_precision` is.

What is known: values and gradients in Pallas' interpreter, the lowering for CUDA, and that Triton
and ptxas accept the result (see `_TABLE`). Nothing here has run on a GPU yet: speed is unknown.
`python -m benchmarks attention-gpu` measures it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from tw_jax.kernels.attention_gpu_kernels import Tile, dkv_kernel, dq_kernel, forward_kernel
from tw_jax.kernels.block_lists import BlockLists, Bounds, full_tiles, lists_by_query, live_tiles
from tw_jax.kernels.residuals import attention_residuals
from tw_jax.kernels.tile_plan import Hidden, TilePlan

_SMALLEST_TILE = 16
_LARGEST_DIM = 256


@dataclasses.dataclass(frozen=True)
class Launch:
    """How one kernel is compiled.

    Attributes:
      q_tile: queries per tile, a power of two from 16 on.
      k_tile: keys per tile, likewise.
      warps: warps of 32 threads per program.
      stages: tiles in flight: while one is multiplied, the next ones are loaded.
    """

    q_tile: int
    k_tile: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Launches:
    """The three kernels of tree attention."""

    forward: Launch
    dq: Launch
    dkv: Launch

    def fit(self, q_len: int, row_len: int) -> "Launches":
        """No tile larger than the smallest one that holds all there is."""
        return Launches(
            *(
                dataclasses.replace(
                    launch,
                    q_tile=min(launch.q_tile, max(_SMALLEST_TILE, pl.next_power_of_2(q_len))),
                    k_tile=min(launch.k_tile, max(_SMALLEST_TILE, pl.next_power_of_2(row_len))),
                )
                for launch in (self.forward, self.dq, self.dkv)
            )
        )


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the kernels are specialised to, beside shapes."""

    launches: Launches
    q_len: int
    interpret: bool


class _Mask(NamedTuple):
    """Which pairs are visible: plan, ends and hidden intervals, padded to whole tiles."""

    plan: TilePlan
    end: Int32[Array, "rows len"]
    bounds: Bounds


# By (bytes per number, head dimension up to). Triton 3.9 and its ptxas compiled these kernels for
# A100 (sm_80) and H100 (sm_90), which gave the three bounds that the choice keeps:
# - shared memory: at most 137 KiB of the 163 of an A100, 193 of the 227 of an H100. It holds
#   `stages` copies of what a trip of the loop loads, so larger heads get smaller tiles.
# - registers: accumulators are tile x dim float32, one for forward and dq, two for dkv, and scores
#   are a tile more. In bfloat16 at most 108 bytes per thread are spilled on A100, none on H100;
#   dkv of 64 x 128, or forward with half the warps, would spill a thousand or more.
# - tensor cores: 64 queries or more let an H100 use its wide (warp-group) products.
# The smaller of equals is preferred: a tile of 64 x 64 is what the plan lists by default, and
# larger ones cover more dead pairs. Float32 products run on ordinary cores, unrolled over the whole
# head: their tiles are bounded by registers alone (forward at 128 spills 388 bytes on H100).
_TABLE = {
    (2, 64): Launches(Launch(128, 64, 4, 3), Launch(64, 64, 4, 3), Launch(64, 64, 4, 2)),
    (2, 128): Launches(Launch(128, 64, 8, 3), Launch(64, 64, 4, 2), Launch(64, 64, 8, 2)),
    (2, 256): Launches(Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(32, 32, 8, 2)),
    (4, 64): Launches(Launch(64, 32, 8, 2), Launch(64, 32, 8, 2), Launch(32, 32, 8, 2)),
    (4, 128): Launches(Launch(32, 32, 8, 2), Launch(32, 32, 8, 2), Launch(16, 32, 8, 2)),
    (4, 256): Launches(Launch(16, 16, 4, 2), Launch(16, 16, 4, 2), Launch(16, 16, 4, 2)),
}


def default_launches(dim: int, dtype: Any) -> Launches:
    """Launches for heads of this dimension."""
    size = jnp.dtype(dtype).itemsize
    for (table_size, most), launches in _TABLE.items():
        if size == table_size and dim <= most:
            return launches
    raise ValueError(
        f"the GPU kernels take heads of at most {_LARGEST_DIM} numbers of 2 or 4 bytes, not "
        f"{dim} of {jnp.dtype(dtype).name}: choose backend='xla'"
    )


def tree_attention_gpu(
    q: Float[Array, "rows q_len heads dim"],
    k: Float[Array, "rows len kv_heads dim"],
    v: Float[Array, "rows len kv_heads dim"],
    visible_end: Int32[Array, "rows len"],
    hidden: Hidden | None,
    plan: TilePlan,
    *,
    launches: Launches | None = None,
    interpret: bool = False,
) -> Float[Array, "rows q_len heads dim"]:
    """See `tw_jax.kernels.tree_attention`.

    Args:
      q: queries.
      k: keys.
      v: values.
      visible_end: exclusive end of each key's visibility.
      hidden: `(hidden_start, hidden_end)`, or None.
      plan: the live tiles, of any tile size: the kernels regroup them into their own.
      launches: how to compile the kernels; by default by head dimension and dtype.
      interpret: run the kernels in Pallas' interpreter, on any device.

    Raises:
      ValueError: head dimension or dtype that the kernels do not take.
    """
    q_len, row_len = q.shape[1], k.shape[1]
    launches = (launches or default_launches(q.shape[-1], q.dtype)).fit(q_len, row_len)
    every = (launches.forward, launches.dq, launches.dkv)
    # Powers of two: the largest is a multiple of all.
    q_extra = -q_len % max(launch.q_tile for launch in every)
    k_extra = -row_len % max(launch.k_tile for launch in every)
    q, k, v = (_pad_tokens(x, extra) for x, extra in ((q, q_extra), (k, k_extra), (v, k_extra)))
    # Padding keys end at 0: nobody sees them.
    end = _pad_tokens(jnp.asarray(visible_end, jnp.int32), k_extra)
    bounds: Bounds = ()
    if hidden is not None:
        start, stop = (jnp.asarray(bound, jnp.int32) for bound in hidden)
        bounds = tuple(
            (_pad_tokens(start[depth], k_extra), _pad_tokens(stop[depth], k_extra))
            for depth in range(start.shape[0])
        )
    static = _Static(launches, q_len, interpret)
    out: Array = _attend(q, k, v, _Mask(plan, end, bounds), static)
    return out[:, :q_len]


def _pad_tokens(x: Array, extra: int) -> Array:
    """Zeros after the tokens (axis 1)."""
    return jnp.pad(x, ((0, 0), (0, extra), *((0, 0),) * (x.ndim - 2))) if extra else x


class _Specs(NamedTuple):
    """What one program sees of each kind of array.

    Widths are powers of two, since Triton knows no others; kernels mask what is beyond the array.

    Attributes:
      heads: heads that programs are made for.
      outer: number in the row of the block that program i owns.
      q: queries, and what is shaped like them.
      kv: keys, and what is shaped like them.
      vector: one number per query.
    """

    heads: int
    outer: Callable[[Any], Any]
    q: pl.BlockSpec
    kv: pl.BlockSpec
    vector: pl.BlockSpec


def _query_specs(launch: Launch, q, k) -> _Specs:
    """For programs that own a query block: all keys of one head."""
    group, width = q.shape[2] // k.shape[2], _width(q.shape[3])
    blocks = q.shape[1] // launch.q_tile

    def outer(i):
        # Later queries tend to see more keys, and the longest programs should start first.
        return blocks - 1 - i

    return _Specs(
        q.shape[2],
        outer,
        pl.BlockSpec((None, launch.q_tile, None, width), lambda i, h, r: (r, outer(i), h, 0)),
        pl.BlockSpec(
            (None, k.shape[1], None, width), lambda i, h, r: (r, 0, jax.lax.div(h, group), 0)
        ),
        pl.BlockSpec((None, None, launch.q_tile), lambda i, h, r: (r, h, outer(i))),
    )


def _key_specs(launch: Launch, q, k) -> _Specs:
    """For programs that own a key block: all queries of the heads that share its key head."""
    group, width = q.shape[2] // k.shape[2], _width(q.shape[3])
    return _Specs(
        k.shape[2],
        lambda i: i,
        pl.BlockSpec((None, q.shape[1], group, width), lambda i, h, r: (r, 0, h, 0)),
        pl.BlockSpec((None, launch.k_tile, None, width), lambda i, h, r: (r, i, h, 0)),
        pl.BlockSpec((None, group, q.shape[1]), lambda i, h, r: (r, h, 0)),
    )


def _width(dim: int) -> int:
    return max(_SMALLEST_TILE, pl.next_power_of_2(dim))


def _tiles(launch: Launch, q, k, mask: _Mask, static: _Static):
    """Live and full tiles of this launch's size, `[rows, q_blocks, k_blocks]` each."""
    sizes = launch.q_tile, launch.k_tile
    blocks = q.shape[1] // launch.q_tile, k.shape[1] // launch.k_tile
    live = live_tiles(mask.plan, *sizes, blocks)
    return live, full_tiles(
        mask.end, mask.bounds, mask.plan.q_start, static.q_len, *sizes, blocks[0]
    )


def _call(
    kernel: Callable[..., None],
    launch: Launch,
    lists: BlockLists,
    specs: _Specs,
    mask: _Mask,
    inputs: tuple[Array, ...],
    outputs: tuple[tuple[Any, pl.BlockSpec], ...],
    products: int,
    static: _Static,
) -> tuple[Array, ...]:
    """Runs a kernel over the grid (outer blocks, heads, rows).

    Args:
      kernel: a body of `attention_gpu_kernels`.
      launch: its tiles.
      lists: inner blocks of each outer block.
      specs: what a program sees.
      mask: plan and mask data.
      inputs: q, k, v and, for the backward kernels, d_out and two numbers per query.
      outputs: arrays (or shapes) like those that it writes, and their specs.
      products: matrix products per tile.
      static: what else it is specialised to.
    """
    q, k = inputs[:2]
    rows, q_len, heads, dim = q.shape
    row_len, kv_heads = k.shape[1:3]
    tokens = pl.BlockSpec((None, row_len), lambda i, h, r: (r, 0))
    numbers = [
        pl.BlockSpec((None, None, array.shape[2]), lambda i, h, r: (r, specs.outer(i), 0))
        for array in lists
    ]
    input_specs = (specs.q, specs.kv, specs.kv, specs.q, specs.vector, specs.vector)
    pairs = rows * heads * q_len * row_len // 2
    return pl.pallas_call(
        functools.partial(
            kernel,
            tile=Tile(launch.q_tile, launch.k_tile, static.q_len, dim, heads // kv_heads),
        ),
        grid=(lists.outer, specs.heads, rows),
        in_specs=[
            *numbers,
            pl.BlockSpec((1,), lambda i, h, r: (0,)),
            tokens,
            jax.tree.map(lambda _: tokens, mask.bounds),
            *input_specs[: len(inputs)],
        ],
        out_specs=[spec for _, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        # Of a causal row; what a packed row saves is known only at run time.
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * dim,
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in inputs),
        ),
        interpret=static.interpret,
        name=f"tree_attention_{kernel.__name__}",
    )(*lists, mask.plan.q_start.reshape(1), mask.end, mask.bounds, *inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, mask: _Mask, static: _Static):
    return _forward(q, k, v, mask, static)[0]


def _attend_fwd(q, k, v, mask: _Mask, static: _Static):
    out, log_total = attention_residuals(*_forward(q, k, v, mask, static))
    return out, (q, k, v, mask, out, log_total)


def _forward(q, k, v, mask: _Mask, static: _Static):
    with jax.named_scope("tree_attention_forward"):
        launch = static.launches.forward
        lists = lists_by_query(*_tiles(launch, q, k, mask, static))
        specs = _query_specs(launch, q, k)
        log_total = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
        outputs = ((q, specs.q), (log_total, specs.vector))
        return _call(forward_kernel, launch, lists, specs, mask, (q, k, v), outputs, 2, static)


def _attend_bwd(static: _Static, saved, d_out):
    q, k, v, mask, out, log_total = saved
    with jax.named_scope("tree_attention_backward"):
        # sum_j weight_ij * d_weight_ij, the part of the softmax gradient shared by a query's keys.
        mean_grad = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
        inputs = (q, k, v, d_out, log_total, mean_grad)

        launch = static.launches.dq
        lists = lists_by_query(*_tiles(launch, q, k, mask, static))
        specs = _query_specs(launch, q, k)
        outputs = ((q, specs.q),)
        (dq,) = _call(dq_kernel, launch, lists, specs, mask, inputs, outputs, 3, static)

        launch = static.launches.dkv
        live, full = _tiles(launch, q, k, mask, static)
        lists = lists_by_query(live.swapaxes(1, 2), full.swapaxes(1, 2))
        specs = _key_specs(launch, q, k)
        outputs = ((k, specs.kv), (v, specs.kv))
        dk, dv = _call(dkv_kernel, launch, lists, specs, mask, inputs, outputs, 4, static)
    # Integers have no gradient.
    return dq, dk, dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)
