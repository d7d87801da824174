"""Control tags in text that must hold none."""

import re
from collections.abc import Collection
from typing import Any

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

# The notation of most published chat formats, whichever model will read the text.
_CHAT_TOKEN = re.compile(r"<\|[^\s<>|]{1,40}\|>")


def control_tags(tokenizer: Any, schema_tags: Collection[str]) -> frozenset[str]:
    """Everything that some tokenizer of this pipeline could read as one control token."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values())
    return frozenset((*schema_tags, *filter(str.strip, added), THINK_OPEN, THINK_CLOSE))


def find_control_tag(text: str, tags: Collection[str]) -> str | None:
    """The first control tag that a text spells out; None if there is none.

    Mathematics such as `a<b` or `<x>` is no tag.
    """
    found = [(place, tag) for tag in tags if (place := text.find(tag)) >= 0]
    if match := _CHAT_TOKEN.search(text):
        found.append((match.start(), match.group()))
    return min(found)[1] if found else None
