"""Samples rollouts on any OpenAI-compatible completions server (vLLM, SGLang, ours, others).

    client = RolloutClient(ClientConfig("http://localhost:8000/v1", dialect="vllm"), schema, codec)
    rollouts = client.generate(requests)

It is `RolloutEngine.generate` for models that run elsewhere: the same requests, the same policy,
the same `Rollout`. Joins re-encode, so the server needs to know nothing of threads; its prefix
cache makes them cheap. What servers do not tell is in docs/rollout_clients.md.
"""

import asyncio
import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tw_jax import config_fields
from tw_jax.config_checks import require_at_least
from tw_jax.errors import UserError
from tw_jax.rollout.client_controller import Call, run_rollout
from tw_jax.rollout.client_dialect import (
    DIALECTS,
    Completion,
    DialectName,
    payload,
    read_completion,
)
from tw_jax.rollout.client_http import (
    CallError,
    RefusedError,
    RetryPolicy,
    Server,
    ServerDownError,
)
from tw_jax.rollout.request import Request, check_request
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.sampling_table import check_sampling
from tw_jax.trajectory.schema import Schema

OnFinish = Callable[[int, Rollout], None]

MAX_FAILURES_IN_A_ROW = 3
MAX_LOGIT_BIAS = 300  # entries that OpenAI's API admits


@dataclasses.dataclass(frozen=True)
class ClientConfig:
    """A completions server and how hard to try. `server=URL` is short for `server.url`.

    Attributes:
      url: base URL, usually http://HOST:PORT/v1.
      model: name under which the server lists the model; null takes the only one it lists.
      dialect: what the server is: vllm, sglang, tw_jax, or generic for OpenAI's plain API.
      context_len: prompt and response together never get longer; null asks the server.
      max_number_digits: most tokens of an outline's number; longer ones are no numbers.
      concurrency: most calls in flight; the threads of one rollout are several calls.
      call_timeout_s: of one attempt.
      deadline_s: of all rollouts together; what still runs then ends where it is; null: none.
      api_key_env: environment variable with the key, which is sent to the server; null sends none.
      retry: when a failed call is repeated.
    """

    url: str = dataclasses.field(metadata={config_fields.SHORTHAND: True})
    model: str | None = None
    dialect: DialectName = "generic"
    context_len: int | None = None
    max_number_digits: int = 2
    concurrency: int = 32
    call_timeout_s: float = 600.0
    deadline_s: float | None = None
    api_key_env: str | None = None
    retry: RetryPolicy = RetryPolicy()

    def __post_init__(self) -> None:
        require_at_least(self, context_len=2, max_number_digits=1, concurrency=1)
        if self.call_timeout_s <= 0 or (self.deadline_s is not None and self.deadline_s <= 0):
            raise ValueError("call_timeout_s and deadline_s must be positive")


class Codec(Protocol):
    """Text to ids and back, for servers that speak text."""

    def encode(self, text: str) -> list[int]:
        """Ids of text that a model wrote: its tags are control tokens."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text with every tag kept."""
        ...


class _FailuresInARow:
    """Gives up on a server that fails one rollout after another and answers none."""

    def __init__(self) -> None:
        self._answered, self._count = -1, 0

    def note(self, answered: int, error: CallError) -> None:
        """Counts a failed rollout; `answered` calls have succeeded so far.

        Raises:
          ServerDownError: one too many.
        """
        self._count = self._count + 1 if answered == self._answered else 1
        self._answered = answered
        if self._count >= MAX_FAILURES_IN_A_ROW:
            raise ServerDownError(
                f"{self._count} rollouts failed one after another, at last: {error}"
            ) from error


