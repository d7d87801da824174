"""Mixtures of experts on a mesh: every device runs its own experts on all tokens of its group.

The devices along the `expert` axis hold different experts and different tokens. For one layer

1. each gathers the tokens of the others, with the experts that the router chose for them;
2. runs those that it holds, which is a part of each token's sum;
3. the parts are added up and scattered back to where the tokens came from.

No capacity, no dropped tokens, and the result is that of a single device whatever the balance.
"""

import jax
from jaxtyping import Array

from tw_jax.models.moe import ExpertKernels, Routing, RunExperts, run_experts
from tw_jax.parallel.layout import Layout


def experts_on(layout: Layout) -> RunExperts:
    """The `run_experts` of a model on a mesh."""
    # Tokens come flattened from rows and columns; a device works on those of its rows.
    tokens = layout.spec(("batch", None))
    widen, narrow = layout.spec(("experts", None, "mlp")), layout.spec(("experts", "mlp", None))
    expert_axes, sum_axes = layout.mesh_axes(("experts", "mlp"))

    def local(x: Array, routing: Routing, gate: Array, up: Array, down: Array) -> Array:
        kernels = ExpertKernels(gate, up, down)
        first = 0
        if expert_axes:
            x = jax.lax.all_gather(x, expert_axes, tiled=True)
            routing = Routing(*(jax.lax.all_gather(r, expert_axes, tiled=True) for r in routing))
            first = jax.lax.axis_index(expert_axes) * gate.shape[0]
        out = run_experts(x, routing, kernels, first)
        if expert_axes:
            out = jax.lax.psum_scatter(out, expert_axes, scatter_dimension=0, tiled=True)
        return jax.lax.psum(out, sum_axes) if sum_axes else out

    spread = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(tokens, tokens, widen, widen, narrow),
        out_specs=tokens,
        # What `tensor` and `context` replicate here, they replicate outside as well.
        check_vma=False,
    )
    return lambda x, routing, kernels: spread(x, routing, *kernels)
