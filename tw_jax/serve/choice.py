"""One answer as it grows: from the engine's texts to pieces that clients get."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from tw_jax.rollout.live_text import LiveText, finished_text
from tw_jax.rollout.rollout import FinishReason, Rollout
from tw_jax.serve.text_stream import StopFinder, TextStream
from tw_jax.serve.thread_events import ThreadEvent, ThreadWatcher
from tw_jax.trajectory.schema import Schema

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer

# Everything but an end of the model's own is a limit that was reached.
_STOP: tuple[FinishReason, ...] = ("eos",)


@dataclasses.dataclass(frozen=True)
class TokenPiece:
    """One token of the joined text.

    Attributes:
      id: token id.
      logprob: natural-log probability; 0 for tokens that were given, not drawn.
      offset: characters of the text before it.
    """

    id: int
    logprob: float
    offset: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """What an answer has gained.

    Attributes:
      text: more of the joined text.
      tokens: more of its tokens. Text may be held back, so the two need not match piece by piece;
        put together, they do.
      threads: news of the threads.
      finish_reason: why the answer ended, as OpenAI says it; None while it goes on.
    """

    text: str
    tokens: tuple[TokenPiece, ...]
    threads: tuple[ThreadEvent, ...]
    finish_reason: Literal["stop", "length"] | None

    @property
    def is_empty(self) -> bool:
        """Nothing worth sending."""
        return not (self.text or self.tokens or self.threads or self.finish_reason)


class Choice:
    """One answer: what has been seen of it, and why it ended."""

    def __init__(
        self, tokenizer: "Tokenizer", schema: Schema, stops: Sequence[str], watch_threads: bool
    ) -> None:
        """Starts an answer with no tokens.

        Args:
          tokenizer: decodes.
          schema: tells a thread's parts.
          stops: the joined text ends before the first of them.
          watch_threads: whether pieces bring news of threads.
        """
        self._eos_id = schema.eos_id
        self._stream = TextStream(tokenizer)
        self._stops = StopFinder(stops)
        self._watcher = ThreadWatcher(tokenizer, schema) if watch_threads else None
        self._characters = 0
        self.token_count = 0
        self.ended = False
        self.hit_stop = False
        self.rollout: Rollout | None = None

    def look(self, text: LiveText) -> Piece:
        """What a running request has gained since the last look."""
        return self._gain(text, None)

    def finish(self, rollout: Rollout) -> Piece:
        """What the finished request has gained since the last look."""
        self.rollout = rollout
        return self._gain(finished_text(rollout), rollout)

    def _gain(self, text: LiveText, rollout: Rollout | None) -> Piece:
        if self.ended:
            return Piece("", (), (), None)
        shown, tokens = [], []
        start = text.prompt_len + self.token_count
        new = zip(text.tokens[start:].tolist(), text.logprobs[start:].tolist(), strict=True)
        for token, logprob in new:
            tokens.append(TokenPiece(token, logprob, self._characters))
            piece = "" if token == self._eos_id else self._stream.step(token)
            self._characters += len(piece)
            ready, self.hit_stop = self._stops.feed(piece)
            shown.append(ready)
            if self.hit_stop:
                break
        self.token_count += len(tokens)
        reason = None
        if self.hit_stop:
            reason = "stop"
        elif rollout is not None:
            shown.append(self._stops.rest())
            reason = "stop" if rollout.finish_reason in _STOP else "length"
        self.ended = reason is not None
        threads = self._watcher.events(text, self.ended) if self._watcher else ()
        return Piece("".join(shown), tuple(tokens), threads, reason)
