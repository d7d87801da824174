"""Our prompts: versioned files whose marks are filled with fenced material."""

import dataclasses
import hashlib
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

Stage = Literal["steps", "groups", "verify", "references", "outlines"]
STAGES: tuple[Stage, ...] = get_args(Stage)

# A prompt whose words change gets a new file with the next number, so that what was written with
# the old one can still be told apart.
VERSIONS: Mapping[str, int] = {
    "system": 1,
    "steps": 1,
    "groups": 1,
    "verify": 1,
    "references": 1,
    "outlines": 1,
}

_MARK = re.compile(r"\{\{([a-z]+)\}\}")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt file.

    Attributes:
      name: of the file.
      text: its text with marks like `{{problem}}`.
      sha256: of the text.
    """

    name: str
    text: str
    sha256: str

    def fill(self, materials: Mapping[str, str]) -> str:
        """The prompt with each mark replaced by fenced material.

        One pass: a mark that stands in the material stays what it is.

        Raises:
          KeyError: material for a mark is missing.
        """
        return _MARK.sub(lambda match: fenced(match[1], materials[match[1]]), self.text)


def load_prompts() -> dict[str, Prompt]:
    """The prompts in use, by stage; `system` goes before all of them."""
    folder = importlib.resources.files("tw_jax.data").joinpath("prompts")
    prompts = {}
    for stage, version in VERSIONS.items():
        name = f"rewrite_{stage}.{version}.md"
        text = folder.joinpath(name).read_text(encoding="utf-8").rstrip("\n")
        prompts[stage] = Prompt(name, text, hashlib.sha256(text.encode()).hexdigest())
    return prompts


def fenced(name: str, material: str) -> str:
    """Material between two lines that it cannot hold, since they carry its own hash."""
    code = hashlib.sha256(material.encode()).hexdigest()[:12]
    title = name.upper()
    return f"----- BEGIN {title} {code} -----\n{material}\n----- END {title} {code} -----"


def numbered(lines: Sequence[str]) -> str:
    """Lines with their numbers, as the LLM is shown them."""
    return "\n".join(f"L{number}: {line}" for number, line in enumerate(lines, start=1))


def tail(text: str, max_chars: int) -> str:
    """The end of a text in whole lines; at least its last line's end where that is longer."""
    if len(text) <= max_chars:
        return text
    if not max_chars:
        return ""
    kept = text[-max_chars:]
    starts_line = text[-max_chars - 1] == "\n"
    if not starts_line and "\n" in kept:
        kept = kept.partition("\n")[2]
    return kept
