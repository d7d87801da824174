"""Settings of `tw-jax plan`."""

import dataclasses
from typing import Literal

from tw_jax.config_checks import require_at_least
from tw_jax.parallel.mesh import ParallelConfig
from tw_jax.train.update import MemoryConfig


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What no compiler tells: the share of a peak that is reached. Each as (worst, best).

    Attributes:
      matmul_worst: share of peak FLOP/s in matrix products, at worst.
      matmul_best: the same at best.
      attention_worst: share of peak FLOP/s in the tiles of tree attention, at worst.
      attention_best: the same at best.
      links_worst: share of the links' rate that collectives reach, at worst.
      links_best: the same at best.
    """

    matmul_worst: float = 0.6
    matmul_best: float = 0.85
    attention_worst: float = 0.2
    attention_best: float = 0.55
    links_worst: float = 0.6
    links_best: float = 0.95

    def __post_init__(self) -> None:
        for name in ("matmul", "attention", "links"):
            worst, best = getattr(self, f"{name}_worst"), getattr(self, f"{name}_best")
            if not 0 < worst <= best <= 1:
                raise ValueError(
                    f"{name}_worst={worst}, {name}_best={best}: 0 < worst <= best <= 1"
                )


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What to plan.

    Attributes:
      program: "sft": one update of supervised fine-tuning; "rl": one P-GRPO update; "decode": one
        step of the rollout engine.
      topology: devices, such as v5e:4x4, v5p:4x4x4, v6e:8x8, tpu7x:2x2x2 (two devices per chip),
        or h100:8, h200:64, a100:8, b200:8. TPU programs are compiled; GPUs are only modelled.
      model: name of a model preset.
      param_dtype: dtype in which training stores parameters, gradients and optimizer moments.
      compute_dtype: dtype of activations, of matmul inputs and of the rollout engine's weights.
      parallel: the mesh.
      memory: what the backward pass keeps, and the head's chunk.
      rows: packed rows per micro-batch; null for one per device that holds rows.
      row_len: tokens per row.
      micro_batches: micro-batches per update.
      visible: live tiles of tree attention, as a share of those of a causal row; 1 is a plain
        causal row, packed trees are sparser.
      decode_rows: rows of the rollout engine's batch.
      context_len: positions of each of its rows.
      assume: see `Assumptions`.
      search: try meshes, remat policies and rows per device, and rank those that fit.
      search_limit: programs that a search compiles at most.
      timeout_s: seconds that one compilation may take.
      cache_dir: where results are kept; empty for no cache.
      json: file for the plan as one JSON object; "-" prints it as the last line.
    """

    program: Literal["sft", "rl", "decode"] = "sft"
    topology: str = "v5p:4x4x4"
    model: str = "qwen3-8b"
    param_dtype: str = "float32"
    compute_dtype: str = "bfloat16"
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig(remat="block", head_chunk=1024)
    rows: int | None = None
    row_len: int = 40_960
    micro_batches: int = 1
    visible: float = 1.0
    decode_rows: int = 64
    context_len: int = 8192
    assume: Assumptions = Assumptions()
    search: bool = False
    search_limit: int = 12
    timeout_s: int = 1800
    cache_dir: str = "~/.cache/tw_jax/plan"
    json: str | None = None

    def __post_init__(self) -> None:
        require_at_least(self, rows=1, row_len=1, micro_batches=1, decode_rows=1, context_len=1)
        require_at_least(self, search_limit=1, timeout_s=1)
        if not 0 < self.visible <= 1:
            raise ValueError(f"visible={self.visible}: must lie in (0, 1]")
