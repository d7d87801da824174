"""Qwen3 in Flax NNX, its size presets and checkpoint formats."""

from tw_jax.models.config import PRESETS, Qwen3Config, check_positions, preset
from tw_jax.models.qwen3 import (
    Attend,
    Params,
    Qwen3,
    graphdef,
    head_matrix,
    init_params,
    unstack_layers,
)

__all__ = [
    "PRESETS",
    "Attend",
    "Params",
    "Qwen3",
    "Qwen3Config",
    "check_positions",
    "graphdef",
    "head_matrix",
    "init_params",
    "preset",
    "unstack_layers",
]
