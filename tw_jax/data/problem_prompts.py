"""Problems of sources with their prompts as token ids, ready to be asked."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from tw_jax.data.chat import Turn, encode_chat
from tw_jax.data.problem_file import ProblemColumns, ProblemRecord, read_problems
from tw_jax.data.records import RejectedRecord
from tw_jax.data.rejects import Rejects
from tw_jax.data.text import encode_prompt
from tw_jax.errors import UserError

_EMPTY = "it holds no records"

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer


@dataclasses.dataclass(frozen=True)
class PromptedProblem:
    """A problem, and how it is asked.

    Attributes:
      record: the problem.
      prompt: its token ids.
    """

    record: ProblemRecord
    prompt: Int32[np.ndarray, "prompt"]

    @property
    def reference(self) -> str | None:
        """The reference answer; None where there is none."""
        return self.record.answer or None


def read_prompted_problems(
    sources: Sequence[str],
    columns: ProblemColumns,
    rejects: Rejects,
    tokenizer: "Tokenizer",
    *,
    as_chat: bool,
    context_len: int,
    needs_answers: bool,
    max_reject_share: float,
) -> list[PromptedProblem]:
    """Reads and encodes the good problems of all sources in order; bad ones go to `rejects`.

    Args:
      sources: see `tw_jax.data.records`.
      columns: names of fields.
      rejects: record of bad problems; also those whose prompts cannot be encoded or are too long.
      tokenizer: the model's.
      as_chat: put prompts that are plain text through the tokenizer's chat template.
      context_len: prompts that leave no room in it are rejected.
      needs_answers: whether a problem without an answer is a bad one.
      max_reject_share: more bad problems than this share are refused.

    Raises:
      UserError: a source cannot be read or holds no good problem, or too many are bad.
    """
    records = read_problems(sources, columns, rejects, needs_answers=needs_answers)
    problems = []
    for record in records:
        if as_chat and not record.chat:
            record = dataclasses.replace(record, chat=(Turn("user", record.prompt),))
        try:
            prompt = prompt_ids(record, tokenizer, context_len)
        except RejectedRecord as error:
            rejects.add(record.file, record.line, error.kind, str(error), columns.prompt)
        else:
            problems.append(PromptedProblem(record, prompt))
    _require_problem_of_each(sources, problems, columns, rejects, needs_answers)
    rejects.require_share(len(problems), max_reject_share)
    return problems


def prompt_ids(
    problem: ProblemRecord, tokenizer: "Tokenizer", context_len: int | None
) -> Int32[np.ndarray, "prompt"]:
    """How a problem is asked: a chat through its template, anything else as it is.

    Raises:
      RejectedRecord: `invalid_prompt`: no token ids for this text, or a template that refuses it;
        `prompt_too_long`: it leaves no room in contexts of `context_len` tokens, if that is known.
    """
    try:
        if problem.chat:
            prompt = encode_chat(tokenizer, problem.chat)
        else:
            prompt = encode_prompt(tokenizer, problem.prompt)
    except UserError as error:
        raise RejectedRecord("invalid_prompt", str(error)) from error
    if context_len is not None and len(prompt) >= context_len:
        raise RejectedRecord(
            "prompt_too_long",
            f"a prompt of {len(prompt):,} tokens leaves no room in contexts of {context_len:,}",
        )
    return prompt


def _require_problem_of_each(
    sources: Sequence[str],
    problems: Sequence[PromptedProblem],
    columns: ProblemColumns,
    rejects: Rejects,
    needs_answers: bool,
) -> None:
    """Refuses by name what holds no good problem: a wrong column, a set without answers."""
    usable = {problem.record.file for problem in problems}
    for source in sources:
        if source in usable:
            continue
        fields = [columns.prompt, columns.answer] if needs_answers else [columns.prompt]
        found = "; ".join(rejects.first_of(source)) or _EMPTY
        remedy = ""
        if "prompt_too_long" in found:
            remedy = "; raise engine.context_len"
        elif needs_answers and found != _EMPTY:
            remedy = (
                "; name other fields with columns.*, or grade without answers: "
                "grading.grader=python grading.needs_answers=false"
            )
        raise UserError(
            f"{source}: no usable problem there ({found}); expected records with the fields "
            f"{' and '.join(map(repr, fields))}{remedy}"
        )


def problems_digest(problems: Sequence[PromptedProblem]) -> str:
    """A fingerprint of what is asked and what is expected, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for problem in problems:
        digest.update(problem.prompt.tobytes() + b"\0")
        digest.update((problem.reference or "").encode() + b"\0")
    return digest.hexdigest()
