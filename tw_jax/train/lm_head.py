"""LM head and log-softmax, a chunk of tokens at a time, so that `[tokens, vocab]` never exists.

On a mesh the head is gathered once, before the loop over chunks; each device runs its own rows and
columns, and its own part of the vocabulary where that is split. The head's gradient is added up on
each device in float32, and once, after the loop, it is added up over devices and scattered to them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from tw_jax.models.matrices import AdaptedMatrix, StoredMatrix, matmul
from tw_jax.parallel.gather import gathered
from tw_jax.parallel.layout import Layout


def head_logprobs(
    head: Float[Array, "hidden vocab"] | StoredMatrix,
    hidden: Float[Array, "rows row_len hidden"],
    targets: Int32[Array, "rows row_len"],
    head_chunk: int,
    layout: Layout | None = None,
) -> Float32[Array, "rows row_len"]:
    """Log-probability of each target under the logits of its hidden state.

    Args:
      head: the LM head (`tw_jax.models.qwen3.head_matrix`).
      hidden: hidden states that predict the targets.
      targets: token ids.
      head_chunk: tokens per chunk on each device; rounded down to whole columns, at least one.
      layout: the mesh; None on one device.
    """
    if layout is None:
        return _in_chunks(head, hidden, targets, head_chunk, ())
    tokens, width = layout.spec(("batch", "length")), layout.spec(("batch", "length", None))
    embed_axes, vocab_axes = layout.mesh_axes(("embed", "vocab"))

    head_spec: Any = layout.spec(("embed", "vocab"))
    if isinstance(head, AdaptedMatrix):
        inner, outer = layout.spec(("embed", None)), layout.spec((None, "vocab"))
        head_spec = dataclasses.replace(head, base=head_spec, a=inner, b=outer)

    def local(head: Any, hidden: Array, targets: Array) -> Array:
        if isinstance(head, AdaptedMatrix):
            parts: Any = (head.base, head.a)
            base, a = (gathered(part, embed_axes, axis=0) for part in parts)
            head = dataclasses.replace(head, base=base, a=a)
        else:
            head = gathered(head, embed_axes, axis=0)
        return _in_chunks(head, hidden, targets, head_chunk, vocab_axes)

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(head_spec, width, tokens),
        out_specs=tokens,
        check_vma=False,
    )(head, hidden, targets)


def _in_chunks(
    head: Float[Array, "hidden vocab"] | StoredMatrix,
    hidden: Float[Array, "rows row_len hidden"],
    targets: Int32[Array, "rows row_len"],
    head_chunk: int,
    vocab_axes: tuple[str, ...],
) -> Float32[Array, "rows row_len"]:
    """Chunks are columns, with all rows; their logits are recomputed in the backward pass."""
    rows, row_len, width = hidden.shape

    def chunk_logprobs(hidden, targets):
        logits = matmul(hidden, head)
        if vocab_axes:
            return _split_logprobs(logits, targets, vocab_axes)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    if rows * row_len <= head_chunk:
        return chunk_logprobs(hidden, targets)

    columns = max(head_chunk // rows, 1)
    chunks = -(-row_len // columns)
    extra = chunks * columns - row_len
    hidden = jnp.pad(hidden, ((0, 0), (0, extra), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, extra)))
    hidden = hidden.reshape(rows, chunks, columns, width).swapaxes(0, 1)
    targets = targets.reshape(rows, chunks, columns).swapaxes(0, 1)
    body = jax.checkpoint(chunk_logprobs, prevent_cse=False)
    logprobs = jax.lax.map(lambda chunk: body(*chunk), (hidden, targets))
    return logprobs.swapaxes(0, 1).reshape(rows, -1)[:, :row_len]


def _split_logprobs(
    logits: Float32[Array, "rows columns part"],
    targets: Int32[Array, "rows columns"],
    vocab_axes: tuple[str, ...],
) -> Float32[Array, "rows columns"]:
    """Log-probabilities where each device holds a part of the vocabulary, in the axes' order."""
    part = logits.shape[-1]
    first = jax.lax.axis_index(vocab_axes) * part
    # The gradient of a maximum that is subtracted again is zero.
    highest = jax.lax.pmax(jax.lax.stop_gradient(logits.max(-1)), vocab_axes)
    total = jax.lax.psum(jnp.exp(logits - highest[..., None]).sum(-1), vocab_axes)
    here = (first <= targets) & (targets < first + part)
    own = jnp.take_along_axis(logits, jnp.clip(targets - first, 0, part - 1)[..., None], axis=-1)
    chosen = jax.lax.psum(jnp.where(here, own[..., 0], 0.0), vocab_axes)
    return chosen - highest - jnp.log(total)
