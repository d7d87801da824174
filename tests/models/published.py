"""Small published checkpoints for tests: written by `safetensors`, not by the code under test."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import safetensors.numpy

from tests.models.qwen3_reference import SMALL
from tw_jax.models import MixtureOfExperts, Params, Qwen3Config, abstract_params

EXPERTS = dataclasses.replace(
    SMALL,
    moe=MixtureOfExperts(
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
    ),
)


def named_tensors(params: Params) -> dict[str, np.ndarray]:
    """Parameters as published tensors; written out by hand, independently of the table."""
    layers, tensors = params["layers"], {}
    tensors["model.embed_tokens.weight"] = params["embed_tokens"]["embedding"]
    tensors["model.norm.weight"] = params["norm"]["scale"]
    if "lm_head" in params:
        tensors["lm_head.weight"] = params["lm_head"]["kernel"].T
    for i in range(len(layers["input_layernorm"]["scale"])):
        at = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = layers[norm]["scale"][i]
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{at}.self_attn.{part}.weight"] = layers["self_attn"][part]["kernel"][i].T
        for norm in ("q_norm", "k_norm"):
            tensors[f"{at}.self_attn.{norm}.weight"] = layers["self_attn"][norm]["scale"][i]
        mlp = layers["mlp"]
        if "router" in mlp:
            tensors[f"{at}.mlp.gate.weight"] = mlp["router"]["kernel"][i].T
            for part in ("gate_proj", "up_proj", "down_proj"):
                for e, kernel in enumerate(mlp["experts"][part]["kernel"][i]):
                    tensors[f"{at}.mlp.experts.{e}.{part}.weight"] = kernel.T
        else:
            for part in ("gate_proj", "up_proj", "down_proj"):
                tensors[f"{at}.mlp.{part}.weight"] = mlp[part]["kernel"][i].T
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def random_params(config: Qwen3Config, seed: int = 0) -> Params:
    """Parameters of any architecture; large enough that every part matters for the logits."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        is_scale = len(leaf.shape) - (leaf.shape[0] == config.num_hidden_layers) < 2
        return 1 + 0.2 * values if is_scale else values * leaf.shape[-2] ** -0.5

    return jax.tree.map(draw, abstract_params(config))


def fused(tensors: Mapping[str, np.ndarray], config: Qwen3Config) -> dict[str, np.ndarray]:
    """The experts' tensors fused as transformers 5 holds them in memory."""
    assert config.moe is not None
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}.mlp.experts"
        each = [
            {part: tensors[f"{at}.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")}
            for e in range(config.moe.num_experts)
        ]
        pairs = [np.concatenate([expert["gate"], expert["up"]]) for expert in each]
        found[f"{at}.gate_up_proj"] = np.stack(pairs)
        found[f"{at}.down_proj"] = np.stack([expert["down"] for expert in each])
    return found


def write_shards(
    folder: pathlib.Path, tensors: Mapping[str, np.ndarray], shards: int = 1
) -> pathlib.Path:
    """Writes tensors as one file, or as several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        safetensors.numpy.save_file(dict(tensors), folder / "model.safetensors")
        return folder
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        safetensors.numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
