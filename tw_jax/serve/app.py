"""The HTTP side: endpoints, streams, and errors in OpenAI's words."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tw_jax.rollout.engine import RolloutEngine
from tw_jax.serve import gate
from tw_jax.serve.bodies import ChatBody, CompletionBody, GenerationBody
from tw_jax.serve.config import ServeConfig
from tw_jax.serve.engine_requests import engine_requests
from tw_jax.serve.engine_thread import EngineThread
from tw_jax.serve.errors import ApiError, internal_error, of_validation
from tw_jax.serve.generation import Generation, joined
from tw_jax.serve.metrics import CONTENT_TYPE, Metrics
from tw_jax.serve.prompts import Ids, chat_prompt, completion_prompts
from tw_jax.serve.responses import END_OF_STREAM, Writer, event

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Service:
    """What the endpoints work with.

    Attributes:
      config: settings.
      tokenizer: of the model.
      engine: checks requests; its session belongs to `thread`.
      thread: runs them.
      metrics: counts them.
      api_keys: keys that are let in; empty for everybody.
      is_draining: no new requests are taken. Changes once.
    """

    config: ServeConfig
    tokenizer: "Tokenizer"
    engine: RolloutEngine
    thread: EngineThread
    metrics: Metrics
    api_keys: tuple[str, ...]
    is_draining: bool = False


def create_app(service: Service) -> FastAPI:
    """The application; its engine thread is started and closed by whoever runs it."""
    # No pages that load scripts from elsewhere; /openapi.json describes the endpoints.
    app = FastAPI(title="tw-jax serve", docs_url=None, redoc_url=None)
    config = service.config
    rate = config.requests_per_minute
    app.add_middleware(
        gate.Gate,
        metrics=service.metrics,
        api_keys=service.api_keys,
        rate=None if rate is None else gate.RateLimit(rate),
        max_bytes=config.max_request_bytes,
        is_draining=lambda: service.is_draining,
    )
    service.metrics.watch(lambda: service.thread.running, lambda: service.thread.queued)
    _add_error_handlers(app)
    started = int(time.time())

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        _check_model(body.model, config)
        # In another thread: a megabyte of text must not hold up everybody's streams.
        prompts = await asyncio.to_thread(completion_prompts, service.tokenizer, body.prompt)
        return await _generate(service, body, prompts, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        _check_model(body.model, config)
        prompt = await asyncio.to_thread(chat_prompt, service.tokenizer, body.messages)
        return await _generate(service, body, [prompt], request)

    model = {
        "id": config.model_name,
        "object": "model",
        "created": started,
        "owned_by": "tw_jax",
        "max_model_len": service.engine.config.context_len,  # as vLLM says it
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_model(name, config)
        return model

    @app.get("/health")
    async def health() -> JSONResponse:
        if service.is_draining or not service.thread.is_up:
            return JSONResponse({"status": "draining" if service.is_draining else "down"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return app


def _check_model(name: str | None, config: ServeConfig) -> None:
    if name not in (None, config.model_name):
        raise ApiError(
            404,
            f"model: there is no model {name!r:.80}; this server has {config.model_name!r}",
            param="model",
            code="model_not_found",
        )


async def _generate(
    service: Service, body: GenerationBody, prompts: list[Ids], request: Request
) -> Response:
    requests = engine_requests(body, prompts, service.engine, service.config)
    generation = Generation(
        service.thread,
        service.metrics,
        service.tokenizer,
        service.engine.schema,
        requests,
        stops=body.stops,
        stream=body.stream,
    )
    is_chat = isinstance(body, ChatBody)
    writer = Writer(service.tokenizer, service.config.model_name, body, prompts, is_chat)
    if body.stream:
        events = _events(generation, writer, body, request.scope)
        return _EventStream(events, generation)
    try:
        return await _whole(generation, writer, request)
    finally:
        generation.close()


async def _whole(generation: Generation, writer: Writer, request: Request) -> Response:
    """The answer in one piece; none if the client leaves."""

    async def collect() -> dict[str, Any]:
        found = [[] for _ in generation.choices]
        async for index, piece in generation.pieces():
            found[index].append(piece)
        return writer.whole(generation.choices, [joined(pieces) for pieces in found])

    answer = asyncio.ensure_future(collect())
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return JSONResponse(answer.result())
        request.scope[gate.OUTCOME] = "disconnected"
        return Response(status_code=499)  # nobody reads it
    finally:
        answer.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    generation: Generation, writer: Writer, body: GenerationBody, scope: Scope
) -> AsyncIterator[str]:
    scope[gate.OUTCOME] = "disconnected"  # unless the end is reached
    try:
        for index in range(len(generation.choices)):
            if (first := writer.first(index)) is not None:
                yield event(first)
        async for index, piece in generation.pieces():
            yield event(writer.piece(index, generation.choices[index], piece))
        if body.wants_usage:
            yield event(writer.usage(generation.choices))
        scope[gate.OUTCOME] = "completed"
    except ApiError as error:  # the status has been sent: the error comes as an event
        scope[gate.OUTCOME] = "failed"
        yield event(error.body)
    yield END_OF_STREAM


class _EventStream(StreamingResponse):
    """Server-sent events that end the generation when they end, for whatever reason."""

    def __init__(self, events: AsyncIterator[str], generation: Generation) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if isinstance(error, ApiError):
            return error.response()
        place = f"{request.method} {request.url.path}"
        return ApiError(error.status_code, f"{place:.200}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return internal_error().response()
