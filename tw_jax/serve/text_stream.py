"""Text out of tokens that arrive one by one: whole characters only, and nothing behind a stop."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer


class TextStream:
    """Decodes tokens; bytes of a character that is not complete are held back."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        """Starts a text."""
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)

    def step(self, token: int) -> str:
        """What one more token adds; "" while its character is incomplete."""
        return self._stream.step(self._tokenizer, token) or ""


class StopFinder:
    """Holds back text that may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Looks for any of some stop strings, none of them empty."""
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Takes more text.

        Returns:
          Text that may be shown, and whether a stop string was found right behind it. The text
          must not be fed on then.
        """
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        shown = len(text) - keep
        self._held = text[shown:]
        return text[:shown], False

    def rest(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
