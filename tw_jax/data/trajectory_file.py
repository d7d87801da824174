r"""Trajectory files: JSON lines, one trajectory per line.

    {"prompt": "313*192=", "response": "<Parallel>\n...#380190", "answer": "380190", "id": "7"}

`prompt` and `response` are text; `answer` and `id` may be missing; other fields are ignored. The
end-of-text token is not written. Kinds of rejects: `invalid_utf8`, `malformed_json`,
`not_an_object`, `missing_field`, `wrong_type`, `empty_field`, `invalid_unicode`, and those of the
schema's parser.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import uuid
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tw_jax.data.rejects import Rejects
from tw_jax.data.text import encode_prompt, encode_response, unknown_characters
from tw_jax.errors import UserError
from tw_jax.tasks.task import Split, Task, choose_style
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import Trajectory

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer

_logger = logging.getLogger(__name__)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CONTEXT_TOKENS = 8
_SHOWN_PROBLEMS = 3


@dataclasses.dataclass(frozen=True)
class TrajectoryRecord:
    """One line of a trajectory file.

    Attributes:
      prompt: text in which control tags are plain characters.
      response: text in which control tags are control tokens; no end-of-text token.
      answer: the reference answer, where there is one.
      id: names the trajectory, where something does.
    """

    prompt: str
    response: str
    answer: str | None = None
    id: str | int | None = None


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


class _Rejected(Exception):
    """Internal: a line that is not a good trajectory; never escapes the reader."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message


def read_trajectories(
    path: str | pathlib.Path, schema: Schema, tokenizer: "Tokenizer", rejects: Rejects
) -> Iterator[LoadedTrajectory]:
    """Yields the good trajectories of a file; bad ones go to `rejects`. Logs one summary line.

    Args:
      path: JSON lines; blank lines are skipped.
      schema: the language the responses are written in.
      tokenizer: the one the schema is bound to.
      rejects: collects the bad lines; files may share it.

    Raises:
      UserError: the file cannot be read, or holds no good trajectory.
    """
    good, bad = 0, collections.Counter[str]()
    first_problems: list[str] = []
    for number, line in _lines(path):
        try:
            record = _record(line)
            trajectory = _trajectory(record, schema, tokenizer)
        except _Rejected as rejected:
            rejects.add(path, number, rejected.kind, rejected.message)
            bad[rejected.kind] += 1
            if len(first_problems) < _SHOWN_PROBLEMS:
                first_problems.append(f"line {number}: {rejected.kind}: {rejected.message}")
        else:
            good += 1
            yield LoadedTrajectory(record, number, trajectory)
    summary = rejects.summary(bad)
    if not good and bad:
        problems = "; ".join(first_problems)
        raise UserError(f"{path} holds no good trajectory: {summary}. First: {problems}")
    if not good:
        raise UserError(f"{path} holds no trajectory; expected one JSON object per line")
    level = logging.WARNING if bad else logging.INFO
    _logger.log(level, "%s: %d trajectories read, %s", path, good, summary)


def write_trajectories(path: str | pathlib.Path, items: Iterable[TrajectoryRecord]) -> int:
    """Writes a trajectory file; the file appears whole or not at all.

    Args:
      path: is replaced if it exists; missing folders are made.
      items: the lines, written as they are produced.

    Returns:
      Number of lines.

    Raises:
      UserError: the file cannot be written.
    """
    path, count = pathlib.Path(path), 0
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as out:
            for item in items:
                fields = {k: v for k, v in dataclasses.asdict(item).items() if v is not None}
                out.write(json.dumps(fields) + "\n")
                count += 1
            out.flush()
            os.fsync(out.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write the trajectory file {path}: {error.strerror}; choose another path"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return count


def export_task(
    task: Task, split: Split, count: int, seed: int, style_mix: float, path: str | pathlib.Path
) -> int:
    """Writes problems of a task, solved, as a trajectory file.

    Args:
      task: makes the problems.
      split: training or held-out ones.
      count: number of problems, from index 0.
      seed: of the problems and of the choice of styles.
      style_mix: share of the problems that are solved in parallel, 0 to 1.
      path: the file.

    Returns:
      Number of lines.

    Raises:
      UserError: `style_mix` is no share, or the file cannot be written.
    """
    if not 0 <= style_mix <= 1:
        raise UserError(f"style_mix is the share of parallel solutions, 0 to 1; got {style_mix}")

    def solved() -> Iterator[TrajectoryRecord]:
        for index in range(count):
            problem = task.problem(split, index, seed)
            style = choose_style(split, index, seed, style_mix)
            yield TrajectoryRecord(
                prompt=problem.prompt,
                response=problem.response(style),
                answer=problem.answer,
                id=f"{task.name}/{split}/{seed}/{index}/{style}",
            )

    return write_trajectories(path, solved())


def _lines(path: str | pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that are not blank with their numbers, from 1."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(
            f"cannot read the trajectory file {path}: {error.strerror}; check the path"
        ) from error


def _record(line: bytes) -> TrajectoryRecord:
    """Reads one line's fields."""
    try:
        fields: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Rejected("invalid_utf8", f"byte {error.start} of the line is not UTF-8") from None
    except (ValueError, RecursionError) as error:  # RecursionError: absurdly deep nesting
        raise _Rejected("malformed_json", str(error)) from None
    if not isinstance(fields, dict):
        raise _Rejected("not_an_object", f"expected a JSON object, found a {type(fields).__name__}")
    for name in ("prompt", "response"):
        if name not in fields:
            raise _Rejected("missing_field", f"the field {name!r} is missing")
        if fields[name] == "":
            raise _Rejected("empty_field", f"the field {name!r} is empty")
    identity = fields.get("id")
    return TrajectoryRecord(
        prompt=_text_field(fields, "prompt"),
        response=_text_field(fields, "response"),
        answer=None if fields.get("answer") is None else _text_field(fields, "answer"),
        id=identity if identity is None or isinstance(identity, int) else _text_field(fields, "id"),
    )


def _text_field(fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise _Rejected(
            "wrong_type", f"the field {name!r} must be text, found a {type(value).__name__}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON's \u escapes can spell half a character
        raise _Rejected(
            "invalid_unicode",
            f"the field {name!r} holds a lone surrogate at character {error.start}",
        ) from None
    return value


def _trajectory(record: TrajectoryRecord, schema: Schema, tokenizer: "Tokenizer") -> Trajectory:
    """Encodes and parses one record."""
    prompt = encode_prompt(tokenizer, record.prompt)
    response = encode_response(tokenizer, record.response, schema.eos_id)
    for name, ids in (("prompt", prompt), ("response", response)):
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            characters = unknown_characters(tokenizer, getattr(record, name))
            raise _Rejected(
                "unknown_characters",
                f"the tokenizer knows no token for {', '.join(map(repr, characters))} "
                f"in the field {name!r}; take one that does, or leave the line out",
            )
    tokens = np.concatenate([prompt, response])
    parsed = schema.parse(tokens, len(prompt))
    if isinstance(parsed, Trajectory):
        return parsed
    first, others = parsed[0], len(parsed) - 1
    around = tokens[max(len(prompt), first.index - _CONTEXT_TOKENS) : first.index + _CONTEXT_TOKENS]
    more = f" (errors in the line besides: {others})" if others else ""
    raise _Rejected(
        first.kind, f"{first.message}, near {tokenizer.decode(around)!r} in the response{more}"
    )
