"""Mixture-of-experts feed-forward: each token passes through a few of many small networks.

1. Router: float32 softmax over all experts, the k largest, rescaled to a sum of one or not.
2. The token-expert pairs are sorted by expert, so that each expert's tokens are contiguous rows.
3. Three grouped matrix products, one expert's kernel per group of rows.
4. Each token's k results are fetched back and added up, weighted by the router.

The largest intermediate arrays hold `tokens * k` rows; none has a token and an expert axis but the
router's probabilities. Tokens are never dropped, whatever the balance.

`route` and `run_experts` are pure functions of arrays. With the experts split over a mesh axis, a
`shard_map` calls `run_experts` with its own kernels and the number of its first expert, and sums
the results over that axis.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from tw_jax.kernels.grouped_matmul import grouped_matmul
from tw_jax.models.config import MixtureOfExperts, Qwen3Config
from tw_jax.models.layers import Linear, matrix
from tw_jax.models.matrices import matmul
from tw_jax.models.quantized import QuantizedMatrix


class Routing(NamedTuple):
    """Which experts each token passes through.

    Attributes:
      experts: the chosen experts, likeliest first.
      weights: their weights in the sum of results.
      probabilities: the router's softmax over all experts.
    """

    experts: Int32[Array, "tokens chosen"]
    weights: Float32[Array, "tokens chosen"]
    probabilities: Float32[Array, "tokens experts"]


class ExpertKernels(NamedTuple):
    """The experts' matrices, stacked."""

    gate: Float[Array, "experts hidden inner"]
    up: Float[Array, "experts hidden inner"]
    down: Float[Array, "experts inner hidden"]


class RunExperts(Protocol):
    """How routed tokens get through the experts; `run_experts` unless the caller splits them."""

    def __call__(
        self, x: Float[Array, "tokens hidden"], routing: Routing, kernels: ExpertKernels
    ) -> Float32[Array, "tokens hidden"]:
        """Returns the weighted sum of each token's experts."""
        ...


class ObserveRouter(Protocol):
    """What the caller makes of the routing, for example `add_router_load`."""

    def __call__(self, routing: Routing, carry: Any) -> Any:
        """Called once per layer with the flattened tokens; returns the carry for the next one."""
        ...


def route(logits: Float32[Array, "tokens experts"], moe: MixtureOfExperts) -> Routing:
    """The k likeliest experts of each token and their weights."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, moe.num_experts_per_tok)
    if moe.norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(experts, weights, probabilities)


def run_experts(
    x: Float[Array, "tokens hidden"],
    routing: Routing,
    kernels: ExpertKernels,
    first_expert: int | Int32[Array, ""] = 0,
) -> Float32[Array, "tokens hidden"]:
    """Weighted sum of the results of each token's experts, as far as they are among `kernels`.

    Args:
      x: the tokens.
      routing: `route`'s choice among all experts.
      kernels: matrices of the experts `first_expert ..` in order.
      first_expert: number of the first one; other experts' shares of the sum are left out.
    """
    tokens, chosen = routing.experts.shape
    count = kernels.gate.shape[0]
    with jax.named_scope("sort_by_expert"):
        expert = routing.experts.reshape(-1) - first_expert
        mine = (expert >= 0) & (expert < count)
        # Pairs of other experts come last, behind all groups.
        order = jnp.argsort(jnp.where(mine, expert, count), stable=True)
        group_sizes = jnp.sum(expert[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
        rows = x[order // chosen]
    with jax.named_scope("experts"):
        gate = grouped_matmul(rows, kernels.gate, group_sizes).astype(x.dtype)
        up = grouped_matmul(rows, kernels.up, group_sizes).astype(x.dtype)
        out = grouped_matmul(jax.nn.silu(gate) * up, kernels.down, group_sizes)
    with jax.named_scope("sum_by_token"):
        back = jnp.argsort(order)  # where in the sorted rows each pair went
        out = out[back].reshape(tokens, chosen, -1)
        return jnp.sum(out * routing.weights[..., None], axis=1)


def all_experts(
    x: Float[Array, "tokens hidden"], routing: Routing, kernels: ExpertKernels
) -> Float32[Array, "tokens hidden"]:
    """The `RunExperts` of a single device."""
    return run_experts(x, routing, kernels)


class SparseSwiGLU(nnx.Module):
    """Feed-forward layer of `num_experts` SwiGLU networks and a router."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        assert config.moe is not None
        self.moe = config.moe
        width = (config.hidden_size, config.moe.num_experts)
        self.router = Linear(width, ("embed", "experts"), config, rngs)
        self.experts = Experts(config, rngs)

    def __call__(
        self, x: Float[Array, "*b hidden"], run: RunExperts
    ) -> tuple[Float[Array, "*b hidden"], Routing]:
        """Maps each token on its own; returns also where it went."""
        tokens = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            routing = route(matmul(tokens, self.router.kernel[...]), self.moe)
        out = run(tokens, routing, self.experts.kernels())
        return out.astype(x.dtype).reshape(x.shape), routing


