"""The definition of tree attention, written densely: the oracle of every backend."""

import jax
import jax.numpy as jnp


def dense_mask(visible_end, hidden=None):
    """Boolean `[rows, len, len]`: does query i (second axis) see key j (last axis)?"""
    index = jnp.arange(visible_end.shape[-1])
    query, key = index[:, None], index[None, :]
    visible = (key <= query) & (query < visible_end[:, None, :])
    if hidden is not None:
        start, stop = hidden[0][:, :, None, :], hidden[1][:, :, None, :]
        visible &= ~((start <= query) & (query < stop)).any(axis=0)
    return visible


def dense_attention(q, k, v, visible_end, hidden=None):
    """Softmax attention under `dense_mask`, in float32, or float64 where the inputs are that."""
    group = q.shape[2] // k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    score = jnp.einsum("rqhd,rkhd->rhqk", q, k).astype(wide) * q.shape[-1] ** -0.5
    score = jnp.where(dense_mask(visible_end, hidden)[:, None], score, -jnp.inf)
    return jnp.einsum("rhqk,rkhd->rqhd", jax.nn.softmax(score, axis=-1), v)
