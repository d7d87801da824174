"""`config.json` in both spellings, and what is refused."""

import dataclasses
import json

import pytest
import transformers

from tw_jax.errors import UserError
from tw_jax.models import PRESETS, config_from_hf, config_to_hf
from tw_jax.models.config import MixtureOfExperts, RopeScaling

LINEAR = RopeScaling("linear", 2.0, None, None, None, None, None, None, None)
YARN = RopeScaling("yarn", 4.0, 32_768, 32.0, 1.0, None, None, None, True)
YARN_EVERYTHING = RopeScaling("yarn", 4.0, 32_768, 16.0, 2.0, 1.25, 0.5, 0.7, False)
CONFIGS = PRESETS | {
    "linear": dataclasses.replace(PRESETS["tiny"], rope_scaling=LINEAR),
    "yarn": dataclasses.replace(PRESETS["qwen3-8b"], rope_scaling=YARN),
    "yarn, all fields": dataclasses.replace(PRESETS["tiny-moe"], rope_scaling=YARN_EVERYTHING),
    "aux loss": dataclasses.replace(
        PRESETS["tiny-moe"], moe=MixtureOfExperts(4, 3, 8, False, router_aux_loss_coef=0.01)
    ),
    "bfloat16": dataclasses.replace(PRESETS["tiny"], param_dtype="bfloat16"),
}

# As published for Qwen3-8B, in the spelling of transformers 4.
PUBLISHED_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED_30B_A3B = PUBLISHED_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def read(fields, param_dtype="float32"):
    return config_from_hf(
        fields, origin="m/config.json", param_dtype=param_dtype, compute_dtype="float32"
    )


def transformers_config(config):
    kind = transformers.Qwen3MoeConfig if config.moe else transformers.Qwen3Config
    return kind.from_dict(config_to_hf(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_written_and_read_again(name):
    config = CONFIGS[name]
    text = json.dumps(config_to_hf(config))
    assert read(json.loads(text), config.param_dtype) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_makes_of_it_means_the_same(name):
    """Ours, loaded by transformers 5 and saved in its own spelling."""
    config = CONFIGS[name]
    saved = json.loads(transformers_config(config).to_json_string())
    assert "rope_parameters" in saved and "rope_theta" not in saved
    assert read(saved, config.param_dtype) == config


def test_published_files():
    assert read(PUBLISHED_8B) == PRESETS["qwen3-8b"]
    assert read(PUBLISHED_30B_A3B) == PRESETS["qwen3-30b-a3b"]


def test_absent_fields_are_filled_as_transformers_does():
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}
    assert read(PUBLISHED_8B | {"rope_scaling": yarn}).rope_scaling == YARN
    bare = read(PUBLISHED_8B | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    assert bare.rope_scaling == dataclasses.replace(YARN, original_max_position_embeddings=40960)
    moe = {key: value for key, value in PUBLISHED_30B_A3B.items() if key != "head_dim"}
    assert read(moe).head_dim == 2048 // 32


def test_both_spellings_together_must_agree():
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert read(PUBLISHED_8B | both) == PRESETS["qwen3-8b"]
    with pytest.raises(UserError, match=r"m/config.json.*contradict"):
        read(PUBLISHED_8B | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    with pytest.raises(UserError, match="contradict"):
        read(PUBLISHED_8B | both | {"rope_scaling": {"type": "linear", "factor": 2.0}})


REFUSED = {
    "attention_bias": True,
    "attention_dropout": 0.1,
    "use_sliding_window": True,
    "hidden_act": "gelu",
    "mlp_only_layers": [0],
    "decoder_sparse_step": 2,
    "layer_types": ["full_attention"] * 47 + ["sliding_attention"],
    "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    "quantization_config": {"quant_method": "fp8"},
    "partial_rotary_factor": 0.5,
    "architectures": ["Qwen3MoeForSequenceClassification"],
    "model_type": "qwen2",
    "some_new_gate": 1,
    "hidden_size": "2048",
    "num_experts": 128.0,
    "norm_topk_prob": 1,
    "vocab_size": True,
    "rms_norm_eps": None,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(name):
    value = REFUSED[name]
    with pytest.raises(UserError) as error:
        read(PUBLISHED_30B_A3B | {name: value})
    message = str(error.value)
    shown = "dynamic" if name == "rope_scaling" else repr(value)
    assert message.startswith("m/config.json: ") and name in message and shown in message


@pytest.mark.parametrize("name", ["hidden_size", "head_dim", "rms_norm_eps", "model_type"])
def test_a_missing_field_is_named(name):
    fields = {key: value for key, value in PUBLISHED_8B.items() if key != name}
    with pytest.raises(UserError, match=f"m/config.json: {name} is missing"):
        read(fields)


def test_a_missing_base_is_named():
    fields = {key: value for key, value in PUBLISHED_8B.items() if key != "rope_theta"}
    with pytest.raises(UserError, match="rope_theta is missing"):
        read(fields)


def test_unknown_rope_fields_and_bad_sizes_are_named():
    rope = {"rope_type": "yarn", "factor": 4.0, "short_factor": [1.0]}
    with pytest.raises(UserError, match=r"unknown field rope_scaling.short_factor"):
        read(PUBLISHED_8B | {"rope_scaling": rope})
    with pytest.raises(UserError, match=r"m/config.json: rope_scaling.factor=0.5"):
        read(PUBLISHED_8B | {"rope_scaling": {"rope_type": "linear", "factor": 0.5}})
    with pytest.raises(UserError, match=r"m/config.json: num_attention_heads=30 is not a multiple"):
        read(PUBLISHED_8B | {"num_attention_heads": 30})


def test_the_router_loss_is_on_only_where_the_file_turns_it_on():
    assert read(PUBLISHED_30B_A3B).moe.router_aux_loss_coef == 0
    on = read(PUBLISHED_30B_A3B | {"output_router_logits": True})
    assert on.moe.router_aux_loss_coef == 0.001
