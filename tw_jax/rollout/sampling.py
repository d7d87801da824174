"""Draws tokens from logits: greedy, temperature, top-k and top-p, each per row.

A row's noise depends on its key alone, so a token does not depend on the batch around it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

# Units are keyed `block * BLOCK_STRIDE + ordinal`; ordinals (threads of a block) stay below it.
BLOCK_STRIDE = 1024


def _key(data: UInt32[Array, "... 2"]) -> Array:
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def unit_key(
    request_key: UInt32[Array, "2"], block: Int32[Array, ""], ordinal: Int32[Array, ""]
) -> UInt32[Array, "2"]:
    """Key of one unit: the segment before a block (ordinal 0) or one of its threads."""
    folded = jax.random.fold_in(_key(request_key), block * BLOCK_STRIDE + ordinal)
    return jax.random.key_data(folded)


def token_noise(
    keys: UInt32[Array, "rows 2"], positions: Int32[Array, "rows"], vocab: int
) -> Float32[Array, "rows vocab"]:
    """Gumbel noise for the token at each row's position in its unit's own context."""

    def one(key, position):
        return jax.random.gumbel(jax.random.fold_in(_key(key), position), (vocab,))

    return jax.vmap(one)(keys, positions)


def keep_likely(
    logits: Float32[Array, "rows vocab"],
    top_k: Int32[Array, "rows"],
    top_p: Float32[Array, "rows"],
) -> Float32[Array, "rows vocab"]:
    """Masks what top-k, then top-p over the renormalised rest, leave out; ties are kept.

    Args:
      logits: already divided by the temperature.
      top_k: 0 keeps all.
      top_p: 1 keeps all.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1])[None]
    ordered = jnp.where((top_k[:, None] > 0) & (rank >= top_k[:, None]), -jnp.inf, ordered)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = jnp.isfinite(ordered) & ((before < top_p[:, None]) | (top_p[:, None] >= 1) | (rank == 0))
    threshold = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def sample_tokens(
    logits: Float32[Array, "rows vocab"],
    keys: UInt32[Array, "rows 2"],
    positions: Int32[Array, "rows"],
    temperature: Float32[Array, "rows"],
    top_k: Int32[Array, "rows"],
    top_p: Float32[Array, "rows"],
    active: Bool[Array, "rows"],
) -> tuple[Int32[Array, "rows"], Float32[Array, "rows"]]:
    """Draws one token per row by the Gumbel-max rule; temperature 0 is greedy.

    Noise is drawn only if an active row is not greedy, and logits are sorted only if an active
    row restricts its candidates.

    Returns:
      Tokens, and their log-probabilities under `softmax(logits)`, that is at temperature 1 and
      before top-k and top-p.
    """
    warm = temperature > 0
    restricted = active & warm & ((top_k > 0) | (top_p < 1))

    def draw():
        scaled = logits / jnp.where(warm, temperature, 1.0)[:, None]
        scaled = lax.cond(
            restricted.any(), lambda: keep_likely(scaled, top_k, top_p), lambda: scaled
        )
        noise = token_noise(keys, positions, logits.shape[-1])
        perturbed = jnp.where(warm[:, None], scaled + noise, logits)
        return jnp.argmax(perturbed, axis=-1).astype(jnp.int32)

    def greedy():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    token = lax.cond((active & warm).any(), draw, greedy)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)
