"""Sizes of the Qwen3 family: one frozen dataclass and a preset for each published dense model."""

import dataclasses

import numpy as np

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Everything that fixes a Qwen3 model. No field has a default: presets supply them all.

    Attributes:
      vocab_size: rows of the embedding table.
      hidden_size: width of the residual stream.
      intermediate_size: width of the SwiGLU feed-forward layer.
      num_hidden_layers: number of transformer blocks.
      num_attention_heads: query heads.
      num_key_value_heads: key/value heads; query head h reads key head
        `h // (num_attention_heads // num_key_value_heads)`.
      head_dim: width of one head; not tied to `hidden_size / num_attention_heads`.
      rope_theta: base of the rotary frequencies.
      rms_norm_eps: added to the mean square in every RMSNorm.
      tie_word_embeddings: the LM head is the transposed embedding table.
      max_position_embeddings: positions run from 0 to this, exclusive; see `check_positions`.
      initializer_range: standard deviation of freshly initialised matrices.
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
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float
    param_dtype: str
    compute_dtype: str

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_dtype"):
                if value not in _DTYPES:
                    raise ValueError(f"{field.name}={value!r}: choose one of {', '.join(_DTYPES)}")
            elif field.name != "tie_word_embeddings" and value <= 0:
                raise ValueError(f"{field.name}={value!r}: must be positive")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary embedding needs an even width")


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
    tie_word_embeddings: bool,
) -> Qwen3Config:
    """A published dense Qwen3: these share everything but the five arguments."""
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tie_word_embeddings,
        max_position_embeddings=40_960,
        initializer_range=0.02,
        param_dtype="float32",
        compute_dtype="float32",
    )


PRESETS: dict[str, Qwen3Config] = {
    "tiny": Qwen3Config(
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
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        initializer_range=0.08,  # about hidden_size ** -0.5: 0.02 learns far more slowly here
        param_dtype="float32",
        compute_dtype="float32",
    ),
    "qwen3-0.6b": _published(1024, 3072, 28, 16, tie_word_embeddings=True),
    "qwen3-1.7b": _published(2048, 6144, 28, 16, tie_word_embeddings=True),
    "qwen3-4b": _published(2560, 9728, 36, 32, tie_word_embeddings=True),
    "qwen3-8b": _published(4096, 12_288, 36, 32, tie_word_embeddings=False),
    "qwen3-14b": _published(5120, 17_408, 40, 40, tie_word_embeddings=False),
    "qwen3-32b": _published(5120, 25_600, 64, 64, tie_word_embeddings=False),
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