class Experts(nnx.Module):
    """The stacked matrices of one layer's experts."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        assert config.moe is not None
        count, inner = config.moe.num_experts, config.moe.moe_intermediate_size
        hidden = config.hidden_size
        widen = ("experts", "embed", "mlp"), config, rngs
        self.gate_proj = Stack((count, hidden, inner), *widen)
        self.up_proj = Stack((count, hidden, inner), *widen)
        self.down_proj = Stack((count, inner, hidden), ("experts", "mlp", "embed"), config, rngs)

    def kernels(self) -> ExpertKernels:
        """The three stacks."""
        stacks = (self.gate_proj, self.up_proj, self.down_proj)
        return ExpertKernels(*(stack.dense() for stack in stacks))


class Stack(nnx.Module):
    """One matrix per expert, each stored `[in, out]`."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        axes: tuple[str, str, str],
        config: Qwen3Config,
        rngs: nnx.Rngs,
    ):
        self.kernel = matrix(shape, axes, config, rngs)
        self.dtype = config.compute_dtype

    def dense(self) -> Float[Array, "experts inner out"]:
        """The matrices as arrays: quantised ones in the compute dtype, others as they are."""
        kernel = self.kernel.get_value()
        return kernel.dequantized(self.dtype) if isinstance(kernel, QuantizedMatrix) else kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterLoad:
    """Sums over tokens and layers, from which the load-balancing loss is computed.

    Attributes:
      chosen: how often each expert was chosen.
      probability: sum of each expert's probabilities.
      tokens: tokens counted, once per layer.
    """

    chosen: Float32[Array, " experts"]
    probability: Float32[Array, " experts"]
    tokens: Float32[Array, ""]


def no_router_load(moe: MixtureOfExperts) -> RouterLoad:
    """The load before the first layer."""
    nothing = jnp.zeros(moe.num_experts, jnp.float32)
    return RouterLoad(nothing, nothing, jnp.zeros((), jnp.float32))


def add_router_load(
    load: RouterLoad, routing: Routing, counted: Float32[Array, " tokens"]
) -> RouterLoad:
    """Adds one layer's load.

    Args:
      load: the load so far.
      routing: the layer's routing.
      counted: 1 for tokens that count, 0 for padding.
    """
    experts = routing.probabilities.shape[-1]
    times = jnp.repeat(counted, routing.experts.shape[-1])
    chosen = jnp.zeros(experts, jnp.float32).at[routing.experts.reshape(-1)].add(times)
    return RouterLoad(
        load.chosen + chosen,
        load.probability + jnp.sum(counted[:, None] * routing.probabilities, axis=0),
        load.tokens + counted.sum(),
    )


def load_balancing_loss(load: RouterLoad) -> Float32[Array, ""]:
    """`experts * sum_e share_e * probability_e` (Switch Transformer, equations 4 to 6).

    Shares and mean probabilities are taken over all layers together, as transformers does. It is
    `num_experts_per_tok` for a uniform router and more for an unbalanced one.
    """
    tokens = jnp.maximum(load.tokens, 1.0)
    product = (load.chosen / tokens) * (load.probability / tokens)
    return load.chosen.shape[0] * jnp.sum(product)
