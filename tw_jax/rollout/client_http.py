"""Calls to a completions server: bounded in number and time, repeated where that may help.

A call that fails for a reason that passes (429, 5xx, a timeout, a broken connection, half an
answer) is repeated after a pause drawn evenly from 0 to a bound that doubles each time ("full
jitter"), and never before the server's `Retry-After`. Any other 4xx is final.
"""

import asyncio
import dataclasses
import datetime
import email.utils
import json
import random
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from tw_jax.errors import UserError
from tw_jax.rollout.client_dialect import AnswerError

T = TypeVar("T")

_PASSING = frozenset({408, 409, 425, 429})
# These concern one request; other refusals concern all of them.
_REQUEST_FAULTS = frozenset({400, 413, 422})
_REMEDIES: Mapping[int, str] = {
    400: "does server.dialect name the kind of server, and server.context_len its limit?",
    401: "name the environment variable that holds the key in server.api_key_env",
    403: "the key that server.api_key_env names may not use this model",
    404: "server.url mostly ends in /v1, and server.model must be a name it lists at /models",
    405: "server.url should be the base URL, without /completions",
    413: "the request is too large for the server; lower sampling.max_response_tokens",
    422: "does server.dialect name the kind of server?",
}

_NO_REMEDY = "see the server's log"


class CallError(UserError):
    """One call failed for good; calls of other rollouts may well succeed."""


class RefusedError(CallError):
    """The server refuses this request as it is (400, 413, 422); asking again changes nothing.

    Attributes:
      reason: status and what the server says of it.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ServerDownError(UserError):
    """Nothing answers at the URL, or it answers nobody any more."""


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """When a failed call is repeated.

    Attributes:
      retries: most repetitions of one call.
      first_pause_s: bound of the pause before the first repetition; it doubles with each.
      max_pause_s: the bound never exceeds this.
    """

    retries: int = 6
    first_pause_s: float = 0.5
    max_pause_s: float = 60.0

    def pause_s(self, repetition: int, retry_after_s: float, rng: random.Random) -> float:
        """Seconds to wait before repetition 0, 1, ..."""
        bound = min(self.max_pause_s, self.first_pause_s * 2.0**repetition)
        return max(retry_after_s, rng.uniform(0.0, bound))


def key_in(environment: Mapping[str, str], api_key_env: str | None) -> str | None:
    """The server's key, out of the environment variable that `server.api_key_env` names, if any.

    Raises:
      UserError: the variable is not set.
    """
    if api_key_env is None:
        return None
    if not (key := environment.get(api_key_env)):
        raise UserError(f"server.api_key_env: the environment variable {api_key_env} is not set")
    return key


class Server:
    """A completions server; use it as `async with`.

    Attributes:
      calls: answers received and understood.
      repeated: calls that were repeated.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        concurrency: int,
        call_timeout_s: float,
        retry: RetryPolicy,
    ) -> None:
        """Opens no connection yet.

        Args:
          url: base URL, `/completions` comes behind it.
          api_key: sent as a bearer token; None sends none.
          concurrency: most calls in flight.
          call_timeout_s: of one attempt.
          retry: when a failed call is repeated.
        """
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.url = url.rstrip("/")
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(call_timeout_s, pool=None),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )
        self._free = asyncio.Semaphore(concurrency)
        self._call_timeout_s, self._retry = call_timeout_s, retry
        self._rng = random.Random()
        self.calls = self.repeated = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def complete(self, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """Asks for one completion.

        Args:
          body: the request.
          read: makes a result of the decoded answer; its `AnswerError` is a passing failure.

        Raises:
          RefusedError: the server refuses this request.
          CallError: its repetitions are used up.
          ServerDownError: no connection can be made.
          UserError: the server refuses all requests.
        """
        return await self._ask("POST", "completions", body, read)

    async def chat(self, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """Asks for one chat completion; arguments and errors as for `complete`."""
        return await self._ask("POST", "chat/completions", body, read)

    async def models(self) -> list[Mapping[str, Any]]:
        """What the server says of its models.

        Raises:
          UserError: as for `complete`.
        """

        def read(answer: Any) -> list[Mapping[str, Any]]:
            listed = answer.get("data") if isinstance(answer, dict) else None
            if not isinstance(listed, list):
                raise AnswerError("the list of models has no data")
            return [model for model in listed if isinstance(model, dict) and "id" in model]

        return await self._ask("GET", "models", None, read)

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], T]
    ) -> T:
        url = f"{self.url}/{path}"
        is_there = True
        for attempt in range(self._retry.retries + 1):
            retry_after_s = 0.0
            try:
                async with self._free:
                    response = await self._client.request(method, url, json=body)
                if response.is_success:
                    result = read(response.json())
                    self.calls += 1
                    return result
                _refuse(url, response)
                problem = f"status {response.status_code}{_reason(response)}"
                retry_after_s = retry_after(response.headers.get("Retry-After"))
            except httpx.TimeoutException:
                problem = f"no answer within server.call_timeout_s={self._call_timeout_s:g}"
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise UserError(
                    f"server.url={self.url!r}: {error}; expected http://HOST:PORT/v1"
                ) from error
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                is_there = not isinstance(error, httpx.ConnectError)
            except (json.JSONDecodeError, UnicodeDecodeError, AnswerError) as error:
                problem = f"the answer is not usable: {error}"
            if attempt < self._retry.retries:
                self.repeated += 1
                await asyncio.sleep(self._retry.pause_s(attempt, retry_after_s, self._rng))
        message = f"{url}: {self._retry.retries + 1} attempts failed, at last with {problem}"
        if not is_there:
            raise ServerDownError(f"{message}. Is the server up, and server.url right?")
        raise CallError(
            f"{message}; raise server.retry.retries or server.call_timeout_s if it is only busy"
        )


def _refuse(url: str, response: httpx.Response) -> None:
    """Raises for a refusal that asking again will not change."""
    status = response.status_code
    if status >= 500 or status in _PASSING:
        return
    reason = f"status {status}{_reason(response)}"
    message = f"{url}: {reason}; {_REMEDIES.get(status, _NO_REMEDY)}"
    if status in _REQUEST_FAULTS:
        raise RefusedError(message, reason)
    raise UserError(message)


def _reason(response: httpx.Response) -> str:
    """What the server says of a failure, on one line."""
    try:
        answer = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        answer = response.text
    for key in ("error", "message", "detail"):
        if isinstance(answer, dict) and key in answer:
            answer = answer[key]
    text = " ".join(str(answer).split())
    return f" ({text:.300})" if text else ""


def retry_after(value: str | None) -> float:
    """Seconds that a `Retry-After` header asks for: a number or a date; 0 for none or nonsense."""
    if value is None:
        return 0.0
    try:
        return min(max(0.0, float(value)), 3600.0)
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if until.tzinfo is None:
        until = until.replace(tzinfo=datetime.UTC)
    return min(max(0.0, (until - datetime.datetime.now(datetime.UTC)).total_seconds()), 3600.0)
