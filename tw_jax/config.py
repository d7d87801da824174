"""Dataclasses <-> YAML <-> command line.

A configuration is a frozen dataclass, nested as deep as it reads well. Its values come from three
places, later ones winning: the defaults in the class, one YAML file, and `a.b=value` words of the
command line. A plain value in place of a section sets the field of it that is marked as its
shorthand (`model=tiny` is `model.source=tiny`). Nothing is built until all three are merged, so a
class's own checks (`__post_init__` raising ValueError) see final values only. Field explanations
live in the `Attributes:` section of the class's docstring, where the help text finds them.

Admitted field types: bool, int, float, str, pathlib.Path, Literal, other dataclasses, tuples of
these, and unions (`X | None`).
"""

import dataclasses
import difflib
import pathlib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml

from tw_jax import config_fields
from tw_jax.config_fields import REQUIRED, fields_of
from tw_jax.errors import UserError

C = TypeVar("C")


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; the message names the key, its origin and the remedy."""


@dataclasses.dataclass(frozen=True)
class HelpRow:
    """One field of a configuration, for help texts.

    Attributes:
      key: dotted path of the field.
      type_name: what values it takes, in words.
      default: the default as YAML; "required" where there is none, "" for a section.
      explanation: the field's entry in its class's `Attributes:` section; "" where it has none.
      is_section: the field is itself a dataclass, whose fields follow.
    """

    key: str
    type_name: str
    default: str
    explanation: str
    is_section: bool


@dataclasses.dataclass(frozen=True)
class _Value:
    """A checked value and where it was written."""

    value: Any
    origin: str


_Tree = dict[str, Any]  # field name -> _Value, or the _Tree of a nested dataclass


def load_config(cls: type[C], path: str | pathlib.Path | None, overrides: Sequence[str] = ()) -> C:
    """Builds a configuration from defaults, a YAML file and command-line words.

    Args:
      cls: the dataclass to build.
      path: a YAML file, or None for none.
      overrides: words `a.b=value`; values are read as YAML, those of text fields verbatim.

    Returns:
      The configuration.

    Raises:
      ConfigError: a file that cannot be read, or an unknown, ill-typed, missing or refused value.
    """
    tree: _Tree = {}
    if path is not None:
        _insert(cls, tree, _read_file(pathlib.Path(path)), "", str(path), cls)
    for word in overrides:
        _insert(cls, tree, _read_override(cls, word), "", "command line", cls)
    return _build(cls, tree, None, "")


def to_yaml(config: Any) -> str:
    """Writes a configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def describe(cls: type) -> list[HelpRow]:
    """Lists every field of a configuration; the fields of a nested one follow the one it is in."""
    return list(_describe(cls, None, ""))


# --- YAML ---------------------------------------------------------------------------------------


class _Lines(dict):
    """A mapping that remembers the line of each key."""

    lines: dict[str, int]


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads `1e-4` as a number and `None` as null, and knows lines."""


class _Dumper(yaml.SafeDumper):
    """Quotes the text that `_Loader` would otherwise read as a number or null."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_EXPONENT = re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
