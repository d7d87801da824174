"""`tw-jax import` and `tw-jax export`: published safetensors to a run's folder, and back."""

import dataclasses
from typing import Literal

import jax

from tw_jax.config_checks import require_at_least
from tw_jax.errors import UserError
from tw_jax.models.config import PRESETS
from tw_jax.models.export_adapter import export_adapter
from tw_jax.models.export_weights import export_model
from tw_jax.parallel.mesh import ParallelConfig, make_layout
from tw_jax.train.adapter_record import BASE
from tw_jax.train.run_dir import (
    ModelConfig,
    has_checkpoint,
    load_run,
    new_model,
    open_run,
    save_model,
)


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """What to import, and where to.

    Attributes:
      model: the published weights; a preset has none.
      run_dir: folder of the run to make.
    """

    model: ModelConfig
    run_dir: str = "runs/imported"

    def __post_init__(self) -> None:
        if self.model.source in PRESETS:
            raise ValueError(
                f"model.source={self.model.source}: is a preset, which has no weights; name a "
                "folder, a hub id or a URL: `tw-jax import Qwen/Qwen3-0.6B run_dir=runs/base`"
            )


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What to export, and how.

    Attributes:
      run_dir: folder of the run whose model is written.
      out: the new folder; nothing may be there yet.
      step: checkpoint step; null takes the newest.
      dtype: of the written weights; "same" keeps the run's.
      max_shard_mb: largest weight file in megabytes (1e6 bytes).
      adapter: write the run's adapter alone, as the library peft loads it, instead of merging it
        with its base.
      parallel: how several processes share the model; one process reads it whole.
    """

    run_dir: str
    out: str
    step: int | None = None
    dtype: Literal["same", "float32", "bfloat16", "float16"] = "same"
    max_shard_mb: int = 5000
    adapter: bool = False
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        require_at_least(self, max_shard_mb=1)
        if self.adapter and self.dtype != "same":
            raise ValueError(f"dtype={self.dtype}: an adapter is written in float32; leave it out")


def run_import(config: ImportConfig) -> None:
    """Makes a run's folder that holds the published model, ready to be trained or sampled.

    Raises:
      UserError: the weights are unusable, or the folder holds a run already.
    """
    if has_checkpoint(config.run_dir):
        raise UserError(f"{config.run_dir}: holds a run already; give another run_dir")
    model = new_model(config.model, seed=0)
    save_model(config.run_dir, model, model.params)
    print(
        f"{config.run_dir}: {config.model.source} with {model.config.vocab_size} vocabulary rows "
        f"in {model.config.param_dtype}"
    )


def run_export(config: ExportConfig) -> None:
    """Writes a run's model as a Hugging Face folder; adapters are merged, or written alone.

    Several processes hold a share of the model each, so none needs room for all of it.

    Raises:
      UserError: there is no such run, or `out` exists or cannot be written; an adapter is asked for
        and the run has none.
    """
    if config.adapter:
        _export_adapter(config)
        return
    layout = make_layout(config.parallel) if jax.process_count() > 1 else None
    model = load_run(config.run_dir, config.step, layout=layout)
    files = export_model(
        config.out,
        model.params,
        model.config,
        model.tokenizer,
        dtype=None if config.dtype == "same" else config.dtype,
        max_shard_bytes=config.max_shard_mb * 1_000_000,
        generation_config=model.generation_config,
    )
    print(f"{config.out}: step {model.step} of {config.run_dir} in {len(files)} weight file(s)")


def _export_adapter(config: ExportConfig) -> None:
    if jax.process_count() > 1:
        raise UserError("adapter=true: an adapter is small; export it from one process")
    run = open_run(config.run_dir, config.step)
    if run.adapter is None:
        raise UserError(
            f"{config.run_dir}: the run trained the whole model, no adapter; leave adapter=true out"
        )
    source = run.meta[BASE]["model"]["source"]
    base = run.base_params() if run.adapter.config.embeddings == "control" else None
    model = run.model
    export_adapter(
        config.out, model.params, run.adapter, model.tokenizer, base_name=source, base=base
    )
    print(f"{config.out}: adapter of step {model.step} of {config.run_dir}, on {source}")
