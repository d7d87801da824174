"""Tokenizers by name, with a schema's control tags, and the schema bound to them."""

import pathlib
from typing import Any

from tw_jax.errors import UserError
from tw_jax.tasks.character_tokenizer import TOKENIZER_DIR, load_tokenizer
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.schemas import make_schema, schema_tags
from tw_jax.trajectory.vocabulary import add_control_tokens

SHIPPED = "character"


def open_tokenizer(source: str | None, schema: str) -> tuple[Any, Schema]:
    """Loads a tokenizer and adds the schema's control tags where they are missing.

    The tags get the ids that `tw_jax.train.published.load_published` gives them in the model.

    Args:
      source: a folder or hub id; None and "character" take the shipped one.
      schema: name of the schema.

    Raises:
      UserError: there is no usable tokenizer, or no schema of that name.
    """
    tags = schema_tags(schema)
    source = SHIPPED if source is None else source
    loaded = tokenizer_in(TOKENIZER_DIR if source == SHIPPED else source)
    tokenizer, _ = add_control_tokens(loaded, tags)
    return tokenizer, make_schema(schema, tokenizer)


def tokenizer_in(folder: str | pathlib.Path, name: str = "") -> Any:
    """Loads a tokenizer.

    Args:
      folder: where it lies.
      name: what messages call the folder, where it is a copy.

    Raises:
      UserError: there is no usable Hugging Face tokenizer.
    """
    files = ("tokenizer.json", "vocab.json", "tokenizer.model")
    # Beside a config.json, transformers would make up an empty tokenizer without a word.
    if pathlib.Path(folder).is_dir() and not any(
        (pathlib.Path(folder) / f).exists() for f in files
    ):
        raise UserError(
            f"{name or folder}: no usable Hugging Face tokenizer there (no {' or '.join(files)})"
        )
    if str(folder).startswith(("/", ".", "~")) and not pathlib.Path(folder).exists():
        raise UserError(f"{name or folder}: there is no such folder")
    try:
        return load_tokenizer(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name or folder}: no usable Hugging Face tokenizer there ({reason})"
        ) from error
