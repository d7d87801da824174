"""A rollout as people look at it: text instead of ids, threads as a list, counts beside them.

The result is plain JSON, so that reports are rebuilt from files, and is what the terminal view and
the HTML report draw. Its shape:

    style          "sequential", "parallel" or "free"
    prompt         the question as text
    answer         the extracted answer, or null
    correct        true, false, or null where it was not graded
    finish_reason  why the rollout ended
    total_tokens   tokens after the prompt, each once
    critical_path  tokens on the longest chain of dependent tokens
    parts          in text order; every part has "tokens", "critical_tokens" (its share of the
                   critical path) and "starts_at" (critical path tokens before it), and is either
        {"kind": "segment", "text"}  or
        {"kind": "block", "outlines": [{"number", "text"}],
         "threads": [{"number", "text", "tokens", "critical", "closed_by_engine"}]}
                   where "critical" marks the longest thread, and a thread's tokens are those
                   strictly between its tags
    timeline       per unit {"row", "start", "end", "kind", "block", "thread", "tokens"}: the batch
                   row that decoded it and the engine steps of its first and last token
"""

from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32

from tw_jax.evals.metrics import Style
from tw_jax.rollout.rollout import Rollout
from tw_jax.trajectory.metrics import total_tokens
from tw_jax.trajectory.trajectory import ParallelBlock, Trajectory

MAX_CHARACTERS = 4000


class TextDecoder(Protocol):
    """The part of a Hugging Face tokenizer that turns ids into text."""

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-text token."""
        ...

    @property
    def bos_token(self) -> str | None:
        """Text of the token that opens a text."""
        ...

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """Text of the ids."""
        ...


def decode_text(tokenizer: TextDecoder, tokens: Int32[np.ndarray, "n"]) -> str:
    """Text of the ids with every tag kept, without a final end-of-text token."""
    if len(tokens) and int(tokens[-1]) == tokenizer.eos_token_id:
        tokens = tokens[:-1]
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def printable(text: str) -> str:
    """Text that can steer neither terminal nor page; line breaks stay.

    Control, direction and other invisible characters are written as escapes.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def sample_from_rollout(
    rollout: Rollout,
    tokenizer: TextDecoder,
    *,
    style: Style,
    answer: str | None = None,
    correct: bool | None = None,
    max_characters: int = MAX_CHARACTERS,
) -> dict[str, Any]:
    """Describes one rollout for people; see the top of the file for the result's shape.

    Args:
      rollout: what the engine returned.
      tokenizer: the one that encoded the prompt.
      style: the style that was forced; "free" where the model chose.
      answer: the extracted answer.
      correct: whether it is right; None where nobody graded it.
      max_characters: of any one piece of text; the middle of longer ones is left out, with a note.
    """
    sample = sample_from_trajectory(
        rollout.trajectory,
        tokenizer,
        critical_path=rollout.critical_path,
        style=style,
        answer=answer,
        max_characters=max_characters,
    )
    return sample | {
        "correct": correct,
        "finish_reason": rollout.finish_reason,
        "total_tokens": rollout.total_tokens,
        "timeline": [
            {
                "row": unit.row,
                "start": unit.start_step,
                "end": unit.end_step,
                "kind": unit.kind,
                "block": unit.block,
                "thread": unit.thread,
                "tokens": len(unit.completion),
            }
            for unit in rollout.units
        ],
    }


def sample_from_trajectory(
    trajectory: Trajectory,
    tokenizer: TextDecoder,
    *,
    critical_path: int,
    style: Style = "free",
    answer: str | None = None,
    max_characters: int = MAX_CHARACTERS,
) -> dict[str, Any]:
    """Describes a trajectory that nobody sampled here; its timeline is empty.

    Args:
      trajectory: a finished one.
      tokenizer: the one that encoded it.
      critical_path: tokens on its longest chain of dependent tokens (`Schema.critical_path`).
      style: see `sample_from_rollout`.
      answer: the reference answer.
      max_characters: see `sample_from_rollout`.
    """

    def text(tokens: Int32[np.ndarray, "n"]) -> str:
        return _clip(decode_text(tokenizer, tokens), max_characters)

    tokens = trajectory.tokens
    parts: list[dict[str, Any]] = []
    position = trajectory.prompt_len
    for block in trajectory.blocks:
        if block.start > position:
            parts.append(_segment(text(tokens[position : block.start]), block.start - position))
        parts.append(_block(block, tokens, text))
        position = block.end
    if position < len(tokens):
        parts.append(_segment(text(tokens[position:]), len(tokens) - position))
    starts_at = 0
    for part in parts:
        part["starts_at"] = starts_at
        starts_at += part["critical_tokens"]
    prompt = text(tokens[: trajectory.prompt_len])
    return {
        "style": style,
        "prompt": prompt.removeprefix(tokenizer.bos_token or ""),
        "answer": answer,
        "correct": None,
        "finish_reason": "eos",
        "total_tokens": total_tokens(trajectory),
        "critical_path": critical_path,
        "parts": parts,
        "timeline": [],
    }


def _segment(text: str, tokens: int) -> dict[str, Any]:
    return {"kind": "segment", "text": text, "tokens": tokens, "critical_tokens": tokens}


def _block(block: ParallelBlock, tokens: Int32[np.ndarray, "len"], text: Any) -> dict[str, Any]:
    inside = [max(0, thread.end - thread.start - 2) for thread in block.threads]
    longest = max(inside, default=0)
    return {
        "kind": "block",
        "tokens": block.end - block.start,
        "critical_tokens": block.end - block.start - sum(inside) + longest,
        "outlines": [
            {"number": o.number, "text": _body(text(tokens[o.start + 1 : o.end - 1]), o.number)}
            for o in block.outlines
        ],
        "threads": [
            {
                "number": thread.number,
                # Without its closing tag; where the engine wrote that, the body ends before it.
                "text": text(tokens[thread.body : min(thread.sampled_end, thread.end - 1)]).strip(),
                "tokens": inside[i],
                "critical": i == inside.index(longest),
                "closed_by_engine": thread.sampled_end < thread.end,
            }
            for i, thread in enumerate(block.threads)
        ],
    }


def _body(text: str, number: str) -> str:
    """An outline's text without the number that the drawing shows anyway."""
    return text.strip().removeprefix(number).lstrip().removeprefix(":").strip()


def _clip(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[{len(text) - 2 * half:,} characters left out]\n{text[-half:]}"
