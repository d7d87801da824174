"""Facts about a tokenizer's vocabulary that a schema needs to read structure from token ids."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int8, Int32

from tw_jax.errors import UserError
from tw_jax.trajectory.schema import TokenClasses


@dataclasses.dataclass(frozen=True)
class BoundTags:
    """A schema's tags in a tokenizer, and what else the schema asks of it.

    Attributes:
      ids: ids of the tags, in order.
      by_name: the same by tag.
      eos_id: id of the end-of-text token.
      classes: facts about every id.
    """

    ids: Int32[np.ndarray, "tags"]
    by_name: dict[str, int]
    eos_id: int
    classes: TokenClasses


def bind_tags(tokenizer: Any, tags: Sequence[str]) -> BoundTags:
    """Looks up a schema's tags.

    Raises:
      UserError: a tag is not a single special token of the tokenizer, or there is no end-of-text
        token.
    """
    ids = [tokenizer.convert_tokens_to_ids(tag) for tag in tags]
    unknown = tokenizer.convert_tokens_to_ids(tokenizer.unk_token) if tokenizer.unk_token else None
    missing = [tag for tag, i in zip(tags, ids, strict=True) if i is None or i == unknown]
    if missing:
        raise UserError(
            f"the tokenizer does not hold the control tags {', '.join(missing)}; "
            "`tw-jax import` adds them to tokenizer and model"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token (eos_token)")
    tag_ids = np.asarray(ids, np.int32)
    return BoundTags(
        ids=tag_ids,
        by_name=dict(zip(tags, tag_ids.tolist(), strict=True)),
        eos_id=int(tokenizer.eos_token_id),
        classes=_token_classes(tokenizer, tag_ids),
    )


def forced_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of a piece of forced text."""
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def add_control_tokens(
    tokenizer: Any, tags: Sequence[str]
) -> tuple[Any, dict[int, tuple[int, ...]]]:
    """Adds the control tags that a tokenizer lacks, as special tokens behind its vocabulary.

    Args:
      tokenizer: a Hugging Face tokenizer; it stays as it is.
      tags: the control tags.

    Returns:
      A tokenizer that has them all, and for each id that is new the ids of its tag's word pieces
      (of `/Thread` for `</Thread>`), whose mean is a sensible first embedding: ThreadWeaver's
      choice (released code, `threadweaver_sft`).
    """
    vocabulary = tokenizer.get_vocab()
    missing = [tag for tag in tags if tag not in vocabulary]
    if not missing:
        return tokenizer, {}
    pieces = [
        tuple(tokenizer(tag.strip("<>"), add_special_tokens=False).input_ids) for tag in missing
    ]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": missing}, replace_extra_special_tokens=False
    )
    new_ids = tokenizer.convert_tokens_to_ids(missing)
    return tokenizer, dict(zip(new_ids, pieces, strict=True))


def ids_needed(tokenizer: Any) -> int:
    """Rows that an embedding must have for every id of a tokenizer; ids may leave gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def _token_classes(tokenizer: Any, tag_ids: Int32[np.ndarray, "tags"]) -> TokenClasses:
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
