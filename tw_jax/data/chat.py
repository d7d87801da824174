"""Chats as prompts: turns, the tokenizer's template around them, and chats written as one string.

A chat template writes control tokens of its own between the turns. It gets the turns with every
control token that they spell hidden behind a random word; what is a control token in the rendered
text is therefore the template's. Text between two of those is encoded in one piece, so that a chat
without such spellings has exactly the ids that `apply_chat_template` gives.
"""

import dataclasses
import re
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from jaxtyping import Int32

from tw_jax.data.records import RejectedRecord, check_text
from tw_jax.data.text import encode_prompt, encode_user_text
from tw_jax.errors import UserError

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer

# How Qwen's template frames turns; published training sets hold whole chats in this form.
_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", re.DOTALL)
_ASSISTANT = "<|im_start|>assistant\n"
_TURN_END = "<|im_end|>"
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one side of a chat said.

    Attributes:
      role: "user", "system" or "assistant".
      content: plain text; nothing in it becomes a control token.
    """

    role: str
    content: str


def encode_chat(tokenizer: "Tokenizer", turns: Sequence[Turn]) -> Int32[np.ndarray, "prompt"]:
    """The prompt of a chat, up to where the assistant begins to write.

    Without a chat template, the texts stand one after another, one line break between them: a
    single turn is the prompt that `encode_prompt` makes of its text.

    Raises:
      UserError: the template refuses the turns, or a text cannot be encoded.
    """
    if tokenizer.chat_template is None:
        return encode_prompt(tokenizer, "\n".join(turn.content for turn in turns))
    control = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len)
    pattern = re.compile("|".join(map(re.escape, reversed(control))) or r"\b\B")
    word = secrets.token_hex(16)
    hidden: list[str] = []

    def hide(match: re.Match) -> str:
        hidden.append(match[0])
        return f"{word}{len(hidden) - 1}."

    rendered = _render(
        tokenizer,
        [{"role": turn.role, "content": pattern.sub(hide, turn.content)} for turn in turns],
    )

    def plain(text: str) -> Int32[np.ndarray, "text"]:
        text = re.sub(word + r"(\d+)\.", lambda match: hidden[int(match[1])], text)
        return encode_user_text(tokenizer, text) if text else np.zeros(0, np.int32)

    pieces, position = [], 0
    for match in pattern.finditer(rendered):
        pieces += [plain(rendered[position : match.start()]), [_id_of(tokenizer, match[0])]]
        position = match.end()
    pieces.append(plain(rendered[position:]))
    return np.concatenate(pieces).astype(np.int32)


def read_turns(value: Sequence[Any], field: str) -> tuple[Turn, ...]:
    """The turns in a field that holds a list of `{"role", "content"}`.

    Raises:
      RejectedRecord: `wrong_type`, `chat_role`, `empty_field`, `invalid_unicode`, `nul_byte`.
    """
    turns: list[Turn] = []
    for number, item in enumerate(value):
        role, content = (
            (item.get("role"), item.get("content")) if isinstance(item, dict) else (None, None)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise RejectedRecord(
                "wrong_type",
                f"turn {number} of {field!r} must hold role and content as text",
                field,
            )
        if role not in _ROLES:
            raise RejectedRecord(
                "chat_role",
                f"turn {number} of {field!r} has the role {role!r}; known: {', '.join(_ROLES)}",
                field,
            )
        check_text(content, field)
        turns.append(Turn(role, content))
    if turns and turns[-1].role == "assistant":
        raise RejectedRecord(
            "chat_role", f"the last turn of {field!r} is the assistant's; nothing is asked", field
        )
    if not turns or not turns[-1].content.strip():
        raise RejectedRecord("empty_field", f"the field {field!r} asks nothing", field)
    return tuple(turns)


def read_chat_text(text: str, field: str) -> tuple[tuple[Turn, ...], str]:
    r"""Parts a chat that was written as one string, as `<|im_start|>role\n...<|im_end|>\n`.

    The frame is read as text and built anew by `encode_chat`, so that a question that spells out
    control tokens stays a question.

    Args:
      text: such a chat; its last turn is the assistant's.
      field: for messages.

    Returns:
      The turns before the assistant's last, and the text of that.

    Raises:
      RejectedRecord: `chat_text` (not of this form), and those of `read_turns`.
    """
    turns, place = [], 0
    while not text.startswith(_ASSISTANT, place):
        match = _TURN.match(text, place)
        if match is None:
            raise RejectedRecord(
                "chat_text",
                f"the field {field!r} is no chat of <|im_start|> turns that ends with the "
                f"assistant's: character {place} begins neither",
                field,
            )
        turns.append({"role": match[1], "content": match[2]})
        place = match.end()
    response = text[place + len(_ASSISTANT) :].removesuffix("\n").removesuffix(_TURN_END)
    check_text(response, field)
    if not response.strip():
        raise RejectedRecord("empty_field", f"the answer in {field!r} is empty", field)
    return read_turns(turns, field), response


def _render(tokenizer: "Tokenizer", turns: list[dict[str, str]]) -> str:
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:  # the template's own complaint about the turns
        raise UserError(f"the model's chat template refuses them: {error}") from error
    return str(text)


def _id_of(tokenizer: "Tokenizer", token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))  # pyright: ignore[reportArgumentType]
