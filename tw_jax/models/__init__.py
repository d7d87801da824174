"""Qwen3 in Flax NNX, its size presets and checkpoint formats."""

from tw_jax.models.config import (
    PRESETS,
    MixtureOfExperts,
    Qwen3Config,
    RopeScaling,
    check_positions,
    preset,
)
from tw_jax.models.hf_config import config_from_hf, config_to_hf
from tw_jax.models.layers import Constrain
from tw_jax.models.qwen3 import (
    Attend,
    Params,
    Qwen3,
    abstract_params,
    graphdef,
    head_matrix,
    init_params,
    param_axes,
    unstack_layers,
)

__all__ = [
    "PRESETS",
    "Attend",
    "Constrain",
    "MixtureOfExperts",
    "Params",
    "Qwen3",
    "Qwen3Config",
    "RopeScaling",
    "abstract_params",
    "check_positions",
    "config_from_hf",
    "config_to_hf",
    "graphdef",
    "head_matrix",
    "init_params",
    "param_axes",
    "preset",
    "unstack_layers",
]
