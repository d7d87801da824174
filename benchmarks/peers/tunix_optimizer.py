"""The optimizer of tunix's workers; runs in the environment `benchmarks/peers/tunix`."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax


def make_optimizer(settings: Mapping[str, float]) -> optax.GradientTransformation:
    """AdamW with clipping and weight decay on matrices only, as ours."""
    return optax.chain(
        optax.clip_by_global_norm(settings["clip_norm"]),
        optax.adamw(
            settings["learning_rate"],
            b1=settings["beta1"],
            b2=settings["beta2"],
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
            mask=matrices,
        ),
    )


def matrices(params):
    """Which parameters take weight decay."""
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)
