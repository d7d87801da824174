"""Text to token ids, so that only a response's own control tags become control tokens.

What a user or a data set wrote is data: a literal `<Parallel>` in a question is encoded as the
characters it is made of, in training, rollout, server and evaluation alike, because all of them
encode prompts here.

Hugging Face's `split_special_tokens=True` is not used for this. It leaves added tokens that are
not flagged special (Qwen3's `<think>`) whole, and it flips a switch inside the tokenizer, so that
one thread encoding a prompt could break the tags of a response that another thread is encoding.
"""

import functools
import re
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from tw_jax.errors import UserError
from tw_jax.trajectory.schemas import all_tags

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer

_RESPONSE_TAGS = all_tags() | {"<think>", "</think>"}


def encode_prompt(tokenizer: "Tokenizer", text: str) -> Int32[np.ndarray, "prompt"]:
    """Encodes a prompt that a user or a data set wrote.

    Returns:
      The tokens that the tokenizer's own post-processor puts in front of a text (`<bos>` where it
      has one), then the text without any control token.

    Raises:
      UserError: see `encode_user_text`.
    """
    return np.concatenate([_leading_ids(tokenizer), encode_user_text(tokenizer, text)])


def encode_user_text(tokenizer: "Tokenizer", text: str) -> Int32[np.ndarray, "text"]:
    """Encodes text that no control token may come from; adds nothing around it.

    Raises:
      UserError: the text is not valid Unicode, or the tokenizer's plain vocabulary holds pieces
        that are control tokens too, so that the text cannot be encoded safely.
    """
    ids = _encode(tokenizer, text)
    added = tokenizer.added_tokens_decoder
    if any(i in added for i in ids):
        ids = _encode_as_characters(tokenizer, text)
        # A character outside the vocabulary is the unknown token, which controls nothing.
        control = {i for i in ids if i in added and i != tokenizer.unk_token_id}
        if control:
            raise UserError(
                f"the tokenizer turns user text into its control tokens {sorted(control)}; use one "
                "whose control tokens are added tokens apart from the vocabulary of plain text"
            )
    return np.asarray(ids, np.int32)


def encode_response(
    tokenizer: "Tokenizer", text: str, eos_id: int
) -> Int32[np.ndarray, "response"]:
    """Encodes a response and appends the end-of-text token.

    The tags of the schemas and of thinking become control tokens. No other control token may stand
    in a response: where the text spells one out (`<eos>`, `<|im_start|>`, `<tool_call>`), it stays
    plain.

    Args:
      tokenizer: holds the schema's tags as added tokens.
      text: the response without end-of-text token.
      eos_id: the end-of-text token.

    Raises:
      UserError: the text is not valid Unicode.
    """
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    spelled = sorted((name for name in added - _RESPONSE_TAGS if name in text), key=len)
    ids: list[int] = []
    # The parentheses make `split` return the separators as well, at the odd places.
    pattern = f"({'|'.join(map(re.escape, reversed(spelled)))})"
    for place, piece in enumerate(re.split(pattern, text) if spelled else [text]):
        encode = _encode_as_characters if place % 2 else _encode
        ids += encode(tokenizer, piece)
    return np.asarray([*ids, eos_id], np.int32)


def unknown_characters(tokenizer: "Tokenizer", text: str) -> list[str]:
    """The characters of a text that become the unknown token, in order of appearance."""
    unknown = tokenizer.unk_token_id
    return [c for c in dict.fromkeys(text) if unknown in _encode_as_characters(tokenizer, c)]


def _encode(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Encodes text, added tokens included."""
    _require_unicode(text)
    # Said outright: a tokenizer's own configuration may set another default.
    return tokenizer(
        text, add_special_tokens=False, split_special_tokens=False, verbose=False
    ).input_ids


def _encode_as_characters(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Encodes text with the tokenizer's plain vocabulary only, as if no token had been added.

    Runs the steps of the Rust pipeline one by one, leaving out the search for added tokens.
    """
    _require_unicode(text)
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]


def _require_unicode(text: str) -> None:
    """Raises UserError for text with lone surrogates, which JSON can smuggle in."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not valid Unicode: lone surrogate at character {error.start}; remove it"
        ) from None


@functools.lru_cache(maxsize=16)
def _leading_ids(tokenizer: "Tokenizer") -> Int32[np.ndarray, "leading"]:
    """Special tokens that the post-processor puts in front of a text."""
    encoded = tokenizer("0", add_special_tokens=True, return_special_tokens_mask=True)
    is_text = [not special for special in encoded.special_tokens_mask]
    return np.asarray(encoded.input_ids[: is_text.index(True)], np.int32)
