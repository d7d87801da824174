"""A run's folder: what it holds, and how a finished run becomes a model again.

runs/NAME/
  config.yaml      the resolved configuration
  tokenizer/       the tokenizer, as any Hugging Face tokenizer is stored
  generation_config.json   settings of generation that came with imported weights
  checkpoints/     orbax; each step holds model configuration, parameters and training state
  metrics.jsonl    one line per logged step
  tensorboard/     the same for TensorBoard
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import yaml
from flax import nnx

from tw_jax import config_fields
from tw_jax.config import to_yaml
from tw_jax.config_checks import require_at_least
from tw_jax.data.only_process import only_process
from tw_jax.data.tokenizer import tokenizer_in
from tw_jax.errors import UserError
from tw_jax.models import qwen3
from tw_jax.models.config import PRESETS, Qwen3Config
from tw_jax.models.lora import Adapter, merged
from tw_jax.models.param_shardings import adapter_shardings, base_shardings, param_shardings
from tw_jax.parallel.layout import Layout
from tw_jax.parallel.processes import is_first_process
from tw_jax.tasks.character_tokenizer import TOKENIZER_DIR
from tw_jax.train.adapter_record import BASE, adapter_of, check_base
from tw_jax.train.checkpoint import Checkpointer, restore_params
from tw_jax.train.published import load_published
from tw_jax.train.state import init_train_state
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.schemas import make_schema, schema_tags
from tw_jax.trajectory.vocabulary import add_control_tokens, ids_needed

_GENERATION_CONFIG = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model, tokenizer and schema a run trains. `model=NAME` is short for `model.source`.

    Attributes:
      source: name of a preset (tw_jax.models.config.PRESETS), which starts from random weights; or
        published safetensors: a local folder, a hub id such as Qwen/Qwen3-8B, or a URL such as
        gs://bucket/folder; or the folder of a run, whose newest checkpoint is taken.
      tokenizer: a Hugging Face tokenizer folder; "auto" is the one beside the weights, for presets
        "character", which ships with the tasks.
      schema: the language of parallel thought; control tokens that the tokenizer lacks are added.
      param_dtype: dtype in which parameters are held and trained.
      compute_dtype: dtype of matrix products; norms, softmax and loss stay float32.
      vocab_multiple: rows of a published vocabulary are rounded up to a multiple of this, so that
        they divide by the devices that share them; they are never cut down.
    """

    source: str = dataclasses.field(default="tiny", metadata={config_fields.SHORTHAND: True})
    tokenizer: str = "auto"
    schema: str = "threadweaver"
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    vocab_multiple: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, vocab_multiple=1)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: everything a sampler or trainer needs.

    Attributes:
      graphdef: static half of the network.
      params: its parameters.
      config: its architecture.
      tokenizer: with the schema's control tokens.
      schema: the language of parallel thought.
      step: training steps behind the parameters.
      generation_config: settings of generation that came with imported weights.
      source_step: where they were taken from a run, the step of its checkpoint.
    """

    graphdef: nnx.GraphDef
    params: qwen3.Params
    config: Qwen3Config
    tokenizer: Any
    schema: Schema
    step: int
    generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source_step: int | None = None


def new_model(
    config: ModelConfig, seed: int, layout: Layout | None = None, *, source_step: int | None = None
) -> LoadedModel:
    """The model that a run starts from: random weights, published ones, or those of another run.

    Args:
      config: which model.
      seed: of random weights.
      layout: the mesh over which parameters are spread as they are made or read; None: one device.
      source_step: which checkpoint of a run; None for the newest.

    Raises:
      UserError: unknown source or schema, unusable files, or a tokenizer larger than the model's
        vocabulary.
    """
    if config.source in PRESETS:
        return _fresh_model(config, seed, layout)
    if has_checkpoint(config.source):
        return _model_of_run(config, layout, source_step)
    if "/" not in config.source and not pathlib.Path(config.source).exists():
        raise UserError(
            f"model.source: {config.source!r} is no preset ({', '.join(PRESETS)}) and no folder "
            "here; a hub id has an owner, as in Qwen/Qwen3-8B"
        )
    published = load_published(
        config.source,
        tokenizer=None if config.tokenizer == "auto" else _tokenizer_folder(config.tokenizer),
        schema=config.schema,
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype,
        vocab_multiple=config.vocab_multiple,
        layout=layout,
    )
    return LoadedModel(
        graphdef=qwen3.graphdef(published.config),
        params=published.params,
        config=published.config,
        tokenizer=published.tokenizer,
        schema=published.schema,
        step=0,
        generation_config=published.generation_config,
    )


def _fresh_model(config: ModelConfig, seed: int, layout: Layout | None) -> LoadedModel:
    architecture = dataclasses.replace(
        PRESETS[config.source],
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype,
    )
    name = "character" if config.tokenizer == "auto" else config.tokenizer
    tokenizer = tokenizer_in(_tokenizer_folder(name))
    tokenizer, _ = add_control_tokens(tokenizer, schema_tags(config.schema))
    if ids_needed(tokenizer) > architecture.vocab_size:
        raise UserError(
            f"model.source {config.source!r} embeds {architecture.vocab_size} ids, but the "
            f"tokenizer {name!r} needs {ids_needed(tokenizer)} with its control tokens; take a "
            "larger preset or another tokenizer"
        )
    return LoadedModel(
        graphdef=qwen3.graphdef(architecture),
        params=qwen3.init_params(architecture, seed, param_shardings(layout, architecture)),
        config=architecture,
        tokenizer=tokenizer,
        schema=make_schema(config.schema, tokenizer),
        step=0,
    )


def _model_of_run(config: ModelConfig, layout: Layout | None, step: int | None) -> LoadedModel:
    model = load_run(config.source, step, layout=layout)
    if config.tokenizer != "auto" or config.schema != model.schema.name:
        raise UserError(
            f"model.source: the run {config.source} brings its own tokenizer and schema "
            f"({model.schema.name}); leave model.tokenizer and model.schema as they are"
        )
    architecture = dataclasses.replace(
        model.config, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype
    )
    return dataclasses.replace(
        model,
        graphdef=qwen3.graphdef(architecture),
        params=jax.tree.map(lambda leaf: leaf.astype(config.param_dtype), model.params),
        config=architecture,
        step=0,
        source_step=model.step,
    )


def _tokenizer_folder(name: str) -> str | pathlib.Path:
    return TOKENIZER_DIR if name == "character" else name


def checkpoints_dir(run_dir: str | pathlib.Path) -> pathlib.Path:
    """Where a run keeps its checkpoints."""
    return pathlib.Path(run_dir) / "checkpoints"


def has_checkpoint(run_dir: str | pathlib.Path) -> bool:
    """Whether a complete checkpoint lies in a run's folder; unfinished ones carry other names."""
    folder = checkpoints_dir(run_dir)
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def write_config(run_dir: pathlib.Path, config: Any) -> None:
    """Writes the resolved configuration, once it is known to fit what the folder holds.

    Where a run goes on under other settings than before, they are said.
    """
    if not is_first_process():
        return
    path, text = run_dir / "config.yaml", to_yaml(config)
    if has_checkpoint(run_dir) and path.exists():
        before = _flat(yaml.safe_load(path.read_text(encoding="utf-8")))
        now = _flat(yaml.safe_load(text))
        changes = [
            f"{name}: {before.get(name)} -> {now.get(name)}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]
        if changes:
            print(f"{run_dir}: settings have changed: {'; '.join(changes)}")
    path.write_text(text, encoding="utf-8")


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    if not isinstance(settings, dict) or not settings:
        return {prefix[:-1]: settings}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.")
    return found


@contextlib.contextmanager
def only_run(run_dir: str | pathlib.Path) -> Iterator[None]:
    """Keeps other commands from training in the same folder while the block runs.

    The first process of a run sees to it.

    Raises:
      UserError: another command trains there.
    """
    if not is_first_process():
        yield
        return
    with only_process(run_dir, setting="run_dir", work="training in this folder; wait, or end it"):
        yield


def prepare_run_dir(run_dir: str | pathlib.Path, tokenizer: Any) -> pathlib.Path:
    """Creates the folder with the tokenizer; the first process of a run does.

    Raises:
      UserError: the folder cannot be written.
    """
    path = pathlib.Path(run_dir)
    if not is_first_process():
        return path
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

    Adapters are merged.

    Raises:
      UserError: the folder cannot be written.
    """
    path = pathlib.Path(run_dir)
    path.mkdir(parents=True, exist_ok=True)
    model.tokenizer.save_pretrained(str(path / "tokenizer"))
    if model.generation_config:
        (path / _GENERATION_CONFIG).write_text(json.dumps(dict(model.generation_config), indent=2))
    state = init_train_state(merged(params), optax.identity())
    state = dataclasses.replace(state, step=jnp.asarray(model.step, jnp.int32))
    with Checkpointer(checkpoints_dir(path), keep=1) as checkpointer:
        checkpointer.save(model.step, state, meta=checkpoint_meta(model.config, model.schema))


def load_run(
    run_dir: str | pathlib.Path, step: int | None = None, *, layout: Layout | None = None
) -> LoadedModel:
    """Loads the model of a run, its newest checkpoint or the given step.

    If the run trained an adapter, its base is found again and the two are merged.

    Args:
      run_dir: the run's folder.
      step: which checkpoint; None for the newest.
      layout: the mesh over which the parameters are spread; None: whole on one device.

    Raises:
      UserError: no such run, no usable checkpoint, or not the base that an adapter was trained on.
    """
    run = open_run(run_dir, step, layout=layout)
    if run.adapter is None:
        return run.model
    base = run.adapter.freeze(run.base_params(layout), base_shardings(layout, run.adapter))
    params = run.adapter.assemble(run.model.params, base)
    whole = merged(params, param_shardings(layout, run.model.config))
    return dataclasses.replace(run.model, params=whole)


@dataclasses.dataclass(frozen=True)
class OpenedRun:
    """A checkpoint as it lies in a run's folder.

    Attributes:
      model: the model; its parameters are the adapter's alone where there is one.
      adapter: None where the run trained a whole model.
      meta: what the checkpoint says of itself.
      name: the run's folder.
    """

    model: LoadedModel
    adapter: Adapter | None
    meta: Mapping[str, Any]
    name: str

    def base_params(self, layout: Layout | None = None) -> qwen3.Params:
        """Parameters of the model that the adapter was trained on.

        Raises:
          UserError: it cannot be found, or is not the same any more.
        """
        record = self.meta[BASE]
        source = ModelConfig(**record["model"])
        try:
            base = new_model(source, record["seed"], layout, source_step=record["step"])
        except UserError as error:
            raise UserError(
                f"{self.name} holds an adapter; its base {source.source} cannot be loaded: {error}"
            ) from error
        check_base(self.meta, base.params, self.name, source.source)
        return base.params


def open_run(
    run_dir: str | pathlib.Path, step: int | None = None, *, layout: Layout | None = None
) -> OpenedRun:
    """Reads a checkpoint of a run, without the base that an adapter needs; see `load_run`.

    Raises:
      UserError: no such run, or no usable checkpoint.
    """
    path = pathlib.Path(run_dir)
    if not path.is_dir():
        raise UserError(
            f"no run at {path}; train one first, e.g. `tw-jax sft` or `tw-jax quickstart`"
        )

    def architecture(meta: Mapping[str, Any]) -> Qwen3Config:
        return Qwen3Config.from_dict(meta["model"], origin=f"a checkpoint in {path}")

    def shardings(meta: Mapping[str, Any]) -> qwen3.Params | None:
        adapter = adapter_of(meta, architecture(meta))
        if adapter is None:
            return param_shardings(layout, architecture(meta))
        return adapter_shardings(layout, adapter)

    params, meta, loaded_step = restore_params(checkpoints_dir(path), step, shardings)
    config = architecture(meta)
    tokenizer = tokenizer_in(path / "tokenizer")
    generation = path / _GENERATION_CONFIG
    model = LoadedModel(
        graphdef=qwen3.graphdef(config),
        params=params,
        config=config,
        tokenizer=tokenizer,
        schema=make_schema(meta["schema"], tokenizer),
        step=loaded_step,
        source_step=loaded_step,
        generation_config=json.loads(generation.read_text()) if generation.is_file() else {},
    )
    return OpenedRun(model, adapter_of(meta, config), meta, str(path))
