"""Tunix's Qwen3 with weights of ours; runs in the environment `benchmarks/peers/tunix`."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from tunix.models.qwen3.model import ModelConfig
from tunix.models.qwen3.params import create_model_from_safe_tensors


def load_model(weights: pathlib.Path, shape: Mapping[str, Any], dtype: str = "float32") -> Any:
    """The model of a folder of safetensors.

    Args:
      weights: the folder.
      shape: fields of our `Qwen3Config`.
      dtype: of the parameters, the products and the cache.
    """
    config = ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_attention_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=int(shape["rope_theta"]),
        norm_eps=shape["rms_norm_eps"],
        use_tied_embedding=True,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(dtype),
    )
    return create_model_from_safe_tensors(str(weights), config, dtype=jnp.dtype(dtype))
