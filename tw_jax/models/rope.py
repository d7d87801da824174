"""Rotary position embedding, plain and stretched to contexts longer than the trained one.

The frequencies are those that transformers computes, in float32; they depend on the configuration
alone and are constants of the compiled program.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from tw_jax.models.config import Qwen3Config, RopeScaling


def frequencies(config: Qwen3Config) -> tuple[Float32[np.ndarray, " half"], float]:
    """Radians per position of each pair of channels, and the factor on cosine and sine."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    wavelength = np.power(np.float32(config.rope_theta), exponent)
    plain = np.float32(1) / wavelength
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / np.float32(scaling.factor), 1.0
    slowed = np.float32(1) / (np.float32(scaling.factor) * wavelength)
    keep = np.float32(1) - _yarn_ramp(config, scaling)
    return slowed * (np.float32(1) - keep) + plain * keep, attention_factor(scaling)


def _yarn_ramp(config: Qwen3Config, scaling: RopeScaling) -> Float32[np.ndarray, " half"]:
    """Share of the slowed frequency in each pair of channels (YaRN, section 3.2)."""

    def pair_that_turns(times: float | None) -> float:
        """Index of the pair that turns so many times within the trained context."""
        assert times is not None and scaling.original_max_position_embeddings is not None
        ratio = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return config.head_dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001  # a step, where a ramp would divide by zero
    pairs = np.arange(config.head_dim // 2, dtype=np.float32)
    return np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1, dtype=np.float32)


def attention_factor(scaling: RopeScaling) -> float:
    """What YaRN multiplies cosine and sine by (YaRN, section 3.4, and DeepSeek's mscales)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def temperature(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


def rotary_angles(
    positions: Int32[Array, "*b len"], config: Qwen3Config
) -> tuple[Float32[Array, "*b len 1 half"], Float32[Array, "*b len 1 half"]]:
    """Cosine and sine of each position's rotation, ready to broadcast over heads."""
    turns, factor = frequencies(config)
    angle = positions[..., None, None].astype(jnp.float32) * turns
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
    x: Float[Array, "*b len heads dim"],
    cos: Float32[Array, "*b len 1 half"],
    sin: Float32[Array, "*b len 1 half"],
) -> Float[Array, "*b len heads dim"]:
    """Rotates pair (i, i + half) of the last axis; float32 inside, dtype of `x` outside."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
