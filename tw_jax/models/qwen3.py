"""Qwen3 in Flax NNX: RMSNorm, QK-norm, grouped-query attention, RoPE, SwiGLU or experts.

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

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from tw_jax.models.config import Qwen3Config, check_positions
from tw_jax.models.layers import (
    Constrain,
    Embedding,
    Linear,
    RMSNorm,
    SwiGLU,
    unplaced,
)
from tw_jax.models.matrices import AdaptedMatrix, StoredMatrix, matmul
from tw_jax.models.moe import ObserveRouter, RunExperts, SparseSwiGLU, all_experts
from tw_jax.models.remat import Remat, name_layer_input, rematerialised
from tw_jax.models.rope import rotary_angles, rotate
from tw_jax.parallel.embedding import embedding_rows

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


# (embedding table, token ids) -> the tokens' rows of the table
LookUp = Callable[[Float[Array, "vocab hidden"], Int32[Array, "*b len"]], Float[Array, "..."]]

# (part of a layer that treats each token by itself, its inputs [*b len ...]) -> its outputs
RunTokenwise = Callable[..., Any]

_RESIDUAL = ("batch", "residual_length", "embed")


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the caller decides about the forward pass; see `Qwen3.hidden_states`."""

    attend: Attend
    constrain: Constrain
    run_experts: RunExperts
    run_tokenwise: RunTokenwise
    observe_router: ObserveRouter | None


def _all_tokens(part: Callable[..., Any], *inputs: Array) -> Any:
    return part(*inputs)


