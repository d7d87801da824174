"""One optimizer update, in three numbered sentences.

1. Every micro-batch gives the gradient of a *sum* over its tokens, and the sum of their weights;
   both are added up, never averaged.
2. After the last micro-batch one division turns sums into the global weighted mean, so that how
   tokens were split into rows, micro-batches or devices changes nothing. (A router's load-balancing
   loss, off unless the model's configuration turns it on, is a property of a whole micro-batch; it
   is averaged over micro-batches by their weight.)
3. The optimizer takes the mean gradient; a non-finite one skips the update and is counted, and so
   does a batch in which nothing has weight.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float32

from tw_jax.config_checks import require_at_least
from tw_jax.data.packed_batch import PackedBatch
from tw_jax.models.qwen3 import Params
from tw_jax.models.remat import Remat
from tw_jax.parallel.layout import Layout
from tw_jax.train.lm_head import EntropyUse
from tw_jax.train.scoring import Scores, score_tokens
from tw_jax.train.state import TrainState, apply_gradients

# (what is trained, what is not) -> the parameters of a forward pass; see `tw_jax.train.trainable`.
Assemble = Callable[[Params, Params | None], Params]

# (params, batch) -> (weighted sum of losses, metric sums); "weight" must be among the sums, and
# keys that begin with "max_" are combined by maximum.
SumLoss = Callable[[Params, PackedBatch], tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]]


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """What the backward pass keeps, how wide the LM head runs, and the kernel of attention.

    Attributes:
      remat: what the backward pass keeps of each layer. "none": everything; "dots": results of
        matrix products and attention; "block": the layer's input and its attention's result;
        "full": the input alone; "offload": the input, in the host's memory. The rest is
        recomputed.
      head_chunk: tokens per chunk of LM head and log-softmax, on each device.
      attention: kernel of tree attention. "xla" runs everywhere, "tpu" is for TPUs, "gpu" for
        NVIDIA's GPUs; "auto" is the best one for the devices.
    """

    remat: Remat = "none"
    head_chunk: int = 4096
    attention: Literal["auto", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self) -> None:
        require_at_least(self, head_chunk=1)


def nll_sum(graphdef: nnx.GraphDef, memory: MemoryConfig, layout: Layout | None = None) -> SumLoss:
    """SFT: sum of weighted negative log-probabilities (DESIGN section 7)."""
    score = scorer(graphdef, memory, layout)

    def loss(params: Params, batch: PackedBatch):
        scores = score(params, batch)
        weighted = batch.loss_weight * scores.logprobs
        total = -jnp.sum(jnp.where(batch.loss_weight > 0, weighted, 0.0))
        weight = jnp.sum(batch.loss_weight)
        total += weight * scores.router_loss
        return total, {"weight": weight, "loss": total}

    return loss


def scorer(
    graphdef: nnx.GraphDef,
    memory: MemoryConfig,
    layout: Layout | None,
    entropy_use: EntropyUse = "none",
) -> Callable[[Params, PackedBatch], Scores]:
    """`score_tokens` of `(params, batch)`, with everything else decided."""
    return functools.partial(
        score_tokens,
        graphdef,
        head_chunk=memory.head_chunk,
        remat=memory.remat,
        attention=memory.attention,
        layout=layout,
        entropy_use=entropy_use,
    )


@dataclasses.dataclass(frozen=True)
class Update:
    """The compiled pieces of an update; call it with a state and its micro-batches.

    Attributes:
      whole: `(state, batch, frozen) -> (state, metrics)`, the update of a single micro-batch in one
        go.
      first: `(params, batch, frozen) -> (gradients, sums)` of the first of several micro-batches.
      accumulate: `(params, (gradients, sums), batch, frozen)`, the same with a further one added.
      apply: `(state, gradients, weight) -> (state, metrics)`, the optimizer's part.
    """

    whole: Callable[..., tuple[TrainState, dict[str, Array]]]
    first: Callable[..., tuple[Params, dict[str, Array]]]
    accumulate: Callable[..., tuple[Params, dict[str, Array]]]
    apply: Callable[[TrainState, Params, Array], tuple[TrainState, dict[str, Array]]]

    def __call__(
        self, state: TrainState, batches: Iterable[PackedBatch], frozen: Params | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        """Makes one update; the state is donated.

        Args:
          state: the state before it.
          batches: its micro-batches.
          frozen: what is not trained, if anything; neither donated nor differentiated.

        Returns:
          The next state, and the sums of the loss over all micro-batches (not yet divided) with
          what `apply_gradients` reports.

        Raises:
          ValueError: there is no micro-batch.
        """
        batches = list(batches)
        if not batches:
            raise ValueError("an update needs at least one micro-batch")
        if len(batches) == 1:
            return self.whole(state, batches[0], frozen)
        total = self.first(state.params, batches[0], frozen)
        for batch in batches[1:]:
            total = self.accumulate(state.params, total, batch, frozen)
        grads, sums = total
        state, applied = self.apply(state, grads, sums["weight"])
        return state, {**sums, **applied}


def make_update(
    sum_loss: SumLoss,
    optimizer: optax.GradientTransformation,
    shardings: TrainState | None = None,
    assemble: Assemble = lambda params, frozen: params,
) -> Update:
    """Compiles the update.

    Args:
      sum_loss: loss of a micro-batch.
      optimizer: turns mean gradients into updates.
      shardings: how the train state lies on a mesh (`state_shardings`); gradients lie as their
        parameters do. None on one device.
      assemble: makes the model's parameters of what is trained and what is frozen.
    """
    placed = None if shardings is None else (shardings, None)
    placed_grads = None if shardings is None else (shardings.params, None)

    def gradient(params: Params, batch: PackedBatch, frozen: Params | None):
        def loss(params: Params):
            return sum_loss(assemble(params, frozen), batch)

        grads, sums = jax.grad(loss, has_aux=True)(params)
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        return grads, sums

    def apply_mean(state: TrainState, grads: Params, weight: Array):
        # Without any weight there is no mean: 0 / 0 is not finite, so nothing is updated. That is
        # no fault, and not counted as one.
        mean = jax.tree.map(lambda g: g / weight, grads)
        before = state.skipped_updates
        state, applied = apply_gradients(state, mean, optimizer)
        counted = jnp.where(weight > 0, state.skipped_updates, before)
        return dataclasses.replace(state, skipped_updates=counted), {
            "grad_norm": jnp.where(weight > 0, applied["grad_norm"], 0.0),
            "update_skipped": jnp.where(weight > 0, applied["update_skipped"], 0.0),
        }

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=placed)
    def whole(state: TrainState, batch: PackedBatch, frozen: Params | None = None):
        grads, sums = gradient(state.params, batch, frozen)
        state, applied = apply_mean(state, grads, sums["weight"])
        return state, {**sums, **applied}

    @functools.partial(jax.jit, out_shardings=placed_grads)
    def first(params: Params, batch: PackedBatch, frozen: Params | None = None):
        return gradient(params, batch, frozen)

    @functools.partial(jax.jit, donate_argnums=1, out_shardings=placed_grads)
    def accumulate(params: Params, so_far: Any, batch: PackedBatch, frozen: Params | None = None):
        grads, sums = gradient(params, batch, frozen)
        return (
            jax.tree.map(jnp.add, so_far[0], grads),
            {
                name: (jnp.maximum if name.startswith("max_") else jnp.add)(so_far[1][name], value)
                for name, value in sums.items()
            },
        )

    apply = jax.jit(apply_mean, donate_argnums=0, out_shardings=placed)
    return Update(whole=whole, first=first, accumulate=accumulate, apply=apply)
