"""Serves one generation request: its jobs, its choices, and the end of both."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from tw_jax.rollout.request import Request
from tw_jax.serve.choice import Choice, Piece
from tw_jax.serve.engine_thread import BusyError, EngineDownError, EngineThread, Job
from tw_jax.serve.errors import ApiError, internal_error
from tw_jax.serve.metrics import Metrics
from tw_jax.trajectory.schema import Schema

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer


class Generation:
    """The rollouts of one request; `close` must be called whatever happens."""

    def __init__(
        self,
        engine: EngineThread,
        metrics: Metrics,
        tokenizer: "Tokenizer",
        schema: Schema,
        requests: Sequence[Request],
        *,
        stops: Sequence[str],
        stream: bool,
    ) -> None:
        """Submits the requests.

        Args:
          engine: runs them.
          metrics: counts their tokens.
          tokenizer: decodes.
          schema: tells a thread's parts.
          requests: one per choice.
          stops: strings that end a choice.
          stream: look at texts while they grow, not only at their ends.

        Raises:
          ApiError: the queue is full, or the engine is down.
        """
        self._engine, self._metrics = engine, metrics
        self._changed = asyncio.Event()
        self._start = time.monotonic()
        self._is_stream, self._has_token = stream, False
        self.choices = [Choice(tokenizer, schema, stops, watch_threads=stream) for _ in requests]
        # A stop string must end the rollout when it is written, so those are watched as well.
        watched = stream or bool(stops)
        self._jobs = [Job(request, watched, self._changed.set) for request in requests]
        try:
            engine.submit(self._jobs)
        except BusyError:
            raise ApiError(
                429,
                "the server's queue is full; try again in a few seconds",
                type="rate_limit_error",
                code="queue_full",
                retry_after_s=2,
            ) from None
        except EngineDownError:
            raise internal_error() from None
        metrics.prompt_tokens.inc(sum(len(request.prompt) for request in requests))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(choice, what it has gained) until all have ended.

        Raises:
          ApiError: the engine has failed.
        """
        while not all(choice.ended for choice in self.choices):
            await self._changed.wait()
            self._changed.clear()
            for index, (job, choice) in enumerate(zip(self._jobs, self.choices, strict=True)):
                piece = self._look(job, choice)
                if piece is not None and not piece.is_empty:
                    yield index, piece

    def close(self) -> None:
        """Ends what still runs: the client has left, or has all it wanted."""
        self._engine.cancel(job for job in self._jobs if not job.ended)
        self._metrics.completion_tokens.inc(sum(choice.token_count for choice in self.choices))

    def _look(self, job: Job, choice: Choice) -> Piece | None:
        if choice.ended:
            return None
        if job.error is not None:
            raise internal_error()
        if job.rollout is not None:
            piece = choice.finish(job.rollout)
        elif job.live is not None:
            text, job.live = job.live, None
            piece = choice.look(text)
            if choice.ended:
                self._engine.cancel([job])
        else:
            return None
        if self._is_stream and not self._has_token and (piece.tokens or piece.threads):
            self._has_token = True
            self._metrics.first_token_s.observe(time.monotonic() - self._start)
        return piece


def joined(pieces: Sequence[Piece]) -> Piece:
    """All that an answer has gained."""
    return Piece(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        threads=tuple(news for piece in pieces for news in piece.threads),
        finish_reason=pieces[-1].finish_reason if pieces else None,
    )
