"""The policy that a KL term holds on to: the start, or one that follows the policy."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tw_jax.config_checks import require_at_least


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """What the KL term compares the policy with.

    Attributes:
      kind: "frozen": the model that the run starts from; "copy": the policy as it was at the last
        multiple of `every_steps`; "average": an exponential moving average of the policy.
      every_steps: "copy": steps between copies.
      decay: "average": share of the old average that every step keeps.
    """

    kind: Literal["frozen", "copy", "average"] = "frozen"
    every_steps: int = 100
    decay: float = 0.99

    def __post_init__(self) -> None:
        require_at_least(self, every_steps=1)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay}: must lie in [0, 1)")

    @property
    def moves(self) -> bool:
        """Whether the reference changes in the run, and belongs into its checkpoints."""
        return self.kind != "frozen"


def next_reference(config: ReferenceConfig, reference: Any, params: Any, step: int) -> Any:
    """The reference after a step.

    Args:
      config: how it moves.
      reference: what it was before the step, a tree like `params`; given up by a reference that
        moves (its buffers are donated).
      params: what is trained (under an adapter, the adapter), after the step.
      step: steps taken, from 1.

    Returns:
      The next reference, which shares no buffer with `params`: an update may donate those.
    """
    if config.kind == "average":
        return _averaged(reference, params, config.decay)
    if config.kind == "copy" and step % config.every_steps == 0:
        return jax.tree.map(jnp.copy, params)
    return reference


@functools.partial(jax.jit, donate_argnums=0)
def _averaged(reference: Any, params: Any, decay: float) -> Any:
    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        # In float32: in bfloat16 a small step would be lost in rounding.
        exact = decay * old.astype(jnp.float32) + (1 - decay) * new.astype(jnp.float32)
        return exact.astype(old.dtype)

    return jax.tree.map(average, reference, params)
