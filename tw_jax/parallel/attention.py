"""Tree attention on a mesh: each device runs the kernel on its rows, heads and queries.

Rows are independent, and so are heads; over the `context` axis a device holds a part of each row's
queries and gathers all of its keys and values, one layer at a time. The mask needs no care: a
key's visibility is a range of absolute query indices, so a device only has to know where its
queries begin. Gradients of keys and values are scattered back by the transposed gather.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from tw_jax.errors import UserError
from tw_jax.kernels.attention import best_backend, platform_of, tree_attention
from tw_jax.kernels.tile_plan import Hidden, TilePlan, plan_tiles
from tw_jax.parallel.layout import Layout

_ROWS = ("batch",)
_TOKENS = ("batch", None)
_Q = ("batch", "length", "heads", None)
_KV = ("batch", "length", "kv_heads", None)


def backend_on(layout: Layout | None, choice: str = "auto") -> str:
    """The backend of `tree_attention`: the choice, or for `auto` the best one for the devices.

    With a layout those are its mesh's devices, which need not exist: a program may be compiled
    ahead of time for a TPU on a machine that has none.
    """
    if choice != "auto":
        return choice
    if layout is None:
        return best_backend(jax.devices()[0])
    return best_backend(layout.mesh.devices.flat[0])


def check_backend(layout: Layout | None, choice: str) -> None:
    """Refuses a kernel that the devices cannot run, before anything is made or compiled.

    Raises:
      UserError: the kernel is for other devices.
    """
    device = jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
    if choice not in ("auto", "xla", best_backend(device)):
        raise UserError(
            f"memory.attention={choice}: that kernel is not for the devices here, which are "
            f"{platform_of(device)}: take auto or xla"
        )


def plan_tiles_on(
    layout: Layout | None,
    visible_end: Int32[Array, "rows len"],
    hidden: Hidden | None,
    *,
    backend: str,
    group: int,
) -> TilePlan:
    """`plan_tiles` for every device's part of the batch; without a layout, for all of it.

    On a mesh the lists of all devices lie one after another along axis 0, and the static sizes are
    those of one device.
    """
    if layout is None:
        return plan_tiles(visible_end, hidden, backend=backend, group=group)
    parts = layout.size("length")

    def local(end: Array, bounds: tuple[Array, ...]) -> TilePlan:
        q_len = end.shape[1] // parts if parts > 1 else None
        start = _query_start(layout, end.shape[1])
        plan = plan_tiles(
            end, _hidden(bounds), backend=backend, group=group, q_start=start, q_len=q_len
        )
        return jax.tree.map(lambda leaf: jnp.atleast_1d(leaf), plan)

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(layout.spec(_TOKENS), layout.spec((None, *_TOKENS))),
        out_specs=_plan_spec(layout),
        check_vma=False,
    )(visible_end, hidden or ())


def tree_attention_on(
    layout: Layout | None,
    q: Float[Array, "rows len heads dim"],
    k: Float[Array, "rows len kv_heads dim"],
    v: Float[Array, "rows len kv_heads dim"],
    visible_end: Int32[Array, "rows len"],
    hidden: Hidden | None,
    plan: TilePlan,
) -> Float[Array, "rows len heads dim"]:
    """`tree_attention` spread over the mesh; `plan` comes from `plan_tiles_on` of this layout.

    The backend is the plan's.
    """
    if layout is None:
        return tree_attention(q, k, v, visible_end, hidden, plan=plan)

    def local(q, k, v, end, bounds, plan: TilePlan):
        if context := layout.mesh_axes(("length",))[0]:
            k, v = _gather_tokens(k, v, context)
        plan = dataclasses.replace(plan, count=plan.count[0], q_start=plan.q_start[0])
        return tree_attention(q, k, v, end, _hidden(bounds), plan=plan)

    tokens = layout.spec(_TOKENS)
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(
            layout.spec(_Q),
            layout.spec(_KV),
            layout.spec(_KV),
            tokens,
            layout.spec((None, *_TOKENS)),
            _plan_spec(layout),
        ),
        out_specs=layout.spec(_Q),
        check_vma=False,
    )(q, k, v, visible_end, hidden or (), plan)


def _gather_tokens(
    k: Float[Array, "rows part kv_heads dim"],
    v: Float[Array, "rows part kv_heads dim"],
    axes: tuple[str, ...],
) -> list[Float[Array, "rows len kv_heads dim"]]:
    """Keys and values of whole rows, in one transfer.

    Tokens are the first of two axes meanwhile: of other shapes the TPU compiler makes the
    transposed gather, which scatters the gradients back, an all-reduce of twice the traffic.
    """
    rows, part, kv_heads, dim = k.shape
    tokens_first = jnp.concatenate([k, v], axis=2).swapaxes(0, 1).reshape(part, -1)
    whole = jax.lax.all_gather(tokens_first, axes, axis=0, tiled=True)
    whole = whole.reshape(-1, rows, 2 * kv_heads, dim).swapaxes(0, 1)
    return jnp.split(whole, 2, axis=2)


def _hidden(bounds: tuple[Array, ...]) -> Hidden | None:
    return (bounds[0], bounds[1]) if bounds else None


def _query_start(layout: Layout, row_len: int) -> int | Int32[Array, ""]:
    """Index in the row of this device's first query."""
    context = layout.mesh_axes(("length",))[0]
    return jax.lax.axis_index(context) * (row_len // layout.size("length")) if context else 0


def _plan_spec(layout: Layout) -> P:
    """Leaves of a plan: one list per part of the rows and, under `context`, of their queries."""
    rows, queries = layout.mesh_axes(("batch", "length"))
    return P((*rows, *queries) or None)
