"""Qwen3 (dense) in Flax NNX: RMSNorm, QK-norm, grouped-query attention, RoPE, SwiGLU.

The module declares parameters and the forward pass; how tokens attend to each other is the
caller's business, passed as `attend`. Training closes it over a tree mask, the rollout engine
over a KV cache, so both run exactly this forward.

The module is split once into a static `graphdef(config)` and a pure nested dict of arrays,
`params`, whose block parameters are stacked on axis 0 under "layers". Hot paths are plain
functions of that dict:

    model = nnx.merge(graphdef, params)                      # inside jit; costs nothing
    hidden, _ = model.hidden_states(tokens, positions, attend)
    logits = model.logits(hidden)

A decoding loop on CPU should not slice stacked weights or transpose a tied embedding in every
step. It does both once, outside its `while_loop`:

    layers, head = unstack_layers(params), head_matrix(params)
    hidden, cache = model.hidden_states(tokens, positions, attend, cache, layers=layers)
    logits = model.logits(hidden, head)

Names follow the checkpoints of the Hugging Face implementation; matrices are stored `[in, out]`.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from tw_jax.models.config import Qwen3Config, check_positions

Params = dict[str, Any]


class Attend(Protocol):
    """How tokens attend to each other: the mask or the cache lives in the closure."""

    def __call__(
        self,
        q: Float[Array, "*b len heads dim"],
        k: Float[Array, "*b len kv_heads dim"],
        v: Float[Array, "*b len kv_heads dim"],
        layer: int | Int32[Array, ""],
        carry: Any,
    ) -> tuple[Float[Array, "*b len heads dim"], Any]:
        """Returns the attention output and the carry for the next layer.

        `q` and `k` are normed and rotated already. `layer` is a Python int in an unrolled model
        and traced in a scanned one. `carry` is threaded through the layers (a KV cache).
        """
        ...


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
    if jax.sharding.get_abstract_mesh().empty:
        x = x.reshape(-1, x.shape[-1])
    out = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return out.reshape(*tokens, -1)


def rotary_angles(
    positions: Int32[Array, "*b len"], config: Qwen3Config
) -> tuple[Float32[Array, "*b len 1 half"], Float32[Array, "*b len 1 half"]]:
    """Cosine and sine of each position's rotation, ready to broadcast over heads."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angle = positions[..., None, None].astype(jnp.float32) * config.rope_theta**-exponent
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "*b len heads dim"],
    cos: Float32[Array, "*b len 1 half"],
    sin: Float32[Array, "*b len 1 half"],
) -> Float[Array, "*b len heads dim"]:
    """Rotary embedding in float32; element i is paired with element i + dim / 2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale`, computed in float32."""

    def __init__(self, width: int, config: Qwen3Config):
        self.scale = nnx.Param(jnp.ones(width, config.param_dtype))
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "*b width"]) -> Float[Array, "*b width"]:
        """Normalises the last axis; keeps the dtype of `x`."""
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * inverse_rms * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """A matrix without bias, stored `[in, out]`."""

    def __init__(self, inner: int, out: int, config: Qwen3Config, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.initializer_range)
        self.kernel = nnx.Param(init(rngs.params(), (inner, out), jnp.dtype(config.param_dtype)))

    def __call__(self, x: Float[Array, "*b inner"]) -> Float[Array, "*b out"]:
        """`x @ kernel` in the dtype of `x`."""
        return matmul(x, self.kernel[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """The token embedding table `[vocab, hidden]`."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.initializer_range)
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(init(rngs.params(), shape, jnp.dtype(config.param_dtype)))


class SelfAttention(nnx.Module):
    """Grouped-query attention with RMSNorm on each query and key head."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_width, config, rngs)
        self.k_proj = Linear(config.hidden_size, key_width, config, rngs)
        self.v_proj = Linear(config.hidden_size, key_width, config, rngs)
        self.o_proj = Linear(query_width, config.hidden_size, config, rngs)
        self.q_norm = RMSNorm(config.head_dim, config)
        self.k_norm = RMSNorm(config.head_dim, config)

    def __call__(self, x, rotation, attend: Attend, layer, carry):
        """Returns the mixed tokens `[*b len hidden]` and the attention's carry."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        with jax.named_scope("qkv"):
            q = rotate(self.q_norm(self.q_proj(x).reshape(heads)), *rotation)
            k = rotate(self.k_norm(self.k_proj(x).reshape(heads)), *rotation)
            v = self.v_proj(x).reshape(heads)
        with jax.named_scope("attend"):
            out, carry = attend(q, k, v, layer, carry)
        with jax.named_scope("o_proj"):
            return self.o_proj(out.astype(x.dtype).reshape(*x.shape[:-1], -1)), carry


class SwiGLU(nnx.Module):
    """Feed-forward layer `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, config, rngs)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config, rngs)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config, rngs)

    def __call__(self, x: Float[Array, "*b hidden"]) -> Float[Array, "*b hidden"]:
        """Maps each token on its own."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = SelfAttention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.mlp = SwiGLU(config, rngs)

    def __call__(self, x, rotation, attend: Attend, layer, carry):
        """Returns the residual stream after this layer and the attention's carry."""
        with jax.named_scope("attention"):
            mixed, carry = self.self_attn(self.input_layernorm(x), rotation, attend, layer, carry)
            x = x + mixed
        with jax.named_scope("mlp"):
            return x + self.mlp(self.post_attention_layernorm(x)), carry


class Qwen3(nnx.Module):
    """The Qwen3 language model; see the module docstring for how it is used."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config, rngs)

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.layers = stacked_blocks(rngs)
        self.norm = RMSNorm(config.hidden_size, config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, config, rngs)

    def hidden_states(
        self,
        tokens: Int32[Array, "*b len"],
        positions: Int32[Array, "*b len"],
        attend: Attend,
        carry: Any = None,
        *,
        unroll: bool = False,
        remat: bool = False,
        layers: Sequence[Params] | None = None,
    ) -> tuple[Float[Array, "*b len hidden"], Any]:
        """Runs all layers and the final norm.

        Args:
          tokens: token ids.
          positions: rotary positions. Checked against `max_position_embeddings` when they are
            known at trace time; traced positions must be checked on the host.
          attend: mixes tokens; called once per layer.
          carry: first carry of `attend`.
          unroll: a Python loop over the layers (decoding on CPU) in place of `lax.scan`.
          remat: recompute each layer in the backward pass instead of keeping its activations.
          layers: each layer's own parameters (`unstack_layers`); implies `unroll`.

        Returns:
          Hidden states after the final norm in the compute dtype, and the last carry.

        Raises:
          ValueError: concrete positions exceed `max_position_embeddings`.
        """
        if not isinstance(positions, jax.core.Tracer):
            check_positions(self.config, np.asarray(positions))
        with jax.named_scope("embed"):
            x = self.embed_tokens.embedding[...][tokens].astype(self.config.compute_dtype)
        rotation = rotary_angles(positions, self.config)
        block_def, stacked_state = nnx.split(self.layers)

        def run_layer(state, layer):
            params, index = layer
            block = nnx.merge(block_def, params)
            x, carry = state
            return block(x, rotation, attend, index, carry), None

        if unroll or layers is not None:
            if layers is None:
                layers = _slices(nnx.to_pure_dict(stacked_state))
            state = (x, carry)
            for index, params in enumerate(layers):
                # The index is bound outside `checkpoint`, which would trace it.
                step = functools.partial(_unrolled_step, run_layer, index)
                state = (jax.checkpoint(step) if remat else step)(state, params)
        else:
            indices = jnp.arange(self.config.num_hidden_layers, dtype=jnp.int32)
            # Inside a scan, XLA cannot merge the recomputation with the forward pass anyway.
            body = jax.checkpoint(run_layer, prevent_cse=False) if remat else run_layer
            pure = nnx.to_pure_dict(stacked_state)
            state, _ = jax.lax.scan(body, (x, carry), (pure, indices))
        x, carry = state
        with jax.named_scope("final_norm"):
            return self.norm(x), carry

    def logits(
        self,
        hidden: Float[Array, "*b hidden"],
        head: Float[Array, "hidden vocab"] | None = None,
    ) -> Float32[Array, "*b vocab"]:
        """Float32 next-token logits; `head` is an optional `head_matrix(params)`."""
        with jax.named_scope("lm_head"):
            if head is None and self.config.tie_word_embeddings:
                head = self.embed_tokens.embedding[...].T
            elif head is None:
                head = self.lm_head.kernel[...]
            return matmul(hidden, head)


def _unrolled_step(run_layer, index: int, state, params: Params):
    return run_layer(state, (params, index))[0]


def _slices(stacked: Params) -> tuple[Params, ...]:
    count = jax.tree.leaves(stacked)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count))


def unstack_layers(params: Params) -> tuple[Params, ...]:
    """Each layer's own parameters, for `hidden_states(layers=...)`."""
    return _slices(params["layers"])


def head_matrix(params: Params) -> Float[Array, "hidden vocab"]:
    """The LM head as one `[hidden, vocab]` matrix, tied or not, for `logits(head=...)`."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"]
    return params["embed_tokens"]["embedding"].T


@functools.cache
def graphdef(config: Qwen3Config) -> nnx.GraphDef:
    """The static half of the model; allocates no parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: Qwen3(config, nnx.Rngs(0))))


@functools.partial(jax.jit, static_argnums=0)
def _init(config: Qwen3Config, key: Array) -> Params:
    return nnx.to_pure_dict(nnx.state(Qwen3(config, nnx.Rngs(params=key))))


def init_params(config: Qwen3Config, seed: int) -> Params:
    """Fresh parameters: matrices from `normal(initializer_range)`, norm scales one."""
    return _init(config, jax.random.key(seed))
