"""Attention kernels: tree attention for training and scoring."""

from tw_jax.kernels.attention import tree_attention
from tw_jax.kernels.tile_plan import TilePlan, plan_tiles

__all__ = ["TilePlan", "plan_tiles", "tree_attention"]
