"""Schemas by name."""

from typing import Any

from tw_jax.errors import UserError
from tw_jax.trajectory.apr import AprSchema
from tw_jax.trajectory.native import NativeSchema
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.threadweaver import ThreadWeaverSchema

_Class = type[ThreadWeaverSchema] | type[NativeSchema] | type[AprSchema]

_SCHEMAS: dict[str, _Class] = {
    kind.name: kind for kind in (ThreadWeaverSchema, NativeSchema, AprSchema)
}


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


def all_tags() -> frozenset[str]:
    """The control tags of every schema."""
    return frozenset(tag for schema in _SCHEMAS.values() for tag in schema.tags)


def _named(name: str) -> _Class:
    if name not in _SCHEMAS:
        raise UserError(f"unknown schema {name!r}; known: {', '.join(sorted(_SCHEMAS))}")
    return _SCHEMAS[name]
