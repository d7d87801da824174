"""Changes logits before a token is drawn: repetition penalty, then bias, each per row.

A row that asks for neither keeps its logits to the last bit, whatever its neighbours ask for.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from tw_jax.rollout.sampling_table import SamplingTable

# A row's own context: tokens, and where its unit's own tokens begin and end, `[rows]` each.
ContextReader = Callable[
    [], tuple[Int32[Array, "rows len"], Int32[Array, "rows"], Int32[Array, "rows"]]
]


def wants_change(asked: SamplingTable) -> Bool[Array, "rows"]:
    """Rows whose logits `change_logits` would change."""
    vocab_is_padding = (asked.bias != 0).any(axis=1)  # padding has a bias of 0
    return (asked.repetition_penalty != 1) | vocab_is_padding


def change_logits(
    logits: Float32[Array, "rows vocab"], asked: SamplingTable, read_context: ContextReader
) -> Float32[Array, "rows vocab"]:
    """Applies each row's repetition penalty and bias.

    Args:
      logits: raw logits of the model.
      asked: of each row.
      read_context: makes the rows' contexts and the bounds of their units' own tokens in them;
        called only if a row has a penalty.
    """
    penalized = asked.repetition_penalty != 1

    def penalize(logits):
        tokens, start, end = read_context()
        first = jnp.where(asked.penalize_context, 0, start)
        position = jnp.arange(tokens.shape[1])[None]
        counted = (position >= first[:, None]) & (position < end[:, None]) & penalized[:, None]
        found = jnp.take_along_axis(logits, tokens, axis=1)
        penalty = asked.repetition_penalty[:, None]
        less = jnp.where(found > 0, found / penalty, found * penalty)
        # A token that occurs twice is set twice, to the same value: nothing has to be counted.
        target = jnp.where(counted, tokens, logits.shape[1])
        return logits.at[jnp.arange(len(tokens))[:, None], target].set(less, mode="drop")

    logits = lax.cond(penalized.any(), penalize, lambda logits: logits, logits)
    rows = jnp.arange(len(logits))[:, None]
    return logits.at[rows, asked.bias_ids].add(asked.bias, mode="drop")
