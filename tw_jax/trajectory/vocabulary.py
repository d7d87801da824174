"""Facts about a tokenizer's vocabulary that a schema needs to read structure from token ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int8, Int32

from tw_jax.errors import UserError
from tw_jax.trajectory.schema import TokenClasses


def control_token_ids(tokenizer: Any, tags: Sequence[str]) -> Int32[np.ndarray, "tags"]:
    """Ids of the control tags.

    Raises:
      UserError: a tag is not a single special token of the tokenizer.
    """
    ids = [tokenizer.convert_tokens_to_ids(tag) for tag in tags]
    unknown = tokenizer.convert_tokens_to_ids(tokenizer.unk_token) if tokenizer.unk_token else None
    missing = [tag for tag, i in zip(tags, ids, strict=True) if i is None or i == unknown]
    if missing:
        raise UserError(
            f"the tokenizer does not hold the control tags {', '.join(missing)}; add them with "
            "tokenizer.add_special_tokens({'extra_special_tokens': [...]}) and resize the model"
        )
    return np.asarray(ids, np.int32)


def token_classes(tokenizer: Any, tag_ids: Int32[np.ndarray, "tags"]) -> TokenClasses:
    """Classifies every id of the vocabulary by the text it decodes to. One pass, O(vocab)."""
    vocab = len(tokenizer)
    pieces = tokenizer.batch_decode(
        [[i] for i in range(vocab)], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    tag: Int8[np.ndarray, "vocab"] = np.full(vocab, -1, np.int8)
    tag[tag_ids] = np.arange(len(tag_ids))
    return TokenClasses(
        digit=np.array(
            [int(p) if len(p) == 1 and p in "0123456789" else -1 for p in pieces], np.int8
        ),
        dot=np.array([p == "." for p in pieces]),
        colon=np.array([p.startswith(":") for p in pieces]),
        space=np.array([p != "" and p.isspace() for p in pieces]),
        line_break=np.array([p == "\n" for p in pieces]),
        line_end=np.array([p.endswith("\n") for p in pieces]),
        space_start=np.array([p.startswith(" ") for p in pieces]),
        tag=tag,
    )
