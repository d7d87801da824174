"""The parts that every layer is made of; each parameter names its axes where it is declared.

Axis names, which the caller's sharding rules map to a mesh: "layers" (stacked blocks), "embed" (the
residual stream), "heads" (query heads times head width), "kv_heads" (the same for keys and
values), "head_dim", "mlp" (inner feed-forward width), "experts", "vocab" and "norm" (a norm's
scale); in activations also "batch", "length" and, between layers, "residual_length".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from tw_jax.models.config import Qwen3Config

# (activation, names of its axes) -> the same activation, placed: where activations live on a mesh
# is the caller's business. None stands for an axis of no name.
Constrain = Callable[[Array, tuple[str | None, ...]], Array]


def unplaced(x: Array, axes: tuple[str | None, ...]) -> Array:
    """The `Constrain` of a single device."""
    del axes
    return x


def matrix(shape: tuple[int, ...], axes: tuple[str, ...], config: Qwen3Config, rngs: nnx.Rngs):
    """A normally distributed parameter with names for its axes."""
    init = jax.nn.initializers.normal(config.initializer_range)
    value = init(rngs.params(), shape, jnp.dtype(config.param_dtype))
    return nnx.Param(value, logical_axes=axes)


def matmul(
    x: Float[Array, "*b inner"], kernel: Float[Array, "inner out"]
) -> Float32[Array, "*b out"]:
    """`x @ kernel` with inputs in x's dtype, accumulated and returned in float32.

    The float32 result is asked for explicitly: for a bfloat16 one, XLA's CPU backend would convert
    the inputs to float32 first, at half the speed. Off a mesh the product is made two-dimensional,
    since for the kernel's gradient that backend would otherwise write transposed copies of the
    activations (a third of a training step). On a mesh the axes stay apart: they may be sharded.
    """
    tokens = x.shape[:-1]
    if not _on_a_mesh():
        x = x.reshape(-1, x.shape[-1])
    out = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return out.reshape(*tokens, -1)


def _on_a_mesh() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale`, computed in float32."""

    def __init__(self, width: int, axis: str, config: Qwen3Config):
        self.scale = nnx.Param(jnp.ones(width, config.param_dtype), logical_axes=(axis,))
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "*b width"]) -> Float[Array, "*b width"]:
        """Normalises the last axis; keeps the dtype of `x`."""
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * inverse_rms * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """A matrix without bias, stored `[in, out]`."""

    def __init__(
        self,
        shape: tuple[int, int],
        axes: tuple[str, str],
        config: Qwen3Config,
        rngs: nnx.Rngs,
    ):
        self.kernel = matrix(shape, axes, config, rngs)

    def __call__(self, x: Float[Array, "*b inner"]) -> Float[Array, "*b out"]:
        """`x @ kernel` in the dtype of `x`.

        Where devices hold parts of a sum (of the product over `tensor`, of the kernel's gradient
        over the batch), they round their part to that dtype and then add: in bfloat16 that is half
        the traffic of float32 parts, which XLA would send otherwise.
        """
        if _on_a_mesh():
            kernel = self.kernel[...].astype(x.dtype)
            return jnp.matmul(x, kernel, preferred_element_type=x.dtype)
        return matmul(x, self.kernel[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """The token embedding table `[vocab, hidden]`."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = matrix(shape, ("vocab", "embed"), config, rngs)


class SwiGLU(nnx.Module):
    """Feed-forward layer `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear((hidden, inner), ("embed", "mlp"), config, rngs)
        self.up_proj = Linear((hidden, inner), ("embed", "mlp"), config, rngs)
        self.down_proj = Linear((inner, hidden), ("mlp", "embed"), config, rngs)

    def __call__(
        self, x: Float[Array, "*b len hidden"], constrain: Constrain
    ) -> Float[Array, "*b len hidden"]:
        """Maps each token on its own."""
        inner = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(constrain(inner, ("batch", "length", "mlp")))
