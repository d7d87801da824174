"""Prompts of completions and chats as token ids.

What a client sends as text is text: it never becomes a control token, whatever it spells. A chat
template writes control tokens of its own between the messages. It gets the messages with every
control token that they spell hidden behind a random word; what is a control token in the rendered
text is therefore the template's. Text between two of those is encoded in one piece, so that a chat
without such spellings has exactly the ids that `apply_chat_template` gives.
"""

import re
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from jaxtyping import Int32

from tw_jax.data.text import encode_prompt, encode_user_text, unknown_characters
from tw_jax.errors import UserError
from tw_jax.serve.bodies import Message
from tw_jax.serve.errors import ApiError

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer

Ids = Int32[np.ndarray, "prompt"]


def completion_prompts(tokenizer: "Tokenizer", prompt: str | list) -> list[Ids]:
    """The prompts of a completion: text, token ids, or a list of either.

    Raises:
      ApiError: one is empty or cannot be encoded.
    """
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return [np.asarray(prompt, np.int32)]
    several = prompt if isinstance(prompt, list) else [prompt]
    if not several:
        raise ApiError(400, "prompt: the list is empty", param="prompt", code="invalid_value")
    return [
        _encoded(tokenizer, one, "prompt") if isinstance(one, str) else np.asarray(one, np.int32)
        for one in several
    ]


def chat_prompt(tokenizer: "Tokenizer", messages: Sequence[Message]) -> Ids:
    """The prompt of a chat, up to where the assistant begins to write.

    Without a chat template, the messages' texts stand one after another, one line break between
    them: a single message is the prompt that `tw-jax generate` makes of its text.

    Raises:
      ApiError: the template refuses the messages, or a text cannot be encoded.
    """
    if tokenizer.chat_template is None:
        return _encoded(tokenizer, "\n".join(message.text for message in messages), "messages")
    control = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len)
    pattern = re.compile("|".join(map(re.escape, reversed(control))) or r"\b\B")
    word = secrets.token_hex(16)
    hidden: list[str] = []

    def hide(match: re.Match) -> str:
        hidden.append(match[0])
        return f"{word}{len(hidden) - 1}."

    turns = [
        {"role": message.role, "content": pattern.sub(hide, message.text)} for message in messages
    ]
    rendered = _render(tokenizer, turns)

    def plain(text: str) -> Ids:
        text = re.sub(word + r"(\d+)\.", lambda match: hidden[int(match[1])], text)
        return _user_text(tokenizer, text, "messages") if text else np.zeros(0, np.int32)

    pieces, position = [], 0
    for match in pattern.finditer(rendered):
        pieces += [plain(rendered[position : match.start()]), [_id_of(tokenizer, match[0])]]
        position = match.end()
    pieces.append(plain(rendered[position:]))
    return np.concatenate(pieces).astype(np.int32)


def _render(tokenizer: "Tokenizer", turns: list[dict[str, str]]) -> str:
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:  # the template's own complaint about the turns
        raise ApiError(
            400,
            f"messages: the model's chat template refuses them: {error}",
            param="messages",
            code="invalid_value",
        ) from error
    return str(text)


def _id_of(tokenizer: "Tokenizer", token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))  # pyright: ignore[reportArgumentType]


def _encoded(tokenizer: "Tokenizer", text: str, param: str) -> Ids:
    """A whole prompt of text."""
    return _checked(tokenizer, encode_prompt, text, param)


def _user_text(tokenizer: "Tokenizer", text: str, param: str) -> Ids:
    return _checked(tokenizer, encode_user_text, text, param)


def _checked(
    tokenizer: "Tokenizer", encode: Callable[["Tokenizer", str], Ids], text: str, param: str
) -> Ids:
    try:
        ids = encode(tokenizer, text)
    except UserError as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="invalid_value") from error
    # The model has never seen the unknown token in place of a character: better say so.
    if tokenizer.unk_token_id is not None and (ids == tokenizer.unk_token_id).any():
        unknown = "".join(unknown_characters(tokenizer, text))[:20]
        raise ApiError(
            400,
            f"{param}: the model's tokenizer does not know {unknown!r}",
            param=param,
            code="invalid_value",
        )
    return ids
