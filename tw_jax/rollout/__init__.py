"""Sampling of rollouts that spawn and join threads."""

from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import Request, SamplingParams
from tw_jax.rollout.rollout import Rollout, RolloutUnit

__all__ = [
    "EngineConfig",
    "Request",
    "Rollout",
    "RolloutEngine",
    "RolloutUnit",
    "SamplingParams",
]
