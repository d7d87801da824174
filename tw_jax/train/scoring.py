"""Log-probabilities of packed tries: the forward pass that SFT and RL share.

1. Attention plan from `visible_end`, once.
2. Hidden states of every token.
3. Each token's hidden state is replaced by its parent's: in a trie, the token before in the row is
   not always the token before on the path, and a fork has several successors.
4. LM head and log-softmax, a chunk of tokens at a time, so that `[tokens, vocab]` never exists.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from tw_jax.data.packed_batch import PackedBatch
from tw_jax.models.expert_parallel import experts_on
from tw_jax.models.matrices import StoredMatrix
from tw_jax.models.moe import (
    ObserveRouter,
    RouterLoad,
    Routing,
    add_router_load,
    load_balancing_loss,
    no_router_load,
)
from tw_jax.models.qwen3 import Params, Qwen3, head_matrix
from tw_jax.models.remat import Remat
from tw_jax.parallel.attention import backend_on, plan_tiles_on, tree_attention_on
from tw_jax.parallel.embedding import embedding_on
from tw_jax.parallel.layout import Layout, on_mesh
from tw_jax.train.lm_head import EntropyUse, HeadScores, head_scores


def token_logprobs(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: PackedBatch,
    *,
    head_chunk: int,
    remat: Remat,
    attention: str = "auto",
    layout: Layout | None = None,
) -> Float32[Array, "rows row_len"]:
    """The log-probabilities of `score_tokens`, for callers without use for a router's loss."""
    scores = score_tokens(
        graphdef,
        params,
        batch,
        head_chunk=head_chunk,
        remat=remat,
        attention=attention,
        layout=layout,
    )
    return scores.logprobs


class Scores(NamedTuple):
    """What one forward pass over packed rows says.

    Attributes:
      logprobs: `log p(tokens[i] | path to i)`; 0 for roots and padding, which nothing predicts.
      router_loss: the batch's load-balancing loss times its coefficient; 0 where that is 0.
      entropy: of the distribution that predicts the token, in nats, 0 as above; None unless asked
        for.
    """

    logprobs: Float32[Array, "rows row_len"]
    router_loss: Float32[Array, ""]
    entropy: Float32[Array, "rows row_len"] | None = None


def score_tokens(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: PackedBatch,
    *,
    head_chunk: int,
    remat: Remat,
    attention: str = "auto",
    layout: Layout | None = None,
    entropy_use: EntropyUse = "none",
) -> Scores:
    """Log-probability of every token given its path from the root.

    Differentiable in `params`. Positions are not checked here, where they are traced: see
    `tw_jax.models.check_positions`.

    Args:
      graphdef: static half of the model.
      params: its parameters.
      batch: packed rows.
      head_chunk: tokens whose logits exist at the same time on a device, over all its rows; rounded
        down to whole columns, at least one. What fits into one chunk is not looped over.
      remat: what the backward pass keeps of each layer (`tw_jax.models.remat`).
      attention: backend of `tree_attention`, or `auto` (`tw_jax.parallel.attention.backend_on`).
      layout: how batch and activations lie on a mesh; None on one device.
      entropy_use: what entropies are for (`tw_jax.train.lm_head.EntropyUse`).

    Raises:
      ValueError: `head_chunk` is not positive.
    """
    if head_chunk < 1:
        raise ValueError(f"head_chunk={head_chunk}: must be at least 1")
    model: Qwen3 = nnx.merge(graphdef, params)
    hidden_intervals = None
    if batch.hidden_start.shape[0]:
        hidden_intervals = (batch.hidden_start, batch.hidden_end)
    plan = plan_tiles_on(
        layout,
        batch.visible_end,
        hidden_intervals,
        backend=backend_on(layout, attention),
        group=model.config.num_attention_heads // model.config.num_key_value_heads,
    )

    def attend(q, k, v, layer, carry):
        del layer
        out = tree_attention_on(layout, q, k, v, batch.visible_end, hidden_intervals, plan)
        return out, carry

    own_index = jnp.arange(batch.tokens.shape[-1], dtype=jnp.int32)
    moe = model.config.moe
    load: RouterLoad | None = None
    observe: ObserveRouter | None = None
    if moe is not None and moe.router_aux_loss_coef > 0:
        # Padding is what neither follows a token nor is followed by one.
        alone = (batch.parent == own_index) & (batch.visible_end == own_index + 1)
        counted = (~alone).astype(jnp.float32).reshape(-1)
        load = no_router_load(moe)
        observe = functools.partial(_add_to_carry, counted)

    dtype = model.config.compute_dtype
    with on_mesh(layout):
        hidden, load = model.hidden_states(
            batch.tokens,
            batch.positions,
            attend,
            load,
            remat=remat,
            observe_router=observe,
            constrain=None if layout is None else layout.constrain,
            look_up=None if layout is None else embedding_on(layout, dtype),
            run_experts=None if layout is None else experts_on(layout),
        )
        head = _parent_scores(head_matrix(params), hidden, batch, head_chunk, layout, entropy_use)
    predicted = batch.parent != own_index
    logprobs = jnp.where(predicted, head.logprobs, 0.0)
    entropy = None if head.entropy is None else jnp.where(predicted, head.entropy, 0.0)
    if moe is None or load is None:
        return Scores(logprobs, jnp.zeros((), jnp.float32), entropy)
    return Scores(logprobs, moe.router_aux_loss_coef * load_balancing_loss(load), entropy)


def _add_to_carry(
    counted: Float32[Array, " tokens"], routing: Routing, carry: RouterLoad
) -> RouterLoad:
    return add_router_load(carry, routing, counted)


def _parent_scores(
    head: Float[Array, "hidden vocab"] | StoredMatrix,
    hidden: Float[Array, "rows row_len hidden"],
    batch: PackedBatch,
    head_chunk: int,
    layout: Layout | None,
    entropy_use: EntropyUse,
) -> HeadScores:
    with jax.named_scope("gather_parents"):
        hidden = jnp.take_along_axis(hidden, batch.parent[..., None], axis=1)
        if layout is not None:
            hidden = layout.constrain(hidden, ("batch", "length", "embed"))
    with jax.named_scope("head_logprobs"):
        return head_scores(head, hidden, batch.tokens, head_chunk, layout, entropy_use)
