r"""Trajectories of a source of records (`tw_jax.data.records`), mostly JSON lines.

    {"prompt": "313*192=", "response": "<Parallel>\n...#380190", "answer": "380190", "id": "7"}

`prompt` and `response` are text, or `prompt` is a list of turns; `answer` and `id` may be missing;
other fields are ignored. The end-of-text token is not written. Kinds of rejects: those of
`read_records`, `text_field` and `read_chat_text`, `duplicate_id`, `unknown_characters`, and those
of the schema's parser.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from tw_jax.data.chat import Turn, encode_chat, read_chat_text, read_turns
from tw_jax.data.columns import DEFAULT_COLUMNS, ColumnsConfig
from tw_jax.data.records import (
    OTHER_FORMATS,
    Record,
    RejectedRecord,
    UniqueIds,
    answer_field,
    id_field,
    read_records,
    required_text,
)
from tw_jax.data.rejects import Rejects
from tw_jax.data.text import encode_prompt, encode_response, unknown_characters
from tw_jax.data.whole_file import whole_file
from tw_jax.errors import UserError
from tw_jax.trajectory.schema import ParseError, Schema
from tw_jax.trajectory.trajectory import Trajectory

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer

_CONTEXT_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class TrajectoryRecord:
    """One line of a trajectory file.

    Attributes:
      prompt: text in which control tags are plain characters.
      response: text in which control tags are control tokens; no end-of-text token.
      answer: the reference answer, where there is one.
      id: names the trajectory, where something does.
      chat: the turns before the response, where the prompt is a chat; `prompt` is then the last
        turn's text.
    """

    prompt: str
    response: str
    answer: str | None = None
    id: str | int | None = None
    chat: tuple[Turn, ...] = ()


@dataclasses.dataclass(frozen=True)
class LoadedTrajectory:
    """A good line of a trajectory file.

    Attributes:
      record: the line's fields.
      line: its number in the file, from 1.
      trajectory: prompt, response and end-of-text token as ids, parsed.
    """

    record: TrajectoryRecord
    line: int
    trajectory: Trajectory


class NoGoodTrajectory(UserError):
    """A source that can be read, but holds nothing that can be used."""


def read_trajectories(
    source: str | pathlib.Path,
    schema: Schema,
    tokenizer: "Tokenizer",
    rejects: Rejects,
    columns: ColumnsConfig = DEFAULT_COLUMNS,
    *,
    strict: bool = False,
) -> Iterator[LoadedTrajectory]:
    """Yields the good trajectories of a source; bad ones go to `rejects`.

    Args:
      source: see `tw_jax.data.records`.
      schema: the language the responses are written in.
      tokenizer: the one the schema is bound to.
      rejects: collects the bad records; sources may share it.
      columns: names of the fields.
      strict: blocks that parse but are not canonical (`Schema.validate`) are bad too.

    Raises:
      NoGoodTrajectory: the source holds none.
      UserError: the source cannot be read.
    """
    good, rejects = 0, rejects.part()
    ids = UniqueIds()
    for record in read_records(str(source), rejects):
        try:
            item = trajectory_record(record, columns)
            ids.require_new(item.id, columns.id)
            trajectory = encode_trajectory(item, schema, tokenizer)
            if strict:
                require_strict(trajectory, schema, tokenizer)
        except RejectedRecord as rejected:
            rejects.add(source, record.line, rejected.kind, rejected.message, rejected.field)
        else:
            good += 1
            ids.note(item.id, f"{source}:{record.line}")
            yield LoadedTrajectory(item, record.line, trajectory)
    if not good and rejects.total:
        problems = "; ".join(rejects.first_of(source))
        raise NoGoodTrajectory(
            f"{source} holds no good trajectory: {rejects.summary()}. First: {problems}"
        )
    if not good:
        raise NoGoodTrajectory(f"{source} holds no trajectory; expected one JSON object per line")


def write_trajectories(path: str | pathlib.Path, items: Iterable[TrajectoryRecord]) -> int:
    """Writes a trajectory file; the file appears whole or not at all.

    Args:
      path: is replaced if it exists; missing folders are made.
      items: the lines, written as they are produced.

    Returns:
      Number of lines.

    Raises:
      UserError: the file cannot be written, or its name says that it is of another format.
    """
    if str(path).lower().endswith(OTHER_FORMATS):
        raise UserError(f"{path}: trajectories are written as JSON lines; name the file .jsonl")
    count = 0
    with whole_file(path) as out:
        for item in items:
            out.write(json.dumps(_fields(item)) + "\n")
            count += 1
    return count


def _fields(item: TrajectoryRecord) -> dict[str, Any]:
    """A trajectory as a JSON object; what it does not have is left out."""
    fields = dataclasses.asdict(item)
    chat = fields.pop("chat")
    return {k: v for k, v in fields.items() if v is not None} | ({"prompt": chat} if chat else {})


def trajectory_record(record: Record, columns: ColumnsConfig) -> TrajectoryRecord:
    """Reads the fields of a record.

    Raises:
      RejectedRecord: a field is missing or holds something else.
    """
    chat: tuple[Turn, ...] = ()
    if record.value(columns.response) is None and record.value(columns.chat_text) is not None:
        chat, response = read_chat_text(required_text(record, columns.chat_text), columns.chat_text)
        prompt = chat[-1].content
    elif isinstance(turns := record.value(columns.prompt), list):
        chat = read_turns(turns, columns.prompt)
        prompt, response = chat[-1].content, required_text(record, columns.response)
    else:
        prompt = required_text(record, columns.prompt)
        response = required_text(record, columns.response)
        chat = (Turn("user", prompt),) if columns.as_chat else ()
    return TrajectoryRecord(
        prompt=prompt,
        response=response,
        answer=answer_field(record, columns.answer),
        id=id_field(record, columns.id),
        chat=chat,
    )


def encode_trajectory(
    record: TrajectoryRecord, schema: Schema, tokenizer: "Tokenizer"
) -> Trajectory:
    """Encodes and parses one record.

    Raises:
      RejectedRecord: a text cannot be encoded, or the response breaks the schema's grammar.
    """
    try:
        if record.chat:
            prompt = encode_chat(tokenizer, record.chat)
        else:
            prompt = encode_prompt(tokenizer, record.prompt)
    except UserError as error:
        raise RejectedRecord("invalid_prompt", str(error), "prompt") from None
    response = encode_response(tokenizer, record.response, schema.eos_id)
    for name, ids in (("prompt", prompt), ("response", response)):
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            characters = unknown_characters(tokenizer, getattr(record, name))
            raise RejectedRecord(
                "unknown_characters",
                f"the tokenizer knows no token for {', '.join(map(repr, characters))} "
                f"in the field {name!r}; take one that does, or leave the line out",
                name,
            )
    tokens = np.concatenate([prompt, response])
    parsed = schema.parse(tokens, len(prompt))
    if isinstance(parsed, Trajectory):
        return parsed
    message = _describe_errors(parsed, tokens, len(prompt), tokenizer)
    raise RejectedRecord(parsed[0].kind, message, "response")


def require_strict(trajectory: Trajectory, schema: Schema, tokenizer: "Tokenizer") -> None:
    """Checks that every block is strictly canonical.

    Raises:
      RejectedRecord: one is not; names the first place.
    """
    if errors := schema.validate(trajectory):
        tokens, prompt_len = trajectory.tokens, trajectory.prompt_len
        message = _describe_errors(errors, tokens, prompt_len, tokenizer)
        raise RejectedRecord(errors[0].kind, message, "response")


def _describe_errors(
    errors: Sequence[ParseError],
    tokens: Int32[np.ndarray, "len"],
    prompt_len: int,
    tokenizer: "Tokenizer",
) -> str:
    """Says what is wrong first, and quotes the response around it."""
    first, others = errors[0], len(errors) - 1
    around = tokens[max(prompt_len, first.index - _CONTEXT_TOKENS) : first.index + _CONTEXT_TOKENS]
    more = f" (errors in the line besides: {others})" if others else ""
    place = f"token {first.index - prompt_len} of the response"
    return f"{first.message}, at {place}, near {tokenizer.decode(around)!r}{more}"
