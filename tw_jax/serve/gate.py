"""What a request must pass before anything reads it: stop, key, rate, size."""

import collections
import hashlib
import hmac
import math
import time
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tw_jax.serve.errors import ApiError
from tw_jax.serve.metrics import Metrics

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models")
MAX_CLIENTS = 10_000  # whose rates are remembered
OUTCOME = "tw_jax_outcome"  # key of the scope under which an endpoint notes another outcome


class RateLimit:
    """A bucket of requests per client, refilled steadily."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Every client starts with a full bucket."""
        self._per_minute, self._clock = per_minute, clock
        # Oldest first; a client that is forgotten starts again with a full bucket.
        self._buckets: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()

    def take(self, client: str) -> int:
        """Takes one request; returns 0, or the whole seconds until there is one."""
        now = self._clock()
        left, before = self._buckets.pop(client, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - before) * self._per_minute / 60)
        allowed = left >= 1
        self._buckets[client] = (left - allowed, now)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return 0 if allowed else max(1, math.ceil((1 - left) * 60 / self._per_minute))


class Gate:
    """ASGI middleware in front of the endpoints under /v1."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        api_keys: Sequence[str],
        rate: RateLimit | None,
        max_bytes: int,
        is_draining: Callable[[], bool],
    ) -> None:
        """Stands in front of `app`; see `ServeConfig` for the limits."""
        self._app, self._metrics = app, metrics
        self._keys = tuple(_digest(key.encode()) for key in api_keys)
        self._rate, self._max_bytes, self._is_draining = rate, max_bytes, is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves or refuses one request, and counts it."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        endpoint = scope["path"] if scope["path"] in ENDPOINTS else "other"
        status = 500

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        start = time.monotonic()
        try:
            try:
                self._admit(scope)
                receive = self._limited(scope, receive)
            except ApiError as error:
                await error.response()(scope, receive, watched_send)
                return
            await self._app(scope, receive, watched_send)
        finally:
            is_refused = 400 <= status < 500 or status == 503
            usual = "completed" if status < 400 else "refused" if is_refused else "failed"
            outcome = scope.get(OUTCOME, usual)
            self._metrics.requests.labels(endpoint, outcome).inc()
            if outcome == "completed":
                self._metrics.latency_s.labels(endpoint).observe(time.monotonic() - start)

    def _admit(self, scope: Scope) -> None:
        if self._is_draining():
            raise ApiError(
                503,
                "the server is stopping; try another one, or again later",
                type="server_error",
                code="draining",
                retry_after_s=10,
            )
        headers = dict(scope["headers"])
        # Without keys, behind one proxy all clients are one.
        client = scope["client"][0] if scope["client"] else ""
        if self._keys:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            digest = _digest(key.strip())
            # All are compared, so that time tells nothing.
            matches = [hmac.compare_digest(digest, known) for known in self._keys]
            if scheme.lower() != b"bearer" or not any(matches):
                raise ApiError(
                    401,
                    "no valid API key: send the header `Authorization: Bearer KEY`",
                    type="authentication_error",
                    code="invalid_api_key",
                )
            client = digest.hex()
        if self._rate is not None and (wait_s := self._rate.take(client)):
            raise ApiError(
                429,
                f"too many requests; try again in {wait_s} s",
                type="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Lets at most `max_bytes` of the body through."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large()
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._max_bytes} bytes; send less, or raise "
            "max_request_bytes of the server",
            code="request_too_large",
        )


def _digest(key: bytes) -> bytes:
    """Of one length whatever the key, and no key stays in memory."""
    return hashlib.sha256(key).digest()
