"""A folder that an earlier run has used: does this run go on there, or would it replace work?"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tw_jax.config import to_yaml
from tw_jax.errors import UserError


def require_same_work(
    settings: pathlib.Path, config: Any, keys: Sequence[str], *, is_used: bool
) -> None:
    """Checks that the results in a folder are those of the work that a configuration describes.

    Lists may have become longer at their end: what the earlier run did is part of that work too.

    Args:
      settings: the `config.yaml` of the earlier run; may be missing.
      config: what is to run now.
      keys: dotted names of the settings that say what the work is.
      is_used: whether the folder holds results; without any, settings may differ.

    Raises:
      UserError: a setting differs, or the settings in the folder are not those of such a run.
    """
    if not settings.exists():
        return
    try:
        then = yaml.safe_load(settings.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{settings} cannot be read ({reason}); name another output") from error
    names = [key.partition(".")[0] for key in keys]
    if not isinstance(then, dict) or not set(names) <= set(then):
        raise UserError(
            f"{settings} holds the settings of something else: it lacks "
            f"{' or '.join(dict.fromkeys(names))}; name another output"
        )
    now = yaml.safe_load(to_yaml(config))
    found = (_differences(key, _at(then, key), _at(now, key)) for key in keys)
    differing = [difference for differences in found for difference in differences]
    if differing and is_used:
        raise UserError(
            f"output={settings.parent} holds the results of other settings: "
            f"{'; '.join(differing)}. Name another output, or delete that folder"
        )


def _at(tree: Any, key: str) -> Any:
    """The value of a dotted key; None where a section on its way is null."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _differences(key: str, then: Any, now: Any) -> list[str]:
    """Which settings at or below a key differ, in words."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        shared = [name for name in now if name in then]
        return [
            difference
            for name in shared
            for difference in _differences(f"{key}.{name}", then[name], now[name])
        ]
    if _plain(now) == _plain(then) or _continues(then, now):
        return []
    return [f"{key} was {_shown(then)}, now it is {_shown(now)}"]


def _continues(then: Any, now: Any) -> bool:
    """Whether one list begins with another, which is not empty."""
    lists = isinstance(then, list) and isinstance(now, list)
    return lists and bool(then) and now[: len(then)] == then


def _plain(value: Any) -> Any:
    """Folders and URLs mean the same with and without a slash at their end."""
    return value.rstrip("/") if isinstance(value, str) else value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value)
