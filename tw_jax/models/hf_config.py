"""Hugging Face's `config.json` of Qwen3, to our configuration and back.

A model that is loaded must compute what its authors' code computes. So every field of the file is
either read here, or stands on a list of fields that do not change the forward pass; anything else
is refused by name. Both spellings are read: that of transformers 4 (`rope_theta`, `rope_scaling`,
`torch_dtype`) and that of transformers 5 (`rope_parameters`, `dtype`, `layer_types`,
`num_local_experts`).
"""

from collections.abc import Mapping
from typing import Any

from tw_jax.errors import UserError
from tw_jax.models.config import MixtureOfExperts, Qwen3Config, RopeScaling

DENSE, MOE = "qwen3", "qwen3_moe"
_ARCHITECTURES = {DENSE: "Qwen3ForCausalLM", MOE: "Qwen3MoeForCausalLM"}

# Names, tokens of the tokenizer, and switches of generation and training; the forward pass of
# transformers reads none of them.
_NO_EFFECT = frozenset(
    """
    _name_or_path name_or_path transformers_version dtype torch_dtype torchscript use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class
    return_dict return_dict_in_generate output_hidden_states output_attentions output_scores
    problem_type finetuning_task task_specific_params id2label label2id prefix
    chunk_size_feed_forward attn_implementation _attn_implementation_autoset
    experts_implementation keys_to_ignore_at_inference tf_legacy_loss use_bfloat16
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences suppress_tokens
    begin_suppress_tokens forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty max_window_layers sliding_window unsloth_fixed
    unsloth_version
    """.split()
)

# Fields whose other values ask for a forward pass that is not implemented, with the values that
# do not. Absent is as good: these are transformers' defaults.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "use_sliding_window": (False, None),
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
}
_ONLY_MOE: dict[str, tuple[Any, ...]] = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_MOE_SIZES = ("num_experts_per_tok", "moe_intermediate_size")
_REMEDY = "tw_jax reads dense and mixture-of-experts Qwen3 language models"


