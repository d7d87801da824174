"""A server of the 24-token language, on a loopback port, in a thread of the test's process."""

import asyncio
import contextlib
import dataclasses
import functools
import threading
import time

import httpx
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from tests.rollout.small_world import ID, PIECES, make_model, make_schema
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import SamplingParams
from tw_jax.serve.app import Service
from tw_jax.serve.config import ServeConfig
from tw_jax.serve.engine_thread import EngineThread, warm_up
from tw_jax.serve.metrics import Metrics
from tw_jax.serve.server import Server, address, listen

SAMPLING = SamplingParams(max_response_tokens=90, max_thread_tokens=12, max_blocks=3, max_threads=4)
CONFIG = ServeConfig(
    served_name="small",
    port=0,
    sampling=SAMPLING,
    engine=EngineConfig(
        context_len=144,
        rows=8,
        requests=5,
        max_threads=4,
        max_blocks=3,
        prefill_rows=2,
        prefill_chunk=8,
        steps_per_dispatch=4,
    ),
    drain_timeout_s=5.0,
)


@functools.cache
def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Characters of the language; tags, <bos> and <eos> are added tokens."""
    backend = tokenizers.Tokenizer(models.WordLevel(dict(ID), unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"(.|\n)"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ID["<bos>"])]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": [p for p in PIECES if len(p) > 5]})
    return tokenizer


@functools.cache
def make_engine() -> RolloutEngine:
    """Compiled once for all servers of a process; they run one after another."""
    engine = RolloutEngine(make_model()[0], make_schema(), CONFIG.engine)
    warm_up(engine, make_model()[1], [ID["<bos>"]], SAMPLING)
    return engine


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    service: Service
    server: Server

    def metric(self, name: str) -> float:
        """A number of /metrics by its name and labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next((float(x.split(" ")[-1]) for x in lines if x.startswith(f"{name} ")), 0.0)

    def post(self, path: str = "completions", **body) -> httpx.Response:
        """Sends a body as it is."""
        return httpx.post(f"{self.url}/v1/{path}", json=body, timeout=60)


@contextlib.contextmanager
def serving(engine: RolloutEngine | None = None, api_keys: tuple[str, ...] = (), **changes):
    """Runs a server with some settings changed."""
    config = dataclasses.replace(CONFIG, **changes)
    engine = engine or make_engine()
    metrics, ready = Metrics(), threading.Event()
    thread = EngineThread(
        engine,
        make_model()[1],
        config.max_queue,
        on_failure=metrics.engine_failures.inc,
        on_fatal=lambda: server.stop_now(),
    )
    service = Service(config, make_tokenizer(), engine, thread, metrics, api_keys)
    server = Server(service, on_ready=ready.set)
    with listen(config.host, config.port) as bound:
        running = Running(address(bound), service, server)
        runner = threading.Thread(target=lambda: asyncio.run(server.run_until_stopped(bound)))
        runner.start()
        assert ready.wait(60)
        try:
            yield running
        finally:
            server.stop()
            runner.join(30)
            assert not runner.is_alive()


def error_of(response, status):
    """The error of a response with this status."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def wait_until(condition, timeout_s=20):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class SlowThread:
    """Makes the engine thread rest after every dispatch."""

    def __init__(self, server: Running, rest_s: float) -> None:
        self._thread, self._rest_s = server.service.thread, rest_s

    def __enter__(self):
        flush = self._thread._flush

        def slow(running: int, queued: int) -> None:
            flush(running, queued)
            time.sleep(self._rest_s)

        self._thread._flush = slow
        return self

    def __exit__(self, *_):
        del self._thread._flush
