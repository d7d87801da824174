"""A published model made ready for parallel thought: weights, tokenizer and control tokens."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from tw_jax.data.tokenizer import tokenizer_in
from tw_jax.errors import UserError
from tw_jax.models import qwen3
from tw_jax.models.config import Qwen3Config
from tw_jax.models.enlarge_vocabulary import enlarge_vocabulary
from tw_jax.models.hf_config import config_from_hf
from tw_jax.models.import_weights import load_params
from tw_jax.models.param_shardings import param_shardings
from tw_jax.models.safetensors_file import read_json
from tw_jax.models.weight_location import WeightFolder, open_folder, small_files
from tw_jax.parallel.layout import Layout
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.schemas import make_schema, schema_tags
from tw_jax.trajectory.vocabulary import add_control_tokens, ids_needed

_GENERATION_CONFIG = "generation_config.json"
_TABLES = ("embed_tokens", "lm_head")  # what has a row for each token


class PublishedModel(NamedTuple):
    """What `load_published` returns.

    Attributes:
      params: the parameters, rows for the control tokens included.
      config: the architecture.
      tokenizer: the tokenizer, control tokens included.
      schema: the schema bound to it.
      generation_config: the publisher's settings of generation; empty where there are none.
    """

    params: qwen3.Params
    config: Qwen3Config
    tokenizer: Any
    schema: Schema
    generation_config: Mapping[str, Any]


def load_published(
    source: str,
    *,
    tokenizer: str | pathlib.Path | None,
    schema: str,
    param_dtype: str,
    compute_dtype: str,
    vocab_multiple: int,
    layout: Layout | None = None,
) -> PublishedModel:
    """Loads published weights and adds the schema's control tokens where they are missing.

    Args:
      source: a local folder, hub id or URL.
      tokenizer: a tokenizer's folder; None takes the one beside the weights.
      schema: name of the schema.
      param_dtype: dtype in which parameters are held.
      compute_dtype: dtype of matrix products.
      vocab_multiple: the vocabulary's rows are rounded up to a multiple of this; never down.
      layout: the mesh over which the parameters are spread as they are read; None: one device.

    Raises:
      UserError: the files are unusable (see `load_params`), or the tokenizer is larger than the
        model's vocabulary; nothing has been compiled then.
    """
    folder = open_folder(source)
    config = config_from_hf(
        read_json(folder, "config.json"),
        origin=f"{folder.name}/config.json",
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )
    raw_tokenizer = _tokenizer_of(folder, tokenizer)
    if ids_needed(raw_tokenizer) > config.vocab_size:
        raise UserError(
            f"{tokenizer or folder.name}: the tokenizer has ids up to "
            f"{ids_needed(raw_tokenizer) - 1}, but config.json's vocab_size is "
            f"{config.vocab_size}: take the tokenizer that belongs to the weights"
        )
    full_tokenizer, new_rows = add_control_tokens(raw_tokenizer, schema_tags(schema))
    bound_schema = make_schema(schema, full_tokenizer)
    rows = max(config.vocab_size, ids_needed(full_tokenizer))
    rows += -rows % vocab_multiple
    shardings = param_shardings(layout, dataclasses.replace(config, vocab_size=rows))
    first = shardings
    if layout is not None and shardings is not None and rows > config.vocab_size:
        # The published rows need not divide over the mesh; the enlarged ones will.
        whole = jax.tree.map(lambda _: layout.replicated(), shardings)
        first = {**shardings, **{name: whole[name] for name in _TABLES if name in whole}}
    params = load_params(folder, config, first)
    if new_rows or rows > config.vocab_size:
        params, config = enlarge_vocabulary(params, config, rows, new_rows, shardings)
    generation = {}
    if _GENERATION_CONFIG in folder.files():
        generation = read_json(folder, _GENERATION_CONFIG)
    return PublishedModel(params, config, full_tokenizer, bound_schema, generation)


def _tokenizer_of(folder: WeightFolder, tokenizer: str | pathlib.Path | None) -> Any:
    if tokenizer is not None:
        return tokenizer_in(tokenizer)
    with small_files(folder) as path:
        return tokenizer_in(path, folder.name)
