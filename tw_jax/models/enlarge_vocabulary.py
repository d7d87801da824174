"""Rows of the embedding and the head for tokens that a published model did not have."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from tw_jax.models import qwen3
from tw_jax.models.config import Qwen3Config


def enlarge_vocabulary(
    params: qwen3.Params,
    config: Qwen3Config,
    rows: int,
    new_rows: Mapping[int, Sequence[int]],
    shardings: Any = None,
) -> tuple[qwen3.Params, Qwen3Config]:
    """Gives new tokens their rows, and the vocabulary room for them.

    The row of a new token becomes the mean of the rows of its word pieces, in the input embedding
    and, where it is a matrix of its own, in the head (ThreadWeaver, released code). Rows that no
    token has, added only to round the number up, become the mean of all rows: their logit is then
    the mean of all logits, so greedy decoding never chooses them.

    Args:
      params: the model's parameters; they stay as they are.
      config: its architecture.
      rows: the new number of rows, at least `config.vocab_size`: a vocabulary never shrinks, since
        published models are padded to divide by the devices they are spread over.
      new_rows: for each new token id, below `rows`, the ids of its word pieces.
      shardings: a tree like the parameters, of where they shall lie; None: where they lie.

    Returns:
      The parameters and their architecture.
    """
    if rows < config.vocab_size:
        raise ValueError(f"rows={rows}: the vocabulary of {config.vocab_size} must not shrink")
    width = max((len(pieces) for pieces in new_rows.values()), default=1)
    ids = np.array(list(new_rows), np.int32)
    pieces = np.zeros((len(new_rows), width), np.int32)
    share = np.zeros((len(new_rows), width), np.float32)
    for row, own in enumerate(new_rows.values()):
        pieces[row, : len(own)] = own
        share[row, : len(own)] = 1 / len(own)

    def enlarged(path: tuple[str, str], transposed: bool = False) -> Array:
        def build(table: Array) -> Array:
            by_row = table.T if transposed else table
            by_row = _enlarged(by_row, rows, ids, pieces, share)
            return by_row.T if transposed else by_row

        table = params[path[0]][path[1]]
        sharding = shardings[path[0]][path[1]] if shardings else table.sharding
        return jax.jit(build, out_shardings=sharding)(table)

    larger = {**params, "embed_tokens": {"embedding": enlarged(("embed_tokens", "embedding"))}}
    if "lm_head" in params:
        larger["lm_head"] = {"kernel": enlarged(("lm_head", "kernel"), transposed=True)}
    return larger, dataclasses.replace(config, vocab_size=rows)


def _enlarged(
    table: Float[Array, "old hidden"],
    rows: int,
    ids: Int32[np.ndarray, "new"],
    pieces: Int32[np.ndarray, "new width"],
    share: Float[np.ndarray, "new width"],
) -> Float[Array, "rows hidden"]:
    """The table with more rows; `share` weighs each new row's pieces."""
    wide = table[pieces].astype(jnp.float32)
    means = jnp.einsum("nwh,nw->nh", wide, share, precision="highest").astype(table.dtype)
    if rows > table.shape[0]:
        mean = jnp.mean(table, axis=0, dtype=jnp.float32).astype(table.dtype)
        padding = jnp.broadcast_to(mean, (rows - table.shape[0], table.shape[1]))
        table = jnp.concatenate([table, padding])
    return table.at[ids].set(means)
