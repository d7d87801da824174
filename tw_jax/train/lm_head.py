"""LM head and log-softmax, a chunk of tokens at a time, so that `[tokens, vocab]` never exists.

On a mesh the head is gathered once, before the loop over chunks; each device runs its own rows and
columns, and its own part of the vocabulary where that is split. The head's gradient is added up on
each device in float32, and once, after the loop, it is added up over devices and scattered to them.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from tw_jax.models.matrices import AdaptedMatrix, StoredMatrix, matmul
from tw_jax.parallel.gather import gathered
from tw_jax.parallel.layout import Layout

# What entropies are for: "none": they are not worked out; "value": to look at, so that the backward
# pass does nothing for them; "gradient": part of a loss.
EntropyUse = Literal["none", "value", "gradient"]


class HeadScores(NamedTuple):
    """What the head says of each token.

    Attributes:
      logprobs: log-probability of the target.
      entropy: of the whole distribution, in nats; None unless asked for.
    """

    logprobs: Float32[Array, "rows row_len"]
    entropy: Float32[Array, "rows row_len"] | None


def head_scores(
    head: Float[Array, "hidden vocab"] | StoredMatrix,
    hidden: Float[Array, "rows row_len hidden"],
    targets: Int32[Array, "rows row_len"],
    head_chunk: int,
    layout: Layout | None = None,
    entropy_use: EntropyUse = "none",
) -> HeadScores:
    """Log-probability of each target under the logits of its hidden state, and their entropy.

    Args:
      head: the LM head (`tw_jax.models.qwen3.head_matrix`).
      hidden: hidden states that predict the targets.
      targets: token ids.
      head_chunk: tokens per chunk on each device; rounded down to whole columns, at least one.
      layout: the mesh; None on one device.
      entropy_use: whether entropies are worked out, and with a gradient or without.
    """
    if layout is None:
        return _named(_in_chunks(head, hidden, targets, head_chunk, (), entropy_use))
    tokens, width = layout.spec(("batch", "length")), layout.spec(("batch", "length", None))
    embed_axes, vocab_axes = layout.mesh_axes(("embed", "vocab"))

    head_spec: Any = layout.spec(("embed", "vocab"))
    if isinstance(head, AdaptedMatrix):
        inner, outer = layout.spec(("embed", None)), layout.spec((None, "vocab"))
        head_spec = dataclasses.replace(head, base=head_spec, a=inner, b=outer)

    def local(head: Any, hidden: Array, targets: Array) -> tuple[Array, ...]:
        if isinstance(head, AdaptedMatrix):
            base = gathered(cast(Array, head.base), embed_axes, axis=0)
            head = dataclasses.replace(head, base=base, a=gathered(head.a, embed_axes, axis=0))
        else:
            head = gathered(head, embed_axes, axis=0)
        return _in_chunks(head, hidden, targets, head_chunk, vocab_axes, entropy_use)

    scores = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(head_spec, width, tokens),
        out_specs=tokens,
        check_vma=False,
    )(head, hidden, targets)
    return _named(scores)


def _named(scores: tuple[Array, ...]) -> HeadScores:
    return HeadScores(scores[0], scores[1] if len(scores) > 1 else None)


def _in_chunks(
    head: Float[Array, "hidden vocab"] | StoredMatrix,
    hidden: Float[Array, "rows row_len hidden"],
    targets: Int32[Array, "rows row_len"],
    head_chunk: int,
    vocab_axes: tuple[str, ...],
    entropy_use: EntropyUse,
) -> tuple[Float32[Array, "rows row_len"], ...]:
    """Log-probabilities, and entropies if they are of use.

    Chunks are columns, with all rows; their logits are recomputed in the backward pass.
    """
    rows, row_len, width = hidden.shape

    def chunk_scores(hidden, targets):
        logits = matmul(hidden, head)
        highest, total = _softmax_parts(logits, vocab_axes)
        logprobs = _chosen(logits, targets, vocab_axes) - (jnp.log(total) + highest)
        if entropy_use == "none":
            return (logprobs,)
        if entropy_use == "value":
            logits, highest, total = jax.lax.stop_gradient((logits, highest, total))
        return logprobs, _entropy(logits, highest, total, vocab_axes)

    if rows * row_len <= head_chunk:
        return chunk_scores(hidden, targets)

    columns = max(head_chunk // rows, 1)
    chunks = -(-row_len // columns)
    extra = chunks * columns - row_len
    hidden = jnp.pad(hidden, ((0, 0), (0, extra), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, extra)))
    hidden = hidden.reshape(rows, chunks, columns, width).swapaxes(0, 1)
    targets = targets.reshape(rows, chunks, columns).swapaxes(0, 1)
    body = jax.checkpoint(chunk_scores, prevent_cse=False)
    scores = jax.lax.map(lambda chunk: body(*chunk), (hidden, targets))
    return tuple(x.swapaxes(0, 1).reshape(rows, -1)[:, :row_len] for x in scores)


def _softmax_parts(
    logits: Float32[Array, "rows columns part"], vocab_axes: tuple[str, ...]
) -> tuple[Float32[Array, "rows columns"], Float32[Array, "rows columns"]]:
    """The highest logit, and the sum of `exp(logit - highest)`, over the whole vocabulary."""
    # The gradient of a maximum that is subtracted again is zero.
    highest = jax.lax.stop_gradient(logits.max(-1))
    if vocab_axes:
        highest = jax.lax.pmax(highest, vocab_axes)
    return highest, _over_vocabulary(jnp.exp(logits - highest[..., None]).sum(-1), vocab_axes)


def _chosen(
    logits: Float32[Array, "rows columns part"],
    targets: Int32[Array, "rows columns"],
    vocab_axes: tuple[str, ...],
) -> Float32[Array, "rows columns"]:
    """The targets' logits; devices hold parts of the vocabulary in the axes' order."""
    if not vocab_axes:
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    part = logits.shape[-1]
    first = jax.lax.axis_index(vocab_axes) * part
    here = (first <= targets) & (targets < first + part)
    own = jnp.take_along_axis(logits, jnp.clip(targets - first, 0, part - 1)[..., None], axis=-1)
    return _over_vocabulary(jnp.where(here, own[..., 0], 0.0), vocab_axes)


def _entropy(
    logits: Float32[Array, "rows columns part"],
    highest: Float32[Array, "rows columns"],
    total: Float32[Array, "rows columns"],
    vocab_axes: tuple[str, ...],
) -> Float32[Array, "rows columns"]:
    """`-sum p log p` from the parts of the softmax: `log total - mean of (logit - highest)`."""
    below = logits - highest[..., None]
    mean = _over_vocabulary((jnp.exp(below) * below).sum(-1), vocab_axes) / total
    return jnp.log(total) - mean


def _over_vocabulary(
    values: Float32[Array, "rows columns"], vocab_axes: tuple[str, ...]
) -> Float32[Array, "rows columns"]:
    """Adds up over the devices among which the vocabulary is split, if it is."""
    return jax.lax.psum(values, vocab_axes) if vocab_axes else values
