r"""Problems with reference answers, of any source of records (`tw_jax.data.records`).

    {"prompt": "How many primes are below 10?", "answer": "4", "id": "7"}

The prompt is text or a list of turns; the answer is text or a number; the id may be missing. Kinds
of rejects: those of `read_records`, `text_field` and `read_turns`, `duplicate_id` and
`duplicate_problem`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tw_jax.data.chat import Turn, read_turns
from tw_jax.data.records import Record, RejectedRecord, read_records, required_text
from tw_jax.data.rejects import Rejects


@dataclasses.dataclass(frozen=True)
class ProblemColumns:
    """Names of a problem's fields; `a.b` is the field b of the object in a.

    Attributes:
      prompt: the question as text, or a chat as a list of {"role", "content"}.
      answer: the reference answer.
      id: names the problem; may be missing, must not repeat.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    id: str = "id"


@dataclasses.dataclass(frozen=True)
class ProblemRecord:
    """One problem.

    Attributes:
      id: names it; its place in the source where no field does.
      prompt: the question; of a chat, the last turn's text.
      answer: the reference.
      file: where it was read.
      line: its number there, from 1.
      chat: the turns, where the prompt is a chat.
    """

    id: str
    prompt: str
    answer: str
    file: str
    line: int
    chat: tuple[Turn, ...] = ()


def read_problems(
    sources: Sequence[str], columns: ProblemColumns, rejects: Rejects
) -> list[ProblemRecord]:
    """Reads the good problems of all sources in order; bad ones go to `rejects`.

    Raises:
      UserError: a source cannot be read.
    """
    problems: list[ProblemRecord] = []
    places: dict[tuple[str, object], str] = {}
    for source in sources:
        for record in read_records(source, rejects):
            try:
                problem = _problem(record, columns)
                _require_new(places, problem, columns)
            except RejectedRecord as rejected:
                rejects.add(source, record.line, rejected.kind, rejected.message, rejected.field)
            else:
                problems.append(problem)
    return problems


def _problem(record: Record, columns: ProblemColumns) -> ProblemRecord:
    names = (columns.prompt, columns.answer, columns.id)
    fields = {name: value for name in names if (value := _value(record.fields, name)) is not None}
    record = dataclasses.replace(record, fields=_numbers_as_text(fields, columns))
    chat: tuple[Turn, ...] = ()
    if isinstance(turns := record.fields.get(columns.prompt), list):
        chat = read_turns(turns, columns.prompt)
        prompt = chat[-1].content
    else:
        prompt = required_text(record, columns.prompt)
    return ProblemRecord(
        id=required_text(record, columns.id)
        if columns.id in record.fields
        else f"{record.file}:{record.line}",
        prompt=prompt,
        answer=required_text(record, columns.answer),
        file=record.file,
        line=record.line,
        chat=chat,
    )


def _value(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a field, or of a field of an object in a field."""
    if name in fields:
        return fields[name]
    outer, dot, inner = name.partition(".")
    below = fields.get(outer)
    return _value(below, inner) if dot and isinstance(below, Mapping) else None


def _numbers_as_text(fields: Mapping[str, Any], columns: ProblemColumns) -> dict[str, Any]:
    """Answers and ids are often written as JSON numbers."""
    numeric = {
        name: str(value)
        for name, value in fields.items()
        if name != columns.prompt and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {**fields, **numeric}


def _require_new(
    places: dict[tuple[str, object], str], problem: ProblemRecord, columns: ProblemColumns
) -> None:
    """Notes where a problem was found.

    Raises:
      RejectedRecord: `duplicate_id` or `duplicate_problem`.
    """
    place = f"{problem.file}:{problem.line}"
    named, asked = ("id", problem.id), ("problem", problem.chat or problem.prompt)
    if named in places:
        raise RejectedRecord(
            "duplicate_id", f"the id {problem.id!r} names {places[named]} too", columns.id
        )
    if asked in places:
        raise RejectedRecord(
            "duplicate_problem", f"the same problem stands at {places[asked]}", columns.prompt
        )
    places[named] = places[asked] = place
