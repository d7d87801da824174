"""Qwen3 weights that both sides can rebuild from a seed, and the reference model in torch."""

import dataclasses

import numpy as np

from tw_jax.models import Params, Qwen3Config

# Small, and no two widths alike, so that a mixed-up axis cannot go unnoticed. Every field is given:
# the golden file must not depend on a preset.
SMALL = Qwen3Config(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=1e4,
    rope_scaling=None,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
    initializer_range=0.02,
    moe=None,
    param_dtype="float32",
    compute_dtype="float32",
)
CASES: dict[str, Qwen3Config] = {
    "tied": SMALL,
    "untied": dataclasses.replace(SMALL, tie_word_embeddings=False, rope_theta=1e6),
    "one_key_head": dataclasses.replace(
        SMALL, num_attention_heads=6, num_key_value_heads=1, rope_theta=500.0, rms_norm_eps=1e-2
    ),
}


def case_tokens(config: Qwen3Config, rows: int = 2, row_len: int = 24) -> np.ndarray:
    """Token ids `[rows, row_len]` on which a case is compared."""
    rng = np.random.default_rng(7)
    return rng.integers(0, config.vocab_size, (rows, row_len), dtype=np.int32)


def seeded_params(config: Qwen3Config, seed: int = 0) -> Params:
    """Parameters drawn by NumPy; large enough that every part matters for the logits."""
    rng = np.random.default_rng(seed)

    def matrix(*shape):
        return (rng.standard_normal(shape) * shape[-2] ** -0.5).astype(np.float32)

    def scale(*shape):
        return (1 + 0.2 * rng.standard_normal(shape)).astype(np.float32)

    layers, hidden, ffn = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    query_width = config.num_attention_heads * config.head_dim
    key_width = config.num_key_value_heads * config.head_dim
    params: Params = {
        "embed_tokens": {"embedding": matrix(config.vocab_size, hidden)},
        "layers": {
            "input_layernorm": {"scale": scale(layers, hidden)},
            "self_attn": {
                "q_proj": {"kernel": matrix(layers, hidden, query_width)},
                "k_proj": {"kernel": matrix(layers, hidden, key_width)},
                "v_proj": {"kernel": matrix(layers, hidden, key_width)},
                "o_proj": {"kernel": matrix(layers, query_width, hidden)},
                "q_norm": {"scale": scale(layers, config.head_dim)},
                "k_norm": {"scale": scale(layers, config.head_dim)},
            },
            "post_attention_layernorm": {"scale": scale(layers, hidden)},
            "mlp": {
                "gate_proj": {"kernel": matrix(layers, hidden, ffn)},
                "up_proj": {"kernel": matrix(layers, hidden, ffn)},
                "down_proj": {"kernel": matrix(layers, ffn, hidden)},
            },
        },
        "norm": {"scale": scale(hidden)},
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = {"kernel": matrix(hidden, config.vocab_size)}
    return params


def torch_logits(config: Qwen3Config, params: Params, tokens: np.ndarray) -> np.ndarray:
    """Logits `[rows, row_len, vocab]` of transformers' Qwen3ForCausalLM in float32."""
    import torch
    import transformers

    sizes = dataclasses.asdict(config)
    for name in ("param_dtype", "compute_dtype", "rope_scaling", "moe"):
        del sizes[name]
    theta = sizes.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    reference = transformers.Qwen3Config(
        **sizes, rope_parameters=rope, attn_implementation="eager", use_cache=False
    )
    model = transformers.Qwen3ForCausalLM(reference).to(torch.float32).eval()

    def as_tensor(array):
        return torch.from_numpy(np.ascontiguousarray(array))

    state = {
        "model.embed_tokens.weight": as_tensor(params["embed_tokens"]["embedding"]),
        "model.norm.weight": as_tensor(params["norm"]["scale"]),
        "lm_head.weight": as_tensor(
            params["embed_tokens"]["embedding"]
            if config.tie_word_embeddings
            else params["lm_head"]["kernel"].T
        ),
    }
    for index in range(config.num_hidden_layers):
        prefix, layer = f"model.layers.{index}.", params["layers"]
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}{name}.weight"] = as_tensor(layer[name]["scale"][index])
        for part in ("self_attn", "mlp"):
            for name, leaf in layer[part].items():
                array = leaf["kernel"][index].T if "kernel" in leaf else leaf["scale"][index]
                state[f"{prefix}{part}.{name}.weight"] = as_tensor(array)
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
