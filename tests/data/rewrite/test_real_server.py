"""Stage 1 against `tw-jax serve` with random weights: nonsense answers, no crash, all rejected."""

import asyncio
import dataclasses
import json
import threading

import pytest

from tests.data.rewrite.marked_traces import cases, record
from tests.data.rewrite.runs import LIMITS, responses, run, write_jsonl
from tw_jax.data.rewrite.ledger import Ledger
from tw_jax.data.tokenizer import open_tokenizer
from tw_jax.models import qwen3
from tw_jax.models.config import PRESETS
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import SamplingParams
from tw_jax.serve.app import Service
from tw_jax.serve.config import ServeConfig
from tw_jax.serve.engine_thread import EngineThread
from tw_jax.serve.metrics import Metrics
from tw_jax.serve.server import Server, address, listen

CONFIG = ServeConfig(
    served_name="random",
    port=0,
    sampling=SamplingParams(
        max_response_tokens=64, max_thread_tokens=16, max_blocks=2, max_threads=2
    ),
    engine=EngineConfig(
        context_len=6144,
        rows=4,
        requests=3,
        max_threads=2,
        max_blocks=2,
        prefill_rows=2,
        prefill_chunk=256,
        steps_per_dispatch=8,
    ),
)


@pytest.fixture
def url():
    tokenizer, schema = open_tokenizer(None, "threadweaver")
    architecture = dataclasses.replace(PRESETS["tiny"], max_position_embeddings=8192)
    engine = RolloutEngine(qwen3.graphdef(architecture), schema, CONFIG.engine)
    params = qwen3.init_params(architecture, CONFIG.seed)
    thread = EngineThread(
        engine, params, 64, on_failure=lambda: None, on_fatal=lambda: server.stop_now()
    )
    service = Service(CONFIG, tokenizer, engine, thread, Metrics(), ())
    ready = threading.Event()
    server = Server(service, on_ready=ready.set)
    with listen(CONFIG.host, CONFIG.port) as bound:
        runner = threading.Thread(target=lambda: asyncio.run(server.run_until_stopped(bound)))
        runner.start()
        assert ready.wait(60)
        try:
            yield f"{address(bound)}/v1"
        finally:
            server.stop()
            runner.join(60)
            assert not runner.is_alive()


@pytest.mark.slow
def test_a_model_that_answers_nonsense_gets_every_trace_rejected_with_a_reason(tmp_path, url):
    write_jsonl(tmp_path / "input.jsonl", [record(case, 0)[0] for case in cases()[:3]])
    limits = dataclasses.replace(LIMITS, attempts=2)
    server = {"model": "random", "max_answer_tokens": 24, "call_timeout_s": 120.0}
    status, summary, rejects = run(tmp_path, url, server=server, limits=limits)
    assert status == 1 and summary["written"] == 0
    assert [entry["kind"] for entry in rejects] == ["steps_failed"] * 3
    assert all("answers could not be used" in entry["message"] for entry in rejects)
    assert responses(tmp_path) == []
    with Ledger(tmp_path / "out" / "answers.sqlite") as ledger:
        cost = ledger.costs()["steps"]
    # The server knows no JSON schemas: the run went on without, and paid for two attempts each.
    assert cost.calls == 6 and cost.answer_tokens <= 6 * 24
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rejected"] == {
        "steps_failed": 3
    }
