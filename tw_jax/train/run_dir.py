"""A run's folder: what it holds, and how a finished run becomes a model again.

runs/NAME/
  config.yaml      the resolved configuration
  tokenizer/       the tokenizer, as any Hugging Face tokenizer is stored
  checkpoints/     orbax; each step holds model configuration, parameters and training state
  metrics.jsonl    one line per logged step
  tensorboard/     the same for TensorBoard
"""

import dataclasses
import json
import pathlib
from typing import Any, Literal

import jax.numpy as jnp
import optax
from flax import nnx

from tw_jax.config import to_yaml
from tw_jax.errors import UserError
from tw_jax.models import qwen3
from tw_jax.models.config import PRESETS, Qwen3Config
from tw_jax.tasks.character_tokenizer import TOKENIZER_DIR, load_tokenizer
from tw_jax.train.checkpoint import Checkpointer, restore_params
from tw_jax.train.state import init_train_state
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.schemas import make_schema


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model, tokenizer and schema a run trains.

    Attributes:
      preset: name of a published or small size (tw_jax.models.config.PRESETS).
      tokenizer: a Hugging Face tokenizer folder; "character" is the one that ships with the tasks.
      schema: the language of parallel thought.
      compute_dtype: dtype of matrix products; norms, softmax and loss stay float32.
    """

    preset: str = "tiny"
    tokenizer: str = "character"
    schema: str = "threadweaver"
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def qwen3(self) -> Qwen3Config:
        """The architecture.

        Raises:
          UserError: unknown preset.
        """
        if self.preset not in PRESETS:
            raise UserError(f"model.preset: unknown {self.preset!r}; known: {', '.join(PRESETS)}")
        return dataclasses.replace(PRESETS[self.preset], compute_dtype=self.compute_dtype)

    def load_tokenizer(self) -> Any:
        """The tokenizer."""
        return _tokenizer_in(TOKENIZER_DIR if self.tokenizer == "character" else self.tokenizer)


def _tokenizer_in(folder: str | pathlib.Path) -> Any:
    try:
        return load_tokenizer(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: no usable Hugging Face tokenizer there ({reason})") from error


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: everything a sampler or trainer needs."""

    graphdef: nnx.GraphDef
    params: qwen3.Params
    config: Qwen3Config
    tokenizer: Any
    schema: Schema
    step: int


def new_model(config: ModelConfig, seed: int) -> LoadedModel:
    """A freshly initialised model.

    Raises:
      UserError: unknown preset or schema, or a vocabulary larger than the model's.
    """
    architecture = config.qwen3()
    tokenizer = config.load_tokenizer()
    if len(tokenizer) > architecture.vocab_size:
        raise UserError(
            f"model.preset {config.preset!r} embeds {architecture.vocab_size} ids, but the "
            f"tokenizer {config.tokenizer!r} has {len(tokenizer)}"
        )
    return LoadedModel(
        graphdef=qwen3.graphdef(architecture),
        params=qwen3.init_params(architecture, seed),
        config=architecture,
        tokenizer=tokenizer,
        schema=make_schema(config.schema, tokenizer),
        step=0,
    )


def checkpoints_dir(run_dir: str | pathlib.Path) -> pathlib.Path:
    """Where a run keeps its checkpoints."""
    return pathlib.Path(run_dir) / "checkpoints"


def has_checkpoint(run_dir: str | pathlib.Path) -> bool:
    """Whether a complete checkpoint lies in a run's folder; unfinished ones carry other names."""
    folder = checkpoints_dir(run_dir)
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def write_config(run_dir: pathlib.Path, config: Any) -> None:
    """Writes the resolved configuration, once it is known to fit what the folder holds."""
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")


def prepare_run_dir(run_dir: str | pathlib.Path, tokenizer: Any) -> pathlib.Path:
    """Creates the folder with the tokenizer.

    Raises:
      UserError: the folder cannot be written.
    """
    path = pathlib.Path(run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(str(path / "tokenizer"))
    except OSError as error:
        raise UserError(f"run_dir {path}: cannot write ({error})") from error
    return path


def checkpoint_meta(config: Qwen3Config, schema: Schema, **extra: Any) -> dict[str, Any]:
    """What every checkpoint says of its model, so that `load_run` needs nothing else."""
    meta = {"model": dataclasses.asdict(config), "schema": schema.name, **extra}
    return json.loads(json.dumps(meta))  # as it will be read back: tuples are lists


def save_model(run_dir: str | pathlib.Path, model: LoadedModel, params: qwen3.Params) -> None:
    """Saves parameters alone as a run of one checkpoint, for `load_run` and `init_from`.

    Raises:
      UserError: the folder cannot be written.
    """
    path = pathlib.Path(run_dir)
    path.mkdir(parents=True, exist_ok=True)
    model.tokenizer.save_pretrained(str(path / "tokenizer"))
    state = init_train_state(params, optax.identity())
    state = dataclasses.replace(state, step=jnp.asarray(model.step, jnp.int32))
    with Checkpointer(checkpoints_dir(path), keep=1) as checkpointer:
        checkpointer.save(model.step, state, meta=checkpoint_meta(model.config, model.schema))


def load_run(run_dir: str | pathlib.Path, step: int | None = None) -> LoadedModel:
    """Loads the model of a run, its newest checkpoint or the given step.

    Raises:
      UserError: no such run, or no usable checkpoint.
    """
    path = pathlib.Path(run_dir)
    if not path.is_dir():
        raise UserError(
            f"no run at {path}; train one first, e.g. `tw-jax sft` or `tw-jax quickstart`"
        )
    params, meta, loaded_step = restore_params(checkpoints_dir(path), step)
    config = Qwen3Config.from_dict(meta["model"], origin=f"{path}, checkpoint {loaded_step}")
    tokenizer = _tokenizer_in(path / "tokenizer")
    return LoadedModel(
        graphdef=qwen3.graphdef(config),
        params=params,
        config=config,
        tokenizer=tokenizer,
        schema=make_schema(meta["schema"], tokenizer),
        step=loaded_step,
    )
