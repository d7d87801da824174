"""What requests ask of sampling: checked on the host, and held on the device line by line."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from tw_jax.errors import UserError
from tw_jax.rollout.request import SamplingParams

# Beyond these bounds float32 logits could overflow, or every token but one would vanish anyway.
MAX_BIAS = 1000.0
MIN_PENALTY, MAX_PENALTY = 0.01, 100.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingTable:
    """The fields of `SamplingParams` that draw tokens: a line per request slot, or per row.

    Attributes:
      temperature: 0 is greedy.
      top_k: 0 keeps all.
      top_p: 1 keeps all.
      min_p: 0 keeps all.
      repetition_penalty: 1 changes nothing.
      penalize_context: the penalty counts the whole context, not the unit's own tokens only.
      bias_ids: tokens with a bias, padded with the size of the vocabulary.
      bias: what is added to their logits.
    """

    temperature: Float32[Array, "lines"]
    top_k: Int32[Array, "lines"]
    top_p: Float32[Array, "lines"]
    min_p: Float32[Array, "lines"]
    repetition_penalty: Float32[Array, "lines"]
    penalize_context: Bool[Array, "lines"]
    bias_ids: Int32[Array, "lines entries"]
    bias: Float32[Array, "lines entries"]

    def take(self, lines: Int32[Array, "rows"]) -> "SamplingTable":
        """The lines at the given indices."""
        return jax.tree.map(lambda field: field[lines], self)

    def replaced(self, where: Bool[Array, "lines"], new: "SamplingTable") -> "SamplingTable":
        """Takes the marked lines from another table."""

        def chosen(mine: Array, theirs: Array) -> Array:
            return jnp.where(where.reshape(-1, *[1] * (mine.ndim - 1)), theirs, mine)

        return jax.tree.map(chosen, self, new)


def sampling_table(asked: dict[int, SamplingParams], lines: int, vocab: int, entries: int) -> Any:
    """A `SamplingTable` of NumPy arrays; lines that nobody asks for sample plainly.

    Args:
      asked: line -> its parameters, checked.
      lines: lines of the table.
      vocab: rows of the model's head.
      entries: room for biases in each line.
    """
    plain = SamplingParams()
    params = [asked.get(line, plain) for line in range(lines)]
    bias_ids = np.full((lines, entries), vocab, np.int32)
    bias = np.zeros((lines, entries), np.float32)
    for line, one in asked.items():
        for entry, (token, value) in enumerate(one.logit_bias):
            bias_ids[line, entry], bias[line, entry] = token, value

    def column(values: list, dtype: Any) -> Any:
        return np.array(values, dtype)

    return SamplingTable(
        temperature=column([p.temperature for p in params], np.float32),
        top_k=column([min(p.top_k, vocab) for p in params], np.int32),
        top_p=column([p.top_p for p in params], np.float32),
        min_p=column([p.min_p for p in params], np.float32),
        repetition_penalty=column([p.repetition_penalty for p in params], np.float32),
        penalize_context=column([p.repetition_scope == "context" for p in params], np.bool_),
        bias_ids=bias_ids,  # pyright: ignore[reportArgumentType] - NumPy stands in for jax
        bias=bias,  # pyright: ignore[reportArgumentType]
    )


def check_sampling(name: str, sampling: SamplingParams, vocab: int, entries: int) -> None:
    """Checks how a request wants its tokens drawn.

    Args:
      name: of the request, for the message.
      sampling: what it asks for.
      vocab: rows of the model's head.
      entries: biases that the engine has room for.

    Raises:
      UserError: a value is out of its range; says which and the remedy.
    """
    temperature, penalty = sampling.temperature, sampling.repetition_penalty
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise UserError(f"{name}: sampling.temperature={temperature} must be >= 0")
    if sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise UserError(f"{name}: sampling.top_k must be >= 0 and 0 < top_p <= 1")
    if not 0 <= sampling.min_p <= 1:
        raise UserError(f"{name}: sampling.min_p={sampling.min_p} must lie in 0..1; 0 keeps all")
    if not MIN_PENALTY <= penalty <= MAX_PENALTY:
        raise UserError(
            f"{name}: sampling.repetition_penalty={penalty} must lie in {MIN_PENALTY}.."
            f"{MAX_PENALTY:g}; 1 is off, above 1 discourages"
        )
    if sampling.repetition_scope not in ("unit", "context"):
        raise UserError(
            f"{name}: sampling.repetition_scope={sampling.repetition_scope!r} must be 'unit' or "
            "'context'"
        )
    _check_bias(name, sampling.logit_bias, vocab, entries)


def _check_bias(
    name: str, logit_bias: tuple[tuple[int, float], ...], vocab: int, entries: int
) -> None:
    if len(logit_bias) > entries:
        raise UserError(
            f"{name}: sampling.logit_bias has {len(logit_bias)} entries, the engine has room for "
            f"engine.max_logit_bias={entries}: give fewer or raise it"
        )
    tokens = [token for token, _ in logit_bias]
    for token, value in logit_bias:
        if not 0 <= token < vocab:
            raise UserError(
                f"{name}: sampling.logit_bias names token {token}: ids lie in 0..{vocab - 1}"
            )
        if tokens.count(token) > 1:
            raise UserError(f"{name}: sampling.logit_bias names token {token} twice")
        if value != -math.inf and not abs(value) <= MAX_BIAS:
            raise UserError(
                f"{name}: sampling.logit_bias gives token {token} {value}: must lie in "
                f"{-MAX_BIAS:g}..{MAX_BIAS:g}, or be -inf to ban it"
            )
    if sum(value == -math.inf for _, value in logit_bias) == vocab:
        raise UserError(f"{name}: sampling.logit_bias bans every token: leave at least one")
