"""Sizes of the Qwen3 family: one frozen dataclass and a preset for each published model."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from tw_jax.errors import UserError

_DTYPES = ("float32", "bfloat16", "float16")
_NOT_SIZES = ("tie_word_embeddings", "rope_scaling", "moe")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context; see `tw_jax.models.rope`.

    Attributes:
      kind: "linear" divides every frequency by `factor`; "yarn" (arXiv 2309.00071) only the low
        ones. Linear scaling reads nothing but `factor`: the other fields are None.
      factor: new context length over the trained one, at least 1.
      original_max_position_embeddings: the trained context length.
      beta_fast: frequencies that turn more often than this within it stay as they are.
      beta_slow: frequencies that turn less often than this are divided by `factor`.
      attention_factor: multiplies cosine and sine; None: derived from `factor` and the mscales.
      mscale: weight of the log factor in the numerator of the derived attention factor.
      mscale_all_dim: the same in its denominator; both or neither count.
      truncate: round the two boundaries outwards to whole frequencies.
    """

    kind: Literal["linear", "yarn"]
    factor: float
    original_max_position_embeddings: int | None
    beta_fast: float | None
    beta_slow: float | None
    attention_factor: float | None
    mscale: float | None
    mscale_all_dim: float | None
    truncate: bool | None

    def __post_init__(self):
        if self.kind not in ("linear", "yarn"):
            raise ValueError(f"rope_scaling.kind={self.kind!r}: choose linear or yarn")
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor={self.factor!r}: must be at least 1")
        needed = ("original_max_position_embeddings", "beta_fast", "beta_slow", "truncate")
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if self.kind == "linear" and value is not None:
                raise ValueError(f"rope_scaling.{field.name}={value!r}: linear scaling reads none")
            if self.kind == "yarn" and field.name in needed and value is None:
                raise ValueError(f"rope_scaling.{field.name}: yarn needs a value")
            if value is not None and field.name != "truncate" and value <= 0:
                raise ValueError(f"rope_scaling.{field.name}={value!r}: must be positive")


@dataclasses.dataclass(frozen=True)
class MixtureOfExperts:
    """Routed feed-forward layers in place of dense ones, in every layer of the model.

    Attributes:
      num_experts: feed-forward networks in each layer.
      num_experts_per_tok: how many of them each token passes through.
      moe_intermediate_size: inner width of one expert.
      norm_topk_prob: rescale the chosen experts' probabilities to a sum of one.
      router_aux_loss_coef: weight of the load-balancing loss in training; 0: off.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    router_aux_loss_coef: float

    def __post_init__(self):
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"moe.{name}={getattr(self, name)!r}: must be positive")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"moe.num_experts_per_tok={self.num_experts_per_tok} exceeds "
                f"moe.num_experts={self.num_experts}"
            )
        if self.router_aux_loss_coef < 0:
            raise ValueError(
                f"moe.router_aux_loss_coef={self.router_aux_loss_coef!r}: must not be negative"
            )


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Everything that fixes a Qwen3 model. No field has a default: presets supply them all.

    Attributes:
      vocab_size: rows of the embedding table.
      hidden_size: width of the residual stream.
      intermediate_size: inner width of the SwiGLU feed-forward layer; unused where `moe` is set.
      num_hidden_layers: number of transformer blocks.
      num_attention_heads: query heads.
      num_key_value_heads: key/value heads; query head h reads key head
        `h // (num_attention_heads // num_key_value_heads)`.
      head_dim: width of one head; not tied to `hidden_size / num_attention_heads`.
      rope_theta: base of the rotary frequencies.
      rope_scaling: stretches them beyond the trained context; None: as trained.
      rms_norm_eps: added to the mean square in every RMSNorm.
      tie_word_embeddings: the LM head is the transposed embedding table.
      max_position_embeddings: positions run from 0 to this, exclusive; see `check_positions`.
      initializer_range: standard deviation of freshly initialised matrices.
      moe: routed feed-forward layers; None: dense ones.
      param_dtype: dtype in which parameters are stored.
      compute_dtype: dtype of activations and matmul inputs. Norms, rotary embedding, softmax and
        logits are float32 whatever this says.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float
    moe: MixtureOfExperts | None
    param_dtype: str
    compute_dtype: str

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_dtype"):
                if value not in _DTYPES:
                    raise ValueError(f"{field.name}={value!r}: choose one of {', '.join(_DTYPES)}")
            elif field.name not in _NOT_SIZES and value <= 0:
                raise ValueError(f"{field.name}={value!r}: must be positive")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary embedding needs an even width")

    @classmethod
    def from_dict(
        cls, fields: Mapping[str, Any], *, origin: str = "model configuration"
    ) -> "Qwen3Config":
        """The inverse of `dataclasses.asdict`.

        Records of models made before `rope_scaling` and `moe` existed lack the two: such models
        have neither.

        Args:
          fields: the dictionary, for example the "model" record of a checkpoint.
          origin: where it came from, for messages.

        Raises:
          UserError: a field is missing, unknown or out of range.
        """
        fields = {"rope_scaling": None, "moe": None, **fields}
        try:
            if fields["rope_scaling"] is not None:
                fields["rope_scaling"] = _record(
                    RopeScaling, fields["rope_scaling"], "rope_scaling."
                )
            if fields["moe"] is not None:
                fields["moe"] = _record(MixtureOfExperts, fields["moe"], "moe.")
            return _record(cls, fields, "")
        except ValueError as error:
            raise UserError(
                f"{origin}: {error}. It was written by another version of tw_jax, or edited by hand"
            ) from error


def _record(kind: type, fields: Any, prefix: str) -> Any:
    """Builds a dataclass from all its fields, by name."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"{prefix[:-1]}={fields!r}: expected a record of fields")
    names = {field.name for field in dataclasses.fields(kind)}
    for what, keys in (("missing", names - set(fields)), ("unknown", set(fields) - names)):
        if keys:
            raise ValueError(f"{what} fields: {', '.join(prefix + key for key in sorted(keys))}")
    return kind(**fields)


