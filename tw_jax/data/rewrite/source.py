"""Records into sequential traces; what cannot be rewritten is rejected before anything is spent."""

import dataclasses
import re
from collections.abc import Collection, Iterator

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
    text_field,
)
from tw_jax.data.rejects import Rejects
from tw_jax.data.rewrite.config import RewriteColumns, RewriteConfig
from tw_jax.data.rewrite.control_text import THINK_CLOSE, THINK_OPEN, find_control_tag
from tw_jax.data.rewrite.validation import Validator
from tw_jax.data.trajectory_file import TrajectoryRecord

_OPENING = re.compile(rf"\s*{THINK_OPEN}\n*")
_CLOSING = re.compile(rf"\n*{THINK_CLOSE}\n*")


@dataclasses.dataclass(frozen=True)
class SourceTrace:
    """A sequential trace.

    Attributes:
      file: the source.
      line: number of its record in the source.
      id: unique in the run.
      prompt: the problem, as it is shown; of a chat, the texts of its turns.
      chat: the turns, where the prompt is a chat.
      opening: what stands before the reasoning, `<think>` and line breaks or nothing.
      reasoning: what is rewritten.
      closing: what stands behind it: `</think>`, the final text; may be empty.
      answer: the reference answer.
    """

    file: str
    line: int
    id: str | int
    prompt: str
    opening: str
    reasoning: str
    closing: str
    answer: str | None
    chat: tuple[Turn, ...] = ()

    @property
    def lines(self) -> list[str]:
        """Lines of the reasoning; line n of the LLM is number n - 1 here."""
        return self.reasoning.split("\n")

    def with_reasoning(self, reasoning: str) -> TrajectoryRecord:
        """The trajectory with another reasoning in its place."""
        response = f"{self.opening}{reasoning}{self.closing}"
        prompt = self.chat[-1].content if self.chat else self.prompt
        return TrajectoryRecord(prompt, response, self.answer, self.id, self.chat)


def read_traces(
    config: RewriteConfig, validator: Validator, rejects: Rejects
) -> Iterator[SourceTrace]:
    """Yields the good traces of all sources in order.

    Kinds of rejects besides those of `read_records` and `text_field`: `duplicate_id`, `too_long`,
    `tag_in_text`, `unknown_characters`.

    Args:
      config: what to read.
      validator: knows the tokenizer.
      rejects: collects the bad records.

    Raises:
      UserError: the source cannot be read.
    """
    ids = UniqueIds()
    records = (record for source in config.inputs for record in read_records(source, rejects))
    for record in records:
        try:
            trace = _trace(record, config)
            ids.require_new(trace.id, config.columns.id)
            _check(trace, config, validator)
        except RejectedRecord as rejected:
            rejects.add(record.file, record.line, rejected.kind, str(rejected), rejected.field)
        else:
            ids.note(trace.id, f"{trace.file}:{trace.line}")
            yield trace


def _trace(record: Record, config: RewriteConfig) -> SourceTrace:
    columns = config.columns
    chat: tuple[Turn, ...] = ()
    if isinstance(turns := record.value(columns.prompt), list):
        chat = read_turns(turns, columns.prompt)
        prompt = "\n\n".join(turn.content for turn in chat)
        if not prompt.strip():
            raise RejectedRecord("empty_field", "the turns hold no text", columns.prompt)
    else:
        prompt = required_text(record, columns.prompt)
    read_answer = required_answer if config.answer_required else answer_field
    opening, reasoning, closing = _parts(record, columns, config.think_tags)
    return SourceTrace(
        file=record.file,
        line=record.line,
        id=id_field(record, columns.id) or f"{record.file}:{record.line}",
        prompt=prompt,
        opening=opening,
        reasoning=reasoning,
        closing=closing,
        answer=read_answer(record, columns.answer),
        chat=chat,
    )


def _parts(record: Record, columns: RewriteColumns, think_tags: bool) -> tuple[str, str, str]:
    """What stands before the reasoning, the reasoning, and what stands behind it."""
    reasoning = text_field(record, columns.reasoning)
    if reasoning is not None:
        final = text_field(record, columns.final, empty_ok=True)
        if not final:
            return "", reasoning, ""
        if think_tags:
            return f"{THINK_OPEN}\n", reasoning, f"\n{THINK_CLOSE}\n\n{final}"
        return "", reasoning, f"\n\n{final}"
    if record.value(columns.response) is None:
        raise RejectedRecord(
            "missing_field",
            f"neither the field {columns.reasoning!r} nor {columns.response!r} is there",
            columns.reasoning,
        )
    response = required_text(record, columns.response)
    start = match.end() if (match := _OPENING.match(response)) else 0
    close = _CLOSING.search(response, start)
    end = close.start() if close else len(response)
    if not response[start:end].strip():
        raise RejectedRecord(
            "empty_field", f"the field {columns.response!r} holds no reasoning", columns.response
        )
    return response[:start], response[start:end], response[end:]


def _check(trace: SourceTrace, config: RewriteConfig, validator: Validator) -> None:
    size = len(trace.prompt) + len(trace.reasoning) + len(trace.closing)
    if size > config.limits.max_trace_chars:
        raise RejectedRecord(
            "too_long",
            f"{size} characters; limits.max_trace_chars={config.limits.max_trace_chars}",
        )
    final = _CLOSING.sub("", trace.closing, count=1)
    # The prompt too: the server that reads it could take what it spells out for control tokens.
    for name, text in (
        ("prompt", trace.prompt),
        ("reasoning", trace.reasoning),
        ("final", final),
    ):
        _require_no_tag(name, text, validator.control_tags)
    for name, text in (
        ("prompt", trace.prompt),
        ("response", trace.with_reasoning(trace.reasoning).response),
    ):
        if unknown := validator.unknown_characters(text):
            raise RejectedRecord(
                "unknown_characters",
                f"the tokenizer knows no token for {', '.join(map(repr, unknown[:10]))} in the "
                f"{name}; set tokenizer to one that does",
                name,
            )


def _require_no_tag(name: str, text: str, tags: Collection[str]) -> None:
    if tag := find_control_tag(text, tags):
        raise RejectedRecord(
            "tag_in_text",
            f"the {name} spells out the control tag {tag!r}; it must be plain text",
            name,
        )