class SelfAttention(nnx.Module):
    """Grouped-query attention with RMSNorm on each query and key head."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        hidden = config.hidden_size
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear((hidden, query_width), ("embed", "heads"), config, rngs)
        self.k_proj = Linear((hidden, key_width), ("embed", "kv_heads"), config, rngs)
        self.v_proj = Linear((hidden, key_width), ("embed", "kv_heads"), config, rngs)
        self.o_proj = Linear((query_width, hidden), ("heads", "embed"), config, rngs)
        self.q_norm = RMSNorm(config.head_dim, "norm", config)
        self.k_norm = RMSNorm(config.head_dim, "norm", config)

    def __call__(self, x, rotation, hooks: "Hooks", layer, carry):
        """Returns what attention read `[*b len heads dim]` and the carry."""
        with jax.named_scope("qkv"):
            q, k, v = hooks.run_tokenwise(self._project, x, *rotation)
            q = hooks.constrain(q, ("batch", "length", "heads", "head_dim"))
            k = hooks.constrain(k, ("batch", "length", "kv_heads", "head_dim"))
            v = hooks.constrain(v, ("batch", "length", "kv_heads", "head_dim"))
        with jax.named_scope("attend"):
            return hooks.attend(q, k, v, layer, carry)

    def project_out(self, mixed: Float[Array, "*b len heads dim"], dtype):
        """Back to the width of the residual stream."""
        with jax.named_scope("o_proj"):
            return self.o_proj(mixed.astype(dtype).reshape(*mixed.shape[:-2], -1))

    def _project(self, x, cos, sin):
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).reshape(heads)), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).reshape(heads)), cos, sin)
        return q, k, self.v_proj(x).reshape(heads)


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, "norm", config)
        self.self_attn = SelfAttention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, "norm", config)
        self.mlp = SparseSwiGLU(config, rngs) if config.moe else SwiGLU(config, rngs)

    def __call__(self, x, rotation, hooks: "Hooks", layer, carry):
        """Returns the residual stream after this layer and the carry."""
        with jax.named_scope("attention"):
            mixed, carry = self.self_attn(self.input_layernorm(x), rotation, hooks, layer, carry)
        if isinstance(self.mlp, SwiGLU):
            x = hooks.run_tokenwise(functools.partial(self._finish, self.mlp, hooks), x, mixed)
        else:
            x, x_normed = hooks.run_tokenwise(self._mix, x, mixed)
            with jax.named_scope("mlp"):
                out, routing = self.mlp(x_normed, hooks.run_experts)
                if hooks.observe_router is not None:
                    carry = hooks.observe_router(routing, carry)
                x = x + out
        return hooks.constrain(x, _RESIDUAL), carry

    def _mix(self, x, mixed):
        """The residual stream behind attention, and normed."""
        with jax.named_scope("attention"):
            x = x + self.self_attn.project_out(mixed, x.dtype)
        with jax.named_scope("mlp"):
            return x, self.post_attention_layernorm(x)

    def _finish(self, mlp: SwiGLU, hooks: "Hooks", x, mixed):
        x, x_normed = self._mix(x, mixed)
        with jax.named_scope("mlp"):
            return x + mlp(x_normed, hooks.constrain)


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
        self.norm = RMSNorm(config.hidden_size, "norm", config)
        if not config.tie_word_embeddings:
            shape = (config.hidden_size, config.vocab_size)
            self.lm_head = Linear(shape, ("embed", "vocab"), config, rngs)

    def hidden_states(
        self,
        tokens: Int32[Array, "*b len"],
        positions: Int32[Array, "*b len"],
        attend: Attend,
        carry: Any = None,
        *,
        unroll: bool = False,
        remat: Remat = "none",
        layers: Sequence[Params] | None = None,
        constrain: Constrain | None = None,
        look_up: LookUp | None = None,
        run_experts: RunExperts | None = None,
        run_tokenwise: RunTokenwise | None = None,
        observe_router: ObserveRouter | None = None,
    ) -> tuple[Float[Array, "*b len hidden"], Any]:
        """Runs all layers and the final norm.

        Args:
          tokens: token ids.
          positions: rotary positions. Checked against `max_position_embeddings` when they are
            known at trace time; traced positions must be checked on the host.
          attend: mixes tokens; called once per layer.
          carry: first carry of `attend` and `observe_router`.
          unroll: a Python loop over the layers (decoding on CPU) in place of `lax.scan`.
          remat: what the backward pass keeps of each layer (`tw_jax.models.remat`).
          layers: each layer's own parameters (`unstack_layers`); implies `unroll`.
          constrain: places activations on a mesh: the residual stream after the embedding and
            after each layer, queries, keys and values, and the inner feed-forward activations of
            dense layers. None: as the compiler likes.
          look_up: finds the tokens' rows in the embedding table and returns them in the compute
            dtype, for callers that spread the table over devices. None: by index.
          run_experts: runs routed tokens through the experts, for callers that split the experts
            over devices. None: all of them here.
          run_tokenwise: runs the parts of a layer that treat each token by itself, for callers that
            know that the outputs of some tokens do not matter. None: on all of them.
          observe_router: called in each layer with experts, to record where tokens went in the
            carry; `attend` must hand that on. None: nothing is recorded.

        Returns:
          Hidden states after the final norm in the compute dtype, and the last carry.

        Raises:
          ValueError: concrete positions exceed `max_position_embeddings`.
          UserError: `remat` is unknown, or asks for memory that the device does not have.
        """
        hooks = Hooks(
            attend,
            unplaced if constrain is None else constrain,
            all_experts if run_experts is None else run_experts,
            _all_tokens if run_tokenwise is None else run_tokenwise,
            observe_router,
        )
        if not isinstance(positions, jax.core.Tracer):
            check_positions(self.config, np.asarray(positions))
        with jax.named_scope("embed"):
            table = self.embed_tokens.embedding.get_value()
            dtype = self.config.compute_dtype
            look_up = look_up or (lambda table, tokens: embedding_rows(table, tokens, dtype))
            if isinstance(table, AdaptedMatrix):
                x = table.rows(tokens, look_up).astype(dtype)
            else:
                x = look_up(table, tokens)
            x = hooks.constrain(x, _RESIDUAL)
        rotation = rotary_angles(positions, self.config)
        block_def, stacked_state = nnx.split(self.layers)

        def run_layer(state, layer):
            params, index = layer
            block = nnx.merge(block_def, params)
            x, carry = state
            return block(name_layer_input(x), rotation, hooks, index, carry), None

        if unroll or layers is not None:
            if layers is None:
                layers = _slices(nnx.to_pure_dict(stacked_state))
            state = (x, carry)
            for index, params in enumerate(layers):
                # The index is bound outside `checkpoint`, which would trace it.
                step = functools.partial(_unrolled_step, run_layer, index)
                state = rematerialised(step, remat, in_scan=False)(state, params)
        else:
            indices = jnp.arange(self.config.num_hidden_layers, dtype=jnp.int32)
            body = rematerialised(run_layer, remat, in_scan=True)
            pure = nnx.to_pure_dict(stacked_state)
            state, _ = jax.lax.scan(body, (x, carry), (pure, indices))
        x, carry = state
        with jax.named_scope("final_norm"):
            return self.norm(x), carry

    def logits(
        self,
        hidden: Float[Array, "*b hidden"],
        head: Float[Array, "hidden vocab"] | StoredMatrix | None = None,
    ) -> Float32[Array, "*b vocab"]:
        """Float32 next-token logits; `head` is an optional `head_matrix(params)`."""
        with jax.named_scope("lm_head"):
            if head is None and self.config.tie_word_embeddings:
                head = self.embed_tokens.embedding.get_value().T
            elif head is None:
                head = self.lm_head.kernel.get_value()
            return matmul(hidden, head)


def _unrolled_step(run_layer, index: int, state, params: Params):
    return run_layer(state, (params, index))[0]


def _slices(stacked: Params) -> tuple[Params, ...]:
    count = jax.tree.leaves(stacked)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count))


def unstack_layers(params: Params) -> tuple[Params, ...]:
    """Each layer's own parameters, for `hidden_states(layers=...)`."""
    return _slices(params["layers"])


