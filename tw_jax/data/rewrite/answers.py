"""What an LLM answers in each stage: the JSON schema it is bound to, and how its answer is read."""

from typing import Annotated, Any, TypeVar

import pydantic

from tw_jax.data.rewrite.extraction import Group, LineSpan
from tw_jax.data.rewrite.tolerant_json import NoJson, json_values


def _line_number(value: Any) -> Any:
    """`"L12"` and `"12"` mean 12."""
    return value.strip().removeprefix("L") if isinstance(value, str) else value


LineNumber = Annotated[int, pydantic.BeforeValidator(_line_number)]


class LineRange(pydantic.BaseModel):
    """Lines `first` to `last`, both included."""

    first: LineNumber
    last: LineNumber


class Substep(LineRange):
    """A part of a step."""

    summary: str


class Step(LineRange):
    """A main step of a trace."""

    number: int
    summary: str
    depends_on: list[int] = []
    substeps: list[Substep] = []


class StepsAnswer(pydantic.BaseModel):
    """Answer of the stage `steps`."""

    steps: list[Step]


class ParallelGroup(pydantic.BaseModel):
    """Threads that do not need each other."""

    reason: str = ""
    threads: list[LineRange]


class GroupsAnswer(pydantic.BaseModel):
    """Answer of the stage `groups`."""

    groups: list[ParallelGroup]

    def as_groups(self) -> list[Group]:
        """The same for extraction."""
        return [
            Group(tuple(LineSpan(t.first, t.last) for t in group.threads), group.reason)
            for group in self.groups
        ]


class Verdict(pydantic.BaseModel):
    """Whether a block is kept; `block` is its number, from 1."""

    block: int
    keep: bool
    reason: str = ""


class VerifyAnswer(pydantic.BaseModel):
    """Answer of the stage `verify`."""

    verdicts: list[Verdict]


class Replacement(pydantic.BaseModel):
    """A minimal replacement in a thread."""

    find: str
    replace: str
    reason: str = ""


class ReferencesAnswer(pydantic.BaseModel):
    """Answer of the stage `references`."""

    replacements: list[Replacement]


class OutlinesAnswer(pydantic.BaseModel):
    """Answer of the stage `outlines`."""

    outlines: list[str]


Answer = TypeVar("Answer", bound=pydantic.BaseModel)


class BadAnswer(Exception):
    """An answer that cannot be used; the message can be shown to the LLM."""


def read_answer(text: str, model: type[Answer]) -> Answer:
    """Reads an answer, tolerantly.

    A list in place of an object with one field is taken for that field. Where an answer holds
    several JSON values, the last one that fits counts.

    Raises:
      BadAnswer: no JSON, JSON of another shape, or text that is not valid Unicode.
    """
    try:
        values = json_values(text)
    except NoJson as error:
        raise BadAnswer(str(error)) from None
    complaint = ""
    for value in reversed(values):
        if isinstance(value, list) and len(model.model_fields) == 1:
            value = dict.fromkeys(model.model_fields, value)
        try:
            answer = model.model_validate(value)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            complaint = complaint or f"{place or 'the answer'}: {first['msg']}"
            continue
        _check_text(answer)
        return answer
    raise BadAnswer(complaint)


def strict_json_schema(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    """A model's JSON schema in the subset that structured output admits everywhere.

    Every property is required, nothing else may be there, and there are no defaults.
    """
    schema = model.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        part.pop("description", None)
        part["additionalProperties"] = False
        part["required"] = list(part["properties"])
        for property_schema in part["properties"].values():
            property_schema.pop("default", None)
    return schema


def _check_text(answer: pydantic.BaseModel) -> None:
    try:
        text = answer.model_dump_json()
    except (UnicodeEncodeError, pydantic.ValidationError, ValueError) as error:
        raise BadAnswer(f"the answer is not valid Unicode ({error})") from None
    if "\\u0000" in text:
        raise BadAnswer("the answer holds a NUL character")
