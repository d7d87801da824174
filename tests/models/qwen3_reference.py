"""Qwen3 weights that both sides can rebuild from a seed, and the reference model in torch."""

import dataclasses

import numpy as np

from tw_jax.models import MixtureOfExperts, Params, Qwen3Config, RopeScaling, config_to_hf

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
EXPERTS = MixtureOfExperts(
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=28,
    norm_topk_prob=True,
    router_aux_loss_coef=0.0,
)
# Chosen so that, of the eight frequencies, some stay, some are mixed and some are slowed.
YARN = RopeScaling(
    kind="yarn",
    factor=4.0,
    original_max_position_embeddings=40,
    beta_fast=4.0,
    beta_slow=1.0,
    attention_factor=None,
    mscale=None,
    mscale_all_dim=None,
    truncate=True,
)
LINEAR = RopeScaling("linear", 2.5, *[None] * 7)
_SHORT_WAVES = dataclasses.replace(SMALL, rope_theta=20.0)
CASES: dict[str, Qwen3Config] = {
    "tied": SMALL,
    "untied": dataclasses.replace(SMALL, tie_word_embeddings=False, rope_theta=1e6),
    "one_key_head": dataclasses.replace(
        SMALL, num_attention_heads=6, num_key_value_heads=1, rope_theta=500.0, rms_norm_eps=1e-2
    ),
    "linear": dataclasses.replace(_SHORT_WAVES, rope_scaling=LINEAR),
    "yarn": dataclasses.replace(_SHORT_WAVES, rope_scaling=YARN),
    "yarn_every_field": dataclasses.replace(
        _SHORT_WAVES,
        rope_scaling=dataclasses.replace(YARN, mscale=0.7, mscale_all_dim=2.0, truncate=False),
    ),
    "moe": dataclasses.replace(SMALL, moe=EXPERTS),
    "moe_unnormalised": dataclasses.replace(
        SMALL, moe=dataclasses.replace(EXPERTS, num_experts_per_tok=3, norm_topk_prob=False)
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

    layers, hidden = config.num_hidden_layers, config.hidden_size
    if config.moe:
        stack = (layers, config.moe.num_experts)
        ffn = config.moe.moe_intermediate_size
    else:
        stack, ffn = (layers,), config.intermediate_size
    query_width = config.num_attention_heads * config.head_dim
    key_width = config.num_key_value_heads * config.head_dim

    def feed_forward():
        return {
            "gate_proj": {"kernel": matrix(*stack, hidden, ffn)},
            "up_proj": {"kernel": matrix(*stack, hidden, ffn)},
            "down_proj": {"kernel": matrix(*stack, ffn, hidden)},
        }

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
            "mlp": feed_forward() if config.moe is None else {"experts": feed_forward()},
        },
        "norm": {"scale": scale(hidden)},
    }
    if config.moe:
        router = matrix(layers, hidden, config.moe.num_experts)
        params["layers"]["mlp"]["router"] = {"kernel": router}
    if not config.tie_word_embeddings:
        params["lm_head"] = {"kernel": matrix(hidden, config.vocab_size)}
    return params


def torch_tensors(config: Qwen3Config, params: Params) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, by the names and in the layout of transformers."""
    layers = params["layers"]
    found = {
        "model.embed_tokens.weight": params["embed_tokens"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
    }
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = np.swapaxes(params["lm_head"]["kernel"], -1, -2)
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."

        def matrix(leaf, index=index):
            return np.swapaxes(leaf["kernel"][index], -1, -2)

        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{name}.weight"] = layers[name]["scale"][index]
        for name, leaf in layers["self_attn"].items():
            array = matrix(leaf) if "kernel" in leaf else leaf["scale"][index]
            found[f"{prefix}self_attn.{name}.weight"] = array
        mlp = layers["mlp"]
        if config.moe is None:
            for name, leaf in mlp.items():
                found[f"{prefix}mlp.{name}.weight"] = matrix(leaf)
        else:
            experts = {name: matrix(leaf) for name, leaf in mlp["experts"].items()}
            both = np.concatenate([experts["gate_proj"], experts["up_proj"]], axis=1)
            found[f"{prefix}mlp.gate.weight"] = matrix(mlp["router"])
            found[f"{prefix}mlp.experts.gate_up_proj"] = both
            found[f"{prefix}mlp.experts.down_proj"] = experts["down_proj"]
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def torch_model(config: Qwen3Config, params: Params):
    """Transformers' model, in float32, with these parameters, made from our `config.json`."""
    import torch
    import transformers

    torch.set_num_threads(1)
    kind, settings = (
        (transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig)
        if config.moe
        else (transformers.Qwen3ForCausalLM, transformers.Qwen3Config)
    )
    reference = settings.from_dict(config_to_hf(config), attn_implementation="eager")
    model = kind(reference).to(torch.float32).eval()
    tensors = torch_tensors(config, params)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    state = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    model.load_state_dict(state, strict=True)
    return model


def torch_logits(config: Qwen3Config, params: Params, tokens: np.ndarray) -> np.ndarray:
    """Logits `[rows, row_len, vocab]` of transformers' model."""
    import torch

    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))
        return torch_model(config, params)(input_ids=ids).logits.numpy()


@dataclasses.dataclass(frozen=True)
class TorchLoss:
    """What transformers computes for causal rows, each token predicted from those before.

    Attributes:
      nll: mean negative log-probability.
      aux: the load-balancing loss, not weighted; None for dense models.
      gradients: of `nll + aux_weight * aux`, by the names of transformers.
    """

    nll: float
    aux: float | None
    gradients: dict[str, np.ndarray]


def torch_loss(
    config: Qwen3Config,
    params: Params,
    tokens: np.ndarray,
    aux_weight: float = 0.0,
    mask: np.ndarray | None = None,
) -> TorchLoss:
    """Loss and gradients; `mask` is 0 for padding, which must come behind the text."""
    import torch

    model = torch_model(config, params)
    ids = torch.from_numpy(tokens.astype(np.int64))
    more = {} if config.moe is None else {"output_router_logits": True}
    if mask is not None:
        more["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
    out = model(input_ids=ids, **more)
    chosen = torch.log_softmax(out.logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    weight = torch.ones_like(chosen) if mask is None else torch.from_numpy(mask[:, 1:]).float()
    nll = -(chosen * weight).sum() / weight.sum()
    aux = out.aux_loss if config.moe else None
    (nll if aux is None else nll + aux_weight * aux).backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return TorchLoss(nll.item(), None if aux is None else aux.item(), gradients)
