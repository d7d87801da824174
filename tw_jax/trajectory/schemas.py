"""Schemas by name."""

from typing import Any

from tw_jax.errors import UserError
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.threadweaver import ThreadWeaverSchema

_SCHEMAS = {ThreadWeaverSchema.name: ThreadWeaverSchema}


def make_schema(name: str, tokenizer: Any) -> Schema:
    """Binds the named schema to a tokenizer.

    Raises:
      UserError: the name is unknown, or the tokenizer lacks a control tag.
    """
    return _named(name).from_tokenizer(tokenizer)


def schema_tags(name: str) -> tuple[str, ...]:
    """The control tags of the named schema.

    Raises:
      UserError: the name is unknown.
    """
    return _named(name).tags


def _named(name: str) -> type[ThreadWeaverSchema]:
    if name not in _SCHEMAS:
        raise UserError(f"unknown schema {name!r}; known: {', '.join(sorted(_SCHEMAS))}")
    return _SCHEMAS[name]
