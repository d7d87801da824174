"""Prompts of completions and chats as token ids.

What a client sends as text is text: it never becomes a control token, whatever it spells
(`tw_jax.data.text`, `tw_jax.data.chat`).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from tw_jax.data.chat import Turn, encode_chat
from tw_jax.data.text import encode_prompt, unknown_characters
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
    turns = [Turn(message.role, message.text) for message in messages]
    text = "".join(turn.content for turn in turns)
    return _checked(tokenizer, lambda: encode_chat(tokenizer, turns), text, "messages")


def _encoded(tokenizer: "Tokenizer", text: str, param: str) -> Ids:
    """A whole prompt of text."""
    return _checked(tokenizer, lambda: encode_prompt(tokenizer, text), text, param)


def _checked(tokenizer: "Tokenizer", encode: Callable[[], Ids], text: str, param: str) -> Ids:
    """What `encode` makes of a text, every character of it known."""
    try:
        ids = encode()
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
