"""The parts that every layer is made of; each parameter names its axes where it is declared.

Axis names, which the caller's sharding rules map to a mesh: "layers" (stacked blocks), "embed" (the
residual stream), "heads" (query heads times head width), "kv_heads" (the same for keys and
values), "head_dim", "mlp" (inner feed-forward width), "experts", "vocab", "norm" (a norm's scale)
and "lora_rank" (of adapters); in activations also "batch", "length" and, between layers,
"residual_length".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tw_jax.models.config import Qwen3Config
from tw_jax.models.matrices import matmul, on_a_mesh

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
        dtype = x.dtype if on_a_mesh() else jnp.float32
        return matmul(x, self.kernel.get_value(), dtype).astype(x.dtype)


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