for _resolver in (_Loader, _Dumper):
    _resolver.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    _resolver.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^None$"), ["N"])


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> Iterator[_Lines]:
    mapping = _Lines()
    mapping.lines = {}
    yield mapping
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        problem = None
        if not isinstance(key, str):
            problem = f"keys must be text, not {key!r}"
        elif key in mapping:
            problem = f"key {key!r} is given twice (first on line {mapping.lines[key]})"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        mapping.lines[key] = key_node.start_mark.line + 1
        mapping[key] = loader.construct_object(value_node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{origin}:{mark.line + 1}" if mark and origin != "command line" else origin
        raise ConfigError(f"{place}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: `2024-99-99`
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error


def _read_file(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        there = [str(other) for other in path.parent.glob("*.y*ml")]
        close = difflib.get_close_matches(str(path), there, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{path}: there is no such file{hint}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 text file: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    values = _parse(text, str(path))
    if not isinstance(values, _Lines | None):
        raise ConfigError(f"{path}: must hold `key: value` lines, not a {type(values).__name__}")
    return values or {}


def _read_override(cls: type, word: str) -> Mapping[str, Any]:
    """Turns `a.b=value` into `{a: {b: value}}`."""
    key, equals, text = word.partition("=")
    names = key.strip().lstrip("-").split(".")
    if not equals or not all(names):
        raise ConfigError(f"command line: {word!r} is not of the form key=value")
    section, hint, field = cls, None, None
    for name in names:
        fields = fields_of(section) if section else {}
        field = fields.get(name)
        section, hint = (field.section, field.hint) if field else (None, None)
    if field and field.shorthand and not text.startswith("{") and not _is_null(text, field):
        names.append(field.shorthand.name)  # `model=tiny` is `model.source=tiny`
        hint = field.shorthand.hint
    value = _read_word(text, hint)
    for name in reversed(names):
        value = {name: value}
    return value


def _is_null(text: str, field: config_fields.Field) -> bool:
    return field.admits_null and text in ("null", "~", "None")


def _read_word(text: str, hint: Any) -> Any:
    """Reads one command-line value; text fields take it verbatim, so that `: # [` need no quotes.

    Quotes still quote, and `null`, `~` or `None` still mean null where a text field admits it.
    """
    members = config_fields.alternatives(hint)
    others = [member for member in members if not config_fields.takes_text(member)]
    if len(others) == len(members):
        return _parse(text, "command line")
    try:
        value = _parse(text, "command line")
    except ConfigError:
        return text
    if isinstance(value, str):
        return value if text[:1] in ("'", '"') else text
    is_other = bool(text) and any(config_fields.admits(value, member) for member in others)
    return value if is_other else text


# --- merging and building -----------------------------------------------------------------------


def _insert(
    cls: type, tree: _Tree, raw: Mapping[str, Any], prefix: str, origin: str, root: type
) -> None:
    """Checks raw values against the fields of `cls` and puts them into `tree`, nested ones too."""
    fields = fields_of(cls)
    for name, value in raw.items():
        key = f"{prefix}{name}"
        place = f"{origin}:{raw.lines[name]}" if isinstance(raw, _Lines) else origin
        if name not in fields:
            here = [f"{prefix}{known}" for known in fields]
            raise ConfigError(f"{place}: unknown key '{key}'; {_nearest(key, here, root)}")
        field = fields[name]
        if field.section and value is None and not field.admits_null:
            value = {}  # a heading whose entries are all commented out
        if field.shorthand and value is not None and not isinstance(value, Mapping):
            line = raw.lines[name] if isinstance(raw, _Lines) else None
            value = _shorthand(field.shorthand.name, value, line)
        if field.section and isinstance(value, Mapping):
            if not isinstance(tree.get(name), dict):
                tree[name] = {}
            _insert(field.section, tree[name], value, f"{key}.", origin, root)
            continue
        try:
            tree[name] = _Value(config_fields.convert(value, field.hint), place)
        except config_fields.Mismatch:
            found = f"{value!r:.60}" if value is not None else "null"
            hint = ""
            if typing.get_origin(field.hint) is tuple and isinstance(value, str | int | float):
                hint = f"; write [{value}]"
            raise ConfigError(
                f"{place}: '{key}' must be {field.type_name}, not {found}{hint}"
            ) from None


def _shorthand(name: str, value: Any, line: int | None) -> Mapping[str, Any]:
    """`{name: value}` on the given line of a file, if it is in one."""
    if line is None:
        return {name: value}
    mapping = _Lines({name: value})
    mapping.lines = {name: line}
    return mapping


def _build(cls: type[C], tree: _Tree, base: Any, prefix: str) -> C:
    """Makes the dataclass: values of `tree`, else those of `base`, else the class's defaults."""
    arguments = {}
    for name, field in fields_of(cls).items():
        node, default = tree.get(name), field.default(base)
        if node is None and default is REQUIRED and field.section and not field.admits_null:
            node = {}
        if isinstance(node, _Value):
            arguments[name] = node.value
        elif node is not None and field.section:
            inner_base = default if isinstance(default, field.section) else None
            arguments[name] = _build(field.section, node, inner_base, f"{prefix}{name}.")
        elif default is REQUIRED:
            key = f"{prefix}{name}"
            raise ConfigError(
                f"'{key}' is required ({field.type_name}): "
                f"give it in the YAML file or as {key}=... on the command line"
            )
        else:
            arguments[name] = default
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        # Where the fields were written that the message names; else where any of them was.
        named = {name: node for name, node in tree.items() if re.search(rf"\b{name}\b", str(error))}
        origins = ", ".join(dict.fromkeys(_origins(named or tree))) or "defaults"
        at = f"'{prefix[:-1]}': " if prefix else ""
        raise ConfigError(f"{origins}: {at}{error}") from error


def _origins(tree: _Tree) -> Iterator[str]:
    for node in tree.values():
        if isinstance(node, _Value):
            yield node.origin
        else:
            yield from _origins(node)


def _nearest(key: str, here: Sequence[str], root: type) -> str:
    """Suggests a valid key: the same last name elsewhere, else the most similar one."""
    leaves: dict[str, str] = {}
    for row in describe(root):
        leaves.setdefault(row.key.rpartition(".")[2], row.key)
    leaf = key.rpartition(".")[2]
    if leaf in leaves:
        return f"did you mean '{leaves[leaf]}'?"
    if near := difflib.get_close_matches(key, [*here, *leaves.values()], 1, 0.8):
        return f"did you mean '{near[0]}'?"
    if near := difflib.get_close_matches(leaf, leaves, 1, 0.7):
        return f"did you mean '{leaves[near[0]]}'?"
    return f"known keys here: {', '.join(here)}"


# --- showing ------------------------------------------------------------------------------------


def _describe(cls: type, base: Any, prefix: str) -> Iterator[HelpRow]:
    # Plain fields first, so that none of them seems to belong to a section before it.
    for field in sorted(fields_of(cls).values(), key=lambda field: field.section is not None):
        key, default = f"{prefix}{field.name}", field.default(base)
        if field.section and default is not None:
            shown = ""
        else:
            shown = "required" if default is REQUIRED else _shown(default)
        yield HelpRow(key, field.type_name, shown, field.explanation, field.section is not None)
        if field.section:
            inner_base = default if isinstance(default, field.section) else None
            yield from _describe(field.section, inner_base, f"{key}.")


def _shown(value: Any) -> str:
    """A value as one line of YAML."""
    text = yaml.dump(
        _plain(value), Dumper=_Dumper, default_flow_style=True, width=10**6, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    """Dataclasses as mappings, tuples as lists, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(getattr(value, name)) for name in fields_of(type(value))}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, pathlib.Path) else value
