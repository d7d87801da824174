"""AdamW with warm-up, clipping by global norm and weight decay on matrices only.

The learning rate is a function of the train state's `step`, not of a counter inside the
optimizer: an update that is skipped (`tw_jax.train.state.apply_gradients`) leaves the optimizer's
state untouched, yet the schedule stays aligned with the data.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

from tw_jax.errors import UserError

_STACKED_LAYERS = "layers"  # the key of models' parameters whose axis 0 counts layers


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
      learning_rate: peak learning rate, reached at the end of the warm-up.
      final_learning_rate_fraction: the cosine schedule ends at this fraction of the peak; the
        constant schedule has no end and does not read it.
      warmup_steps: the learning rate rises linearly during this many steps.
      schedule: what follows the warm-up.
      beta1: decay of the gradient's running mean.
      beta2: decay of the squared gradient's running mean.
      eps: added to the root of the squared gradient's mean.
      weight_decay: decoupled decay, times the learning rate; applied to matrices only, never to
        norm scales or biases.
      clip_norm: gradients of a larger global norm are scaled down to it; inf (`.inf` in YAML) for
        no clipping.
    """

    learning_rate: float
    final_learning_rate_fraction: float = 0.1
    warmup_steps: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self):
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate}: must be positive and finite")
        if not 0 <= self.final_learning_rate_fraction <= 1:
            raise ValueError(
                f"final_learning_rate_fraction={self.final_learning_rate_fraction}: "
                "must lie in [0, 1]"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}: must not be negative")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule={self.schedule!r}: choose cosine or constant")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must lie in [0, 1)")
        for name in ("eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay={self.weight_decay}: must be finite, not negative")


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of each step, counted from 0.

    With `w` warm-up steps, step `t < w` uses `peak * (t + 1) / (w + 1)`, so that no step is wasted
    on a rate of 0, and step `w` is the first at the peak. A cosine then falls to
    `peak * final_learning_rate_fraction`, which it reaches at `t = total_steps` and keeps.

    Args:
      config: the optimizer's configuration.
      total_steps: steps of the whole run, warm-up included.

    Returns:
      A function of a step, a Python or traced integer, to the learning rate in float32.

    Raises:
      UserError: the run is shorter than its warm-up.
    """
    if total_steps < 1 or config.warmup_steps >= total_steps:
        raise UserError(
            f"the optimizer's warmup_steps={config.warmup_steps} must be smaller than the run's "
            f"number of steps, {total_steps}: shorten the warm-up or train for longer"
        )
    peak = config.learning_rate
    warmup = config.warmup_steps
    floor = config.final_learning_rate_fraction

    def schedule(step: Any) -> Float32[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        rising = jnp.minimum((step + 1) / (warmup + 1), 1.0)
        if config.schedule == "constant":
            return peak * rising
        progress = jnp.clip((step - warmup) / (total_steps - warmup), 0.0, 1.0)
        falling = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return peak * rising * falling

    return schedule


def decayed(params: Any) -> Any:
    """Which parameters are matrices, and so take weight decay.

    A vector (norm scale, bias) of the stacked layers has two axes, of which the first counts
    layers, so the number of axes alone would not tell.

    Args:
      params: pure nested dict of arrays; those under the key "layers" are stacked on axis 0.

    Returns:
      A tree of the same structure that holds bools.
    """

    def is_matrix(path: tuple, leaf: Any) -> bool:
        stacked = any(getattr(key, "key", None) == _STACKED_LAYERS for key in path)
        return jnp.ndim(leaf) - stacked >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(
    config: OptimizerConfig, total_steps: int
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer: clip, Adam, decay, then minus the learning rate.

    Its `update` needs the keyword `step`, which `tw_jax.train.state.apply_gradients` passes.

    Args:
      config: the optimizer's configuration.
      total_steps: steps of the whole run.

    Returns:
      The gradient transformation. Its state has the shapes and shardings of the parameters.

    Raises:
      UserError: the run is shorter than its warm-up.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        _scale_by_learning_rate_at_step(learning_rate_schedule(config, total_steps)),
    )


def _scale_by_learning_rate_at_step(
    schedule: optax.Schedule,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus the learning rate of the step that the caller names."""

    def update(updates: Any, state: Any, params: Any = None, **context: Any) -> tuple[Any, Any]:
        del params
        rate = jnp.asarray(schedule(context["step"]))
        return jax.tree.map(lambda u: (-rate * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