def head_matrix(params: Params) -> Float[Array, "hidden vocab"] | StoredMatrix:
    """The LM head as one `[hidden, vocab]` matrix, tied or not, for `logits(head=...)`."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"]
    return params["embed_tokens"]["embedding"].T


@functools.cache
def graphdef(config: Qwen3Config) -> nnx.GraphDef:
    """The static half of the model; allocates no parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: Qwen3(config, nnx.Rngs(0))))


def _init(config: Qwen3Config, key: Array) -> Params:
    return nnx.to_pure_dict(nnx.state(Qwen3(config, nnx.Rngs(params=key))))


_init_here = jax.jit(_init, static_argnums=0)


def init_params(config: Qwen3Config, seed: int, shardings: Params | None = None) -> Params:
    """Fresh parameters: matrices from `normal(initializer_range)`, norm scales one.

    Args:
      config: the architecture.
      seed: the same seed gives the same values wherever they lie.
      shardings: tree of shardings, each parameter made where it belongs; None for one device.
    """
    if shardings is None:
        return _init_here(config, jax.random.key(seed))
    return jax.jit(_init, static_argnums=0, out_shardings=shardings)(config, jax.random.key(seed))


def abstract_params(config: Qwen3Config) -> Params:
    """Shapes and dtypes of the parameters; allocates none."""
    return jax.eval_shape(functools.partial(init_params, config, 0))


def param_axes(config: Qwen3Config) -> Params:
    """Names of every parameter's axes, in a tree like the parameters; see `tw_jax.models.layers`.

    Its leaves are tuples: `jax.tree.map(..., is_leaf=lambda x: isinstance(x, tuple))`.
    """
    model = nnx.eval_shape(lambda: Qwen3(config, nnx.Rngs(0)))
    tree: Params = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        *parents, name = map(str, path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        axes = variable.get_metadata("logical_axes")
        node[name] = ("layers", *axes) if parents[0] == "layers" else axes
    return tree