class RolloutClient:
    """See the module docstring.

    Attributes:
      calls: answers received so far.
      repeated: calls that were repeated.
    """

    def __init__(
        self, config: ClientConfig, schema: Schema, codec: Codec, *, api_key: str | None = None
    ) -> None:
        """Opens no connection yet.

        Args:
          config: the server.
          schema: the language of parallel thought; its join rule must be "reencode".
          codec: of the model that the server runs.
          api_key: sent to the server as a bearer token.

        Raises:
          UserError: the schema needs more than a completions server can do.
        """
        if schema.join_rule != "reencode":
            raise UserError(
                f"schema {schema.name!r} joins by {schema.join_rule!r}, which needs the engine's "
                "own cache; only schemas that re-encode run on other servers"
            )
        self.config, self.schema = config, schema
        self.calls = self.repeated = 0
        self._codec, self._api_key = codec, api_key

    def generate(
        self, requests: Sequence[Request], *, on_finish: OnFinish | None = None
    ) -> list[Rollout]:
        """`generate_async` for callers without an event loop."""
        return asyncio.run(self.generate_async(requests, on_finish=on_finish))

    async def generate_async(
        self, requests: Sequence[Request], *, on_finish: OnFinish | None = None
    ) -> list[Rollout]:
        """Samples one rollout per request.

        A rollout whose request the server refuses, or whose calls fail again and again, does not
        stop the others; all are finished and handed to `on_finish` before the failure is raised.

        Args:
          requests: any number; `config.concurrency` rollouts run at once.
          on_finish: called with (index, rollout) as rollouts finish, in that order.

        Returns:
          Rollouts in the order of the requests.

        Raises:
          UserError: a bad request, a server that refuses everything or is down, or failed rollouts.
        """
        started_s = time.monotonic()
        async with Server(
            self.config.url,
            api_key=self._api_key,
            concurrency=self.config.concurrency,
            call_timeout_s=self.config.call_timeout_s,
            retry=self.config.retry,
        ) as server:
            try:
                return await self._generate(server, requests, on_finish, started_s)
            finally:
                self.calls += server.calls
                self.repeated += server.repeated

    async def _generate(
        self,
        server: Server,
        requests: Sequence[Request],
        on_finish: OnFinish | None,
        started_s: float,
    ) -> list[Rollout]:
        model, context_len = await self._model(server)
        for index, request in enumerate(requests):
            name = f"request {index}"
            check_request(name, request, context_len, "server.context_len")
            check_sampling(name, request.sampling, len(self.schema.classes.tag), MAX_LOGIT_BIAS)
            # Before the first call, so that nothing is half done when the dialect cannot say it.
            self._body(model, request, Call([], 1, None, 0))
        waiting = collections.deque(enumerate(requests))
        rollouts: dict[int, Rollout] = {}
        failed: dict[int, CallError] = {}
        in_a_row = _FailuresInARow()

        async def complete(request: Request, call: Call) -> Completion:
            return await self._complete(server, model, request, call)

        async def work() -> None:
            while waiting:
                index, request = waiting.popleft()
                try:
                    rollout = await run_rollout(
                        request,
                        self.schema,
                        complete,
                        context_len=context_len,
                        max_number_digits=self.config.max_number_digits,
                        deadline_s=self._deadline_s(request, started_s),
                    )
                except CallError as error:
                    failed[index] = error
                    if not isinstance(error, RefusedError):  # a server that refuses is there
                        in_a_row.note(server.calls, error)
                    continue
                rollouts[index] = rollout
                if on_finish is not None:
                    on_finish(index, rollout)

        workers = [
            asyncio.ensure_future(work())
            for _ in range(min(self.config.concurrency, len(requests)))
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if failed:
            first = min(failed)
            raise UserError(
                f"{len(failed)} of {len(requests)} rollouts failed, the others are finished; the "
                f"first is request {first}: {failed[first]}"
            )
        return [rollouts[index] for index in range(len(requests))]

    def _deadline_s(self, request: Request, started_s: float) -> float:
        """When a rollout ends where it is, on the monotonic clock."""
        limits = (request.timeout_s, self.config.deadline_s)
        return started_s + min((s for s in limits if s is not None), default=float("inf"))

    def _body(self, model: str, request: Request, call: Call) -> dict[str, Any]:
        return payload(
            DIALECTS[self.config.dialect],
            model=model,
            context=call.context,
            max_tokens=call.max_tokens,
            stop_id=call.stop_id,
            stop_text=self._stop_text(call),
            sampling=request.sampling,
            seed=call.seed,
        )

    def _stop_text(self, call: Call) -> str:
        return "" if call.stop_id is None else self._codec.decode([call.stop_id])

    async def _complete(
        self, server: Server, model: str, request: Request, call: Call
    ) -> Completion:
        def read(answer: object) -> Completion:
            return read_completion(
                DIALECTS[self.config.dialect],
                answer,
                max_tokens=call.max_tokens,
                stop_id=call.stop_id,
                stop_text=self._stop_text(call),
                eos_id=self.schema.eos_id,
                encode=self._codec.encode,
            )

        return await server.complete(self._body(model, request, call), read)

    async def _model(self, server: Server) -> tuple[str, int]:
        """Name of the model, and how long its contexts may get."""
        name, context_len = self.config.model, self.config.context_len
        if name is not None and context_len is not None:
            return name, context_len
        listed = {str(model["id"]): model for model in await server.models()}
        if name is None:
            if len(listed) != 1:
                raise UserError(
                    f"{server.url} lists {len(listed)} models ({', '.join(sorted(listed))}); "
                    "choose one with server.model=NAME"
                )
            (name,) = listed
        elif name not in listed:
            raise UserError(
                f"server.model={name!r}: {server.url} lists {', '.join(sorted(listed))}"
            )
        if context_len is None:
            context_len = listed[name].get("max_model_len")
            if not isinstance(context_len, int):
                raise UserError(
                    f"{server.url} does not say how long its contexts may get; set "
                    "server.context_len=TOKENS"
                )
        return name, context_len