def check_positions(config: Qwen3Config, positions: int | np.ndarray) -> None:
    """Refuses positions that the model was not made for.

    Rotary embedding computes something for any position, so nothing else would complain. Call it on
    the host: with a context length when an engine is built, with an array when rows are packed. The
    length of a packed row is no limit in itself, since each trie in it starts again at position 0.

    Args:
      config: the model's configuration.
      positions: a context length (positions `0 .. length - 1`), or the positions themselves.

    Raises:
      ValueError: a position lies outside `[0, config.max_position_embeddings)`.
    """
    if isinstance(positions, int):
        first, last = 0, positions - 1
    elif np.size(positions) == 0:
        return
    else:
        first, last = int(np.min(positions)), int(np.max(positions))
    limit = config.max_position_embeddings
    if first < 0 or last >= limit:
        raise ValueError(
            f"positions {first}..{last} leave the model's range 0..{limit - 1}: "
            "shorten the sequence or raise max_position_embeddings"
        )


def _published(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    **others: Any,
) -> Qwen3Config:
    """A published Qwen3; `others` is what differs from the dense, untied models of April 2025."""
    shared: dict[str, Any] = dict(
        vocab_size=151_936,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1e6,
        rope_scaling=None,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=40_960,
        initializer_range=0.02,
        moe=None,
        param_dtype="float32",
        compute_dtype="float32",
    )
    return Qwen3Config(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        **(shared | others),
    )


def _published_experts(moe_intermediate_size: int) -> MixtureOfExperts:
    """128 experts, 8 of them per token, without a load-balancing loss in post-training."""
    return MixtureOfExperts(
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=moe_intermediate_size,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
    )


_TINY = Qwen3Config(
    vocab_size=128,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    # Wavelengths up to a few thousand tokens would be idle in rows of a few hundred, and exact
    # offsets, which arithmetic needs, are learned several times faster with shorter ones.
    rope_theta=500.0,
    rope_scaling=None,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
    initializer_range=0.08,  # about hidden_size ** -0.5: 0.02 learns far more slowly here
    moe=None,
    param_dtype="float32",
    compute_dtype="float32",
)
_TINY_EXPERTS = MixtureOfExperts(
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,  # two experts are as wide as the dense layer
    norm_topk_prob=True,
    router_aux_loss_coef=0.0,
)
# For texts of several hundred tokens whose end looks things up at their start: addressing them by
# content takes more heads, and channels that hardly turn over such distances.
_TINY_LONG = dataclasses.replace(
    _TINY,
    num_attention_heads=8,
    num_key_value_heads=4,
    rope_theta=1e4,
    initializer_range=0.04,
)
_QWEN3_4B = _published(2560, 9728, 36, 32, tie_word_embeddings=True)
# The releases of July 2025 are trained on a longer context.
_QWEN3_4B_2507 = dataclasses.replace(_QWEN3_4B, rope_theta=5e6, max_position_embeddings=262_144)

PRESETS: dict[str, Qwen3Config] = {
    "tiny": _TINY,
    "tiny-long": _TINY_LONG,
    "tiny-moe": dataclasses.replace(_TINY, moe=_TINY_EXPERTS),
    "qwen3-0.6b": _published(1024, 3072, 28, 16, tie_word_embeddings=True),
    "qwen3-1.7b": _published(2048, 6144, 28, 16, tie_word_embeddings=True),
    "qwen3-4b": _QWEN3_4B,
    "qwen3-4b-instruct-2507": _QWEN3_4B_2507,
    "qwen3-4b-thinking-2507": _QWEN3_4B_2507,
    "qwen3-8b": _published(4096, 12_288, 36, 32),
    "qwen3-14b": _published(5120, 17_408, 40, 40),
    "qwen3-32b": _published(5120, 25_600, 64, 64),
    "qwen3-30b-a3b": _published(
        2048, 6144, 48, 32, num_key_value_heads=4, moe=_published_experts(768)
    ),
    "qwen3-235b-a22b": _published(
        4096, 12_288, 94, 64, num_key_value_heads=4, moe=_published_experts(1536)
    ),
}


def preset(name: str, **overrides) -> Qwen3Config:
    """The preset `name` with some fields replaced, e.g. `preset("tiny", vocab_size=108)`.

    Raises:
      ValueError: there is no such preset, or no such field.
    """
    if name not in PRESETS:
        raise ValueError(f"no model preset {name!r}: choose one of {', '.join(PRESETS)}")
    fields = [field.name for field in dataclasses.fields(Qwen3Config)]
    unknown = sorted(set(overrides) - set(fields))
    if unknown:
        raise ValueError(f"no model field {', '.join(unknown)}: choose from {', '.join(fields)}")
    return dataclasses.replace(PRESETS[name], **overrides)
