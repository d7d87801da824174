"""The fields of configuration classes: what they admit, how they are told, what explains them."""

import dataclasses
import inspect
import json
import pathlib
import re
import types
import typing
from typing import Any, Literal, Union

REQUIRED = dataclasses.MISSING

# Key of a dataclass field's `metadata`.
SHORTHAND = "shorthand"  # True: a plain value in place of the section means this field of it


class Mismatch(Exception):
    """A value that its field's type does not admit."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a configuration class.

    Attributes:
      name: its name in the class.
      hint: its annotation, resolved.
      section: the dataclass it holds (or may hold, beside null), None for plain values.
      explanation: its entry in the class's `Attributes:` section, "" where it has none.
      declared: the standard library's record of it.
    """

    name: str
    hint: Any
    section: type | None
    explanation: str
    declared: dataclasses.Field

    @property
    def type_name(self) -> str:
        """What values it takes, in words."""
        return type_name(self.hint)

    @property
    def shorthand(self) -> "Field | None":
        """The field of its section that a plain value in place of the section means."""
        inner = fields_of(self.section).values() if self.section else ()
        return next((field for field in inner if field.declared.metadata.get(SHORTHAND)), None)

    @property
    def admits_null(self) -> bool:
        """Whether null is a value of it."""
        return types.NoneType in alternatives(self.hint)

    def default(self, base: Any) -> Any:
        """Its value in `base`, an instance or None; else the class's default, else REQUIRED."""
        if base is not None:
            return getattr(base, self.name)
        if self.declared.default_factory is not dataclasses.MISSING:
            return self.declared.default_factory()
        return self.declared.default


def fields_of(cls: type) -> dict[str, Field]:
    """The fields that the constructor of `cls` takes, by name."""
    hints, explained = typing.get_type_hints(cls), explanations(cls)
    found = {}
    for declared in dataclasses.fields(cls):
        if declared.init:
            name, hint = declared.name, hints[declared.name]
            found[name] = Field(name, hint, _section(hint), explained.get(name, ""), declared)
    return found


def _section(hint: Any) -> type | None:
    found = [m for m in alternatives(hint) if isinstance(m, type) and dataclasses.is_dataclass(m)]
    if len(found) > 1:
        raise TypeError(f"a field may hold one kind of dataclass only, not {hint}")
    return found[0] if found else None


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; the type itself where it is none."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def takes_text(hint: Any) -> bool:
    """Whether a type (no union) admits text: str, a path, or a choice among words."""
    if typing.get_origin(hint) is Literal:
        return any(isinstance(choice, str) for choice in typing.get_args(hint))
    return hint in (str, pathlib.Path)


def admits(value: Any, hint: Any) -> bool:
    """Whether `convert` accepts the value."""
    try:
        convert(value, hint)
    except Mismatch:
        return False
    return True


def convert(value: Any, hint: Any) -> Any:
    """Turns a YAML value into what the field holds: lists into tuples, text into paths.

    Raises:
      Mismatch: the type does not admit the value.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        found = [convert(value, member) for member in arguments if admits(value, member)]
        found.sort(key=lambda converted: type(converted) is not type(value))  # unchanged first
    elif origin is Literal:
        found = [c for c in arguments if type(c) is type(value) and c == value]
    elif origin is tuple and isinstance(value, list):
        if arguments[1:] == (...,):
            arguments = arguments[:1] * len(value)
        pairs = list(zip(value, arguments, strict=False))
        found = [tuple(convert(item, inner) for item, inner in pairs)]
        found = found if len(value) == len(arguments) else []
    elif hint in (bool, int, str, types.NoneType):
        found = [value] if type(value) is hint else []  # exactly: true is no number
    elif hint is float:
        found = [float(value)] if type(value) in (int, float) else []
    elif hint is pathlib.Path:
        found = [pathlib.Path(value)] if isinstance(value, str) else []
    elif origin is tuple or dataclasses.is_dataclass(hint):
        found = []
    else:
        raise TypeError(f"configurations cannot hold fields of type {hint}")
    if not found:
        raise Mismatch
    return found[0]


def type_name(hint: Any) -> str:
    """Tells a type in the words of someone who writes YAML."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(member) for member in arguments)
    if origin is Literal:
        return " | ".join(c if isinstance(c, str) else json.dumps(c) for c in arguments)
    if origin is tuple and arguments[1:] == (...,):
        return f"list of {type_name(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(type_name(inner) for inner in arguments)}]"
    names = {types.NoneType: "null", pathlib.Path: "path", str: "text"}
    if dataclasses.is_dataclass(hint):
        return "section"
    return names.get(hint) or hint.__name__


_ENTRY = re.compile(r"^(\w+)(?: \([^)]*\))?:\s*(.*)$")


def explanations(cls: type) -> dict[str, str]:
    """Reads the `Attributes:` sections of a class and its bases: field name -> one-line text."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        lines = inspect.cleandoc(base.__dict__.get("__doc__") or "").splitlines()
        if "Attributes:" not in lines:
            continue
        name, entry_indent = "", None
        for line in lines[lines.index("Attributes:") + 1 :]:
            indent = len(line) - len(line.lstrip())
            if line.strip() and indent == 0:
                break
            entry_indent = indent if entry_indent is None else entry_indent
            entry = _ENTRY.match(line.strip()) if indent == entry_indent else None
            if entry:
                name, found[entry[1]] = entry[1], entry[2]
            elif name and line.strip():
                found[name] = f"{found[name]} {line.strip()}".strip()
    return found