class _Fields:
    """The file's fields, each taken out once it is understood."""

    def __init__(self, fields: Mapping[str, Any], origin: str, prefix: str = ""):
        self.left = dict(fields)
        self.origin = origin
        self.prefix = prefix

    def wrong(self, name: str, value: Any, expected: str) -> UserError:
        return UserError(
            f"{self.origin}: {self.prefix}{name}={value!r} is not supported; expected {expected}. "
            f"{_REMEDY}"
        )

    def take(self, name: str, kind: str, *absent: Any) -> Any:
        """A field of the given kind; where it is absent, `absent` if that is given.

        Raises:
          UserError: it is missing or of another kind.
        """
        if name not in self.left:
            if absent:
                return absent[0]
            raise UserError(f"{self.origin}: {self.prefix}{name} is missing; expected {kind}")
        value = self.left.pop(name)
        number = not isinstance(value, bool) and isinstance(value, int | float)
        fits = {
            "a whole number": isinstance(value, int) and number,
            "a number": number,
            "true or false": isinstance(value, bool),
            "a record": isinstance(value, Mapping),
            "text": isinstance(value, str),
        }
        if value is None and absent and absent[0] is None:
            return None
        if not fits[kind]:
            raise self.wrong(name, value, kind)
        return float(value) if kind == "a number" and value is not None else value

    def require(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """Drops fields that must have certain values.

        Raises:
          UserError: one has another.
        """
        for name, values in allowed.items():
            value = self.left.pop(name, values[0])
            if value not in values:
                raise self.wrong(name, value, " or ".join(map(repr, values)))

    def finish(self) -> None:
        """Checks that nothing is left.

        Raises:
          UserError: a field is unknown.
        """
        for name, value in self.left.items():
            raise UserError(
                f"{self.origin}: unknown field {self.prefix}{name}={value!r}: it might change what "
                f"the model computes. If it does not, delete it from the file. {_REMEDY}"
            )


def config_from_hf(
    fields: Mapping[str, Any], *, origin: str, param_dtype: str, compute_dtype: str
) -> Qwen3Config:
    """Reads the fields of a `config.json`.

    The router's load-balancing loss is taken over where the file turns it on
    (`output_router_logits`), as transformers does.

    Args:
      fields: the parsed file.
      origin: its name, for messages.
      param_dtype: dtype in which parameters will be stored, whatever the file's dtype.
      compute_dtype: dtype of activations.

    Raises:
      UserError: a field is missing, unknown, or has a value that is not implemented; the message
        names the field, its value and the file.
    """
    rest = _Fields(fields, origin)
    model_type = rest.take("model_type", "text")
    if model_type not in _ARCHITECTURES:
        raise rest.wrong("model_type", model_type, " or ".join(map(repr, _ARCHITECTURES)))
    rest.require({"architectures": ([_ARCHITECTURES[model_type]], None)})
    rest.require(_ONLY)
    for name in _NO_EFFECT & set(rest.left):
        del rest.left[name]

    sizes = {name: rest.take(name, "a whole number") for name in _SIZES}
    if model_type == MOE:
        head_dim = rest.take("head_dim", "a whole number", None)
        head_dim = head_dim or sizes["hidden_size"] // sizes["num_attention_heads"]
    else:
        head_dim = rest.take("head_dim", "a whole number")
    layer_types = rest.left.pop("layer_types", None)
    if layer_types not in (None, ["full_attention"] * sizes["num_hidden_layers"]):
        raise rest.wrong("layer_types", layer_types, "'full_attention' for every layer")
    theta, scaling = _rope(rest, sizes["max_position_embeddings"])
    try:
        config = Qwen3Config(
            **sizes,
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=rest.take("rms_norm_eps", "a number"),
            tie_word_embeddings=rest.take("tie_word_embeddings", "true or false", False),
            initializer_range=rest.take("initializer_range", "a number"),
            moe=_experts(rest) if model_type == MOE else None,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from error
    rest.finish()
    return config


def _experts(rest: _Fields) -> MixtureOfExperts:
    rest.require(_ONLY_MOE)
    # transformers 5 writes the count under another name than it is given.
    name = "num_local_experts" if "num_local_experts" in rest.left else "num_experts"
    count = rest.take(name, "a whole number")
    if rest.left.pop("num_experts", count) != count:
        raise rest.wrong("num_local_experts", count, "the same as num_experts")
    coefficient = rest.take("router_aux_loss_coef", "a number", 0.0)
    used = rest.take("output_router_logits", "true or false", False)
    return MixtureOfExperts(
        num_experts=count,
        **{name: rest.take(name, "a whole number") for name in _MOE_SIZES},
        norm_topk_prob=rest.take("norm_topk_prob", "true or false"),
        router_aux_loss_coef=coefficient if used else 0.0,
    )


def _rope(rest: _Fields, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling from either spelling; both may be there if they agree."""
    theta = rest.take("rope_theta", "a number", None)
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        record = rest.take(name, "a record", None)
        if record is not None:
            record = {"rope_theta": theta, **record} if theta is not None else record
            found.append(_rope_record(_Fields(record, rest.origin, f"{name}."), max_positions))
    if not found and theta is not None:
        return theta, None
    if not found:
        raise UserError(f"{rest.origin}: rope_theta is missing, and so is rope_parameters")
    if any(other != found[0] for other in found) or theta not in (None, found[0][0]):
        raise UserError(
            f"{rest.origin}: rope_theta, rope_parameters and rope_scaling contradict each other; "
            "keep one of the spellings"
        )
    return found[0]


def _rope_record(rope: _Fields, max_positions: int) -> tuple[float, RopeScaling | None]:
    legacy = rope.take("type", "text", None)
    kind = rope.take("rope_type", "text", legacy or "default")
    theta = rope.take("rope_theta", "a number")
    rope.require({"partial_rotary_factor": (1, None)})
    try:
        if kind == "default":
            scaling = None
        elif kind == "linear":
            nothing = dict.fromkeys(_YARN_FIELDS)
            factor = rope.take("factor", "a number")
            scaling = RopeScaling(kind="linear", factor=factor, **nothing)
        elif kind == "yarn":
            scaling = _yarn(rope, max_positions)
        else:
            raise rope.wrong("rope_type", kind, "'default', 'linear' or 'yarn'")
    except ValueError as error:
        raise UserError(f"{rope.origin}: {error}") from error
    rope.finish()
    return theta, scaling


_YARN_FIELDS = (
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
)


def _yarn(rope: _Fields, max_positions: int) -> RopeScaling:
    """YaRN with what transformers puts in for absent fields."""
    original = rope.take("original_max_position_embeddings", "a whole number", None)
    original = original or max_positions
    factor = rope.take("factor", "a number", None) or max_positions / original
    numbers = {name: rope.take(name, "a number", None) for name in _YARN_FIELDS[1:-1]}
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=numbers["beta_fast"] or 32.0,
        beta_slow=numbers["beta_slow"] or 1.0,
        attention_factor=numbers["attention_factor"],
        mscale=numbers["mscale"] or None,
        mscale_all_dim=numbers["mscale_all_dim"] or None,
        truncate=rope.take("truncate", "true or false", True),
    )


def config_to_hf(config: Qwen3Config) -> dict[str, Any]:
    """The fields of a `config.json` that transformers 4 and 5, vLLM and SGLang load.

    Tokens (`eos_token_id` and its like) are the tokenizer's business and left to the caller. The
    dtype is `param_dtype`.
    """
    kind = MOE if config.moe else DENSE
    fields: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        **{name: getattr(config, name) for name in _SIZES},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "use_cache": True,
        # The older spelling: transformers 5 reads it too, while version 4 and the serving engines
        # built on it know no other.
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling_to_hf(config.rope_scaling),
        "torch_dtype": config.param_dtype,
    }
    if config.moe is None:
        fields["max_window_layers"] = config.num_hidden_layers
        return fields
    moe = config.moe
    return fields | {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "router_aux_loss_coef": moe.router_aux_loss_coef,
        "output_router_logits": moe.router_aux_loss_coef > 0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    optional = {name: getattr(scaling, name) for name in _YARN_FIELDS}
    return {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        **{name: value for name, value in optional.items() if value is not None},
    }
