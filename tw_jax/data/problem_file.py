r"""Problems with reference answers, of any source of records (`tw_jax.data.records`).

    {"prompt": "How many primes are below 10?", "answer": "4", "id": "7"}

The prompt is text or a list of turns; the answer is text, a number or an object, which graders get
as JSON; the id may be missing. Kinds of rejects: those of `read_records`, `text_field` and
`read_turns`, `duplicate_id` and `duplicate_problem`.
"""

import dataclasses
from collections.abc import Sequence

from tw_jax.data.chat import Turn, read_turns
from tw_jax.data.records import (
    Record,
    RejectedRecord,
    UniqueIds,
    answer_field,
    id_field,
    read_records,
    required_answer,
    required_text,
)
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
      answer: the reference; empty where a problem may do without.
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
    sources: Sequence[str],
    columns: ProblemColumns,
    rejects: Rejects,
    *,
    needs_answers: bool = True,
) -> list[ProblemRecord]:
    """Reads the good problems of all sources in order; bad ones go to `rejects`.

    Args:
      sources: what to read.
      columns: names of fields.
      rejects: record of bad problems.
      needs_answers: whether a problem without an answer is a bad one.

    Raises:
      UserError: a source cannot be read.
    """
    problems: list[ProblemRecord] = []
    ids, asked = UniqueIds(), dict[object, str]()
    for source in sources:
        for record in read_records(source, rejects):
            try:
                problem = _problem(record, columns, needs_answers)
                ids.require_new(problem.id, columns.id)
                same = problem.chat or problem.prompt
                if same in asked:
                    raise RejectedRecord(
                        "duplicate_problem",
                        f"the same problem stands at {asked[same]}",
                        columns.prompt,
                    )
            except RejectedRecord as rejected:
                rejects.add(source, record.line, rejected.kind, rejected.message, rejected.field)
            else:
                place = f"{source}:{record.line}"
                ids.note(problem.id, place)
                asked[same] = place
                problems.append(problem)
    return problems


def _problem(record: Record, columns: ProblemColumns, needs_answers: bool) -> ProblemRecord:
    chat: tuple[Turn, ...] = ()
    if isinstance(turns := record.value(columns.prompt), list):
        chat = read_turns(turns, columns.prompt)
        prompt = chat[-1].content
    else:
        prompt = required_text(record, columns.prompt)
    identity = id_field(record, columns.id)
    read_answer = required_answer if needs_answers else answer_field
    return ProblemRecord(
        id=f"{record.file}:{record.line}" if identity is None else str(identity),
        prompt=prompt,
        answer=read_answer(record, columns.answer) or "",
        file=record.file,
        line=record.line,
        chat=chat,
    )
