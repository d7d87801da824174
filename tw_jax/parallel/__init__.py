"""Many devices: the mesh, the one table of sharding rules, attention and processes on it."""

from tw_jax.parallel.layout import Layout, ShardingRules
from tw_jax.parallel.mesh import MESH_AXES, ParallelConfig, make_layout

__all__ = ["MESH_AXES", "Layout", "ParallelConfig", "ShardingRules", "make_layout"]
