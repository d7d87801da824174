"""Samples a next token the slow way: a full forward at given positions under a given dense mask."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tw_jax.rollout.request import Request


class DenseSampler:
    """What the oracles of the join rules sample with.

    What it shares with the engine is the model, and the noise of a token as a function of (seed,
    unit, tokens before it in the unit's own context).
    """

    def __init__(self, graphdef, params, context_len: int, vocab: int) -> None:
        self.context_len, self.vocab = context_len, vocab

        @jax.jit
        def last_logits(tokens, positions, mask, length):
            model = nnx.merge(graphdef, params)

            def attend(q, k, v, layer, carry):
                k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
                scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
                weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
                return jnp.einsum("hqk,khd->qhd", weights, v), carry

            hidden, _ = model.hidden_states(tokens, positions, attend)
            return model.logits(hidden[length - 1])

        @jax.jit
        def noise(seed_words, unit, index):
            # The words are those of jax.random.PRNGKey(seed).
            key = jax.random.fold_in(jax.random.wrap_key_data(seed_words), unit)
            return jax.random.gumbel(jax.random.fold_in(key, index), (vocab,))

        self._last_logits, self._noise = last_logits, noise

    def sample(
        self, request: Request, unit: int, context: list[int], positions=None, hidden=None
    ) -> tuple[int, float]:
        """The next token of a unit and its log-probability at temperature 1.

        Args:
          request: says how to sample.
          unit: its number in the request.
          context: all tokens that the unit has.
          positions: of the context's tokens; None counts from 0.
          hidden: boolean [context, context], true where query i must not see key j <= i; None
            hides nothing.
        """
        n = len(context)
        tokens, padded = np.zeros(self.context_len, np.int32), np.arange(self.context_len)
        mask = np.tril(np.ones((self.context_len, self.context_len), bool))
        tokens[:n] = context
        if positions is not None:
            padded[:n] = positions
        if hidden is not None:
            mask[:n, :n] &= ~hidden
        logits = np.asarray(self._last_logits(tokens, padded, mask, n), np.float64)
        s = request.sampling
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        if s.temperature == 0:
            token = int(logits.argmax())
        else:
            words = np.array([request.seed >> 32, request.seed & 0xFFFFFFFF], np.uint32)
            scaled = logits / s.temperature
            allowed = self._allowed(scaled, s.top_k, s.top_p)
            noise = np.asarray(self._noise(words, unit, n))
            token = int(np.where(allowed, scaled + noise, -np.inf).argmax())
        return token, float(logprobs[token])

    def _allowed(self, scaled: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
        order = np.argsort(-scaled)
        if top_k:
            order = order[:top_k]
        probability = np.exp(scaled[order] - scaled[order].max())
        probability /= probability.sum()
        if top_p < 1:
            keep = int(np.searchsorted(np.cumsum(probability), top_p)) + 1
            order = order[:keep]
        allowed = np.zeros(self.vocab, bool)
        allowed[order] = True
        return allowed
