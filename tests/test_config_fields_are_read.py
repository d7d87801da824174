"""No dead options: every field of every verb's configuration is read somewhere in the package."""

import ast
import dataclasses
import pathlib
import typing

import pytest

from tw_jax.cli import VERBS

PACKAGE = pathlib.Path(__file__).parents[1] / "tw_jax"


def attributes_read() -> set[str]:
    """Names of all attributes that the package's code loads."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


def fields_of(cls: type, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted path, name) of every field, nested dataclasses included."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        found.append((prefix + field.name, field.name))
        for kind in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(kind):
                found += fields_of(typing.cast(type, kind), f"{prefix}{field.name}.")
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_every_field_is_read(verb):
    config_class, _ = VERBS[verb].load()
    read = attributes_read()
    # Engine sizes are checked through getattr in a loop as well; reading by name is what counts.
    assert [path for path, name in fields_of(config_class) if name not in read] == []
