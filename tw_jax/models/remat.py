"""What the backward pass keeps of each layer, by name.

| policy  | kept per layer, in tokens x width | recomputed |
|---|---|---|
| none    | everything | nothing |
| dots    | results of the matrix products and of attention | norms, rotations, activations |
| block   | the layer's input and its attention's result | everything but attention |
| full    | the layer's input | the layer |
| offload | the layer's input, in the host's memory | the layer |
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import jax
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

from tw_jax.errors import UserError
from tw_jax.kernels.residuals import ATTENTION_OUTPUT

Remat = Literal["none", "dots", "block", "full", "offload"]
_LAYER_INPUT = "layer_input"
_HOST = "pinned_host"

F = TypeVar("F", bound=Callable[..., Any])


def name_layer_input(x: jax.Array) -> jax.Array:
    """Marks the residual stream that enters a layer, for `offload`."""
    return checkpoint_name(x, _LAYER_INPUT)


def rematerialised(layer: F, remat: Remat, *, in_scan: bool) -> F:
    """The layer with a memory policy for its backward pass.

    Args:
      layer: a function of arrays that calls `name_layer_input` on its input.
      remat: the policy.
      in_scan: it is the body of a `lax.scan`, where XLA cannot merge the recomputation with the
        forward pass anyway and need not be kept from it.

    Raises:
      UserError: `offload` on a device without host memory; unknown policy.
    """
    if remat == "none":
        return layer
    if remat == "offload":
        _require_host_memory()
    policies: dict[str, Any] = {
        "dots": checkpoint_policies.save_from_both_policies(
            checkpoint_policies.dots_with_no_batch_dims_saveable,
            checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
        ),
        "block": checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
        "full": checkpoint_policies.nothing_saveable,
        "offload": checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_LAYER_INPUT],
            offload_src="device",
            offload_dst=_HOST,
        ),
    }
    if remat not in policies:
        raise UserError(f"remat={remat!r}: choose one of none, {', '.join(policies)}")
    saved = jax.checkpoint(layer, prevent_cse=not in_scan, policy=policies[remat])
    return cast(F, saved)


def _require_host_memory() -> None:
    device = jax.devices()[0]
    kinds = sorted({memory.kind for memory in device.addressable_memories()})
    if _HOST not in kinds:
        raise UserError(
            f"memory.remat=offload: {device.device_kind} has no {_HOST} memory (it has "
            f"{', '.join(kinds)}); choose full, which keeps layer inputs on the device"
        )
