"""Draws tokens from logits: greedy, temperature, top-k, top-p and min-p, each per row.

A row's noise depends on its key alone, so a token does not depend on the batch around it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from tw_jax.rollout.logit_changes import ContextReader, change_logits, wants_change
from tw_jax.rollout.sampling_table import SamplingTable

# Units are keyed `block * BLOCK_STRIDE + ordinal`; ordinals (threads of a block) stay below it.
BLOCK_STRIDE = 1024


def unit_number(block, ordinal):
    """Number of a unit in its request: of a segment (ordinal 0) or a thread."""
    return block * BLOCK_STRIDE + ordinal


def token_noise(
    request_keys: UInt32[Array, "rows 2"],
    units: Int32[Array, "rows"],
    positions: Int32[Array, "rows"],
    vocab: int,
) -> Float32[Array, "rows vocab"]:
    """Gumbel noise of the token at each row's position in its unit's own context."""

    def one(request_key, unit, position):
        key = jax.random.wrap_key_data(request_key, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, unit), position)
        return jax.random.gumbel(key, (vocab,))

    return jax.vmap(one)(request_keys, units, positions)


def keep_likely(
    logits: Float32[Array, "rows vocab"],
    top_k: Int32[Array, "rows"],
    top_p: Float32[Array, "rows"],
    min_p: Float32[Array, "rows"],
) -> Float32[Array, "rows vocab"]:
    """Masks what top-k, top-p over the renormalised rest, and min-p leave out; ties are kept.

    The first two cut at a value, which is found by bisection over all float32 numbers: 32 passes
    over the logits are several times faster than sorting them.

    Args:
      logits: already divided by the temperature.
      top_k: 0 keeps all.
      top_p: 1 keeps all.
      min_p: 0 keeps all.
    """
    order = _sortable(logits)

    def cut_k(kept):
        least = jnp.where(top_k > 0, top_k, logits.shape[-1])

        def few_above(value):
            return (order > value[:, None]).sum(axis=-1) < least

        return kept & (order >= _least(few_above, top_k)[:, None])

    def cut_p(kept):
        probability = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)

        def short_above(value):
            above = jnp.where(order > value[:, None], probability, 0.0)
            return above.sum(axis=-1) < top_p

        cut = kept & (order >= _least(short_above, top_k)[:, None])
        return jnp.where(top_p[:, None] < 1, cut, kept)

    kept = jnp.ones(logits.shape, bool)
    kept = lax.cond((top_k > 0).any(), cut_k, lambda kept: kept, kept)
    kept = lax.cond((top_p < 1).any(), cut_p, lambda kept: kept, kept)
    # A ratio of probabilities is a difference of logits; log(0) = -inf keeps all.
    kept &= logits >= logits.max(axis=-1, keepdims=True) + jnp.log(min_p)[:, None]
    return jnp.where(kept, logits, -jnp.inf)


def _sortable(x: Float32[Array, "rows vocab"]) -> Int32[Array, "rows vocab"]:
    """Integers in the same order as the floats."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _least(
    holds: Callable[[Int32[Array, "rows"]], Bool[Array, "rows"]], like: Int32[Array, "rows"]
) -> Int32[Array, "rows"]:
    """The least integer per row for which a condition holds that holds from there on."""
    limits = jnp.iinfo(jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        held = holds(middle)
        return jnp.where(held, low, middle + 1), jnp.where(held, middle, high)

    bounds = jnp.full_like(like, limits.min), jnp.full_like(like, limits.max)
    return lax.fori_loop(0, 32, halve, bounds)[1]


def _first_at(
    x: Float32[Array, "rows vocab"], highest: Float32[Array, "rows"]
) -> Int32[Array, "rows"]:
    """`argmax` of rows whose highest entries are known.

    Two reductions that XLA vectorises on CPU; argmax itself takes several times as long.
    """
    vocab = x.shape[-1]
    index = jnp.where(x == highest[:, None], jnp.arange(vocab, dtype=jnp.int32), vocab - 1)
    return index.min(axis=-1)


def sample_tokens(
    logits: Float32[Array, "rows vocab"],
    noise: Callable[[], Float32[Array, "rows vocab"]],
    asked: SamplingTable,
    active: Bool[Array, "rows"],
    read_context: ContextReader,
    script: Int32[Array, "rows"] | None = None,
) -> tuple[Int32[Array, "rows"], Float32[Array, "rows"]]:
    """Draws one token per row by the Gumbel-max rule; temperature 0 is greedy.

    Args:
      logits: raw logits of the model.
      noise: makes the Gumbel noise; called only if an active row is not greedy.
      asked: how each row wants its token drawn; what no active row asks for costs nothing.
      active: rows whose token will be used.
      read_context: see `change_logits`.
      script: tokens to take in place of drawn ones; negative for none.

    Returns:
      Tokens, and their log-probabilities under `softmax(logits)`, that is at temperature 1 and
      before penalty, bias, top-k, top-p and min-p.
    """
    warm = asked.temperature > 0
    restricted = active & warm & ((asked.top_k > 0) | (asked.top_p < 1) | (asked.min_p > 0))
    highest = logits.max(axis=-1)

    def pick(logits, highest):
        def draw():
            scaled = logits / jnp.where(warm, asked.temperature, 1.0)[:, None]
            scaled = lax.cond(
                restricted.any(),
                lambda: keep_likely(scaled, asked.top_k, asked.top_p, asked.min_p),
                lambda: scaled,
            )
            drawn = jnp.where(warm[:, None], scaled + noise(), logits)
            return _first_at(drawn, drawn.max(axis=-1))

        return lax.cond((active & warm).any(), draw, lambda: _first_at(logits, highest))

    def pick_changed():
        changed = change_logits(logits, asked, read_context)
        return pick(changed, changed.max(axis=-1))

    # Two copies of the drawing: one place for both would have to copy the logits in every step.
    token = lax.cond(
        (active & wants_change(asked)).any(), pick_changed, lambda: pick(logits, highest)
    )
    if script is not None:
        token = jnp.where(script >= 0, script, token)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    total = jnp.exp(logits - highest[:, None]).sum(axis=-1)
    return token, chosen - (highest + jnp.log(total))
