"""`tw-jax generate`: resumed from a file, answered by a server, watched."""

import dataclasses

import pytest

from tests.rollout.completions_server import CompletionsServer
from tw_jax import cli
from tw_jax.data.text import encode_prompt, encode_response
from tw_jax.evals import generate as generate_module
from tw_jax.evals.generate import GenerateConfig, run_generate
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import SamplingParams

ENGINE = EngineConfig(
    context_len=64, rows=4, requests=2, max_threads=2, max_blocks=2, prefill_rows=2, prefill_chunk=8
)
SAMPLING = SamplingParams(max_response_tokens=24, max_thread_tokens=8, max_threads=2, max_blocks=2)
WORDS = [
    *(f"engine.{name}={value}" for name, value in vars(ENGINE).items()),
    "sampling.max_response_tokens=24",
    "sampling.max_threads=2",
    "sampling.max_blocks=2",
]


@pytest.fixture
def sampled(small_model, monkeypatch):
    """The verb loads the small model; the list holds how many rollouts each call sampled."""
    monkeypatch.setattr(generate_module, "load_run", lambda run, step: small_model)
    original, calls = RolloutEngine.generate, []

    def counted(self, params, requests, **more):
        calls.append(len(requests))
        return original(self, params, requests, **more)

    monkeypatch.setattr(RolloutEngine, "generate", counted)
    return calls


def test_it_goes_on_from_a_file_of_rollouts(sampled, tmp_path):
    file = tmp_path / "rollouts.jsonl"
    config = GenerateConfig(
        prompts=("1", "2"), sampling=SAMPLING, engine=ENGINE, rollouts=str(file)
    )  # fmt: skip
    answers = run_generate(config)
    assert run_generate(config) == answers and sampled == [2]
    three = dataclasses.replace(config, prompts=("1", "2", "3"))
    assert run_generate(three)[:2] == answers and sampled == [2, 1]
    assert len(file.read_text().splitlines()) == 3


def test_watching_prints_what_is_written_into_a_pipe(sampled, capsys):
    assert cli.main(["generate", "--watch", "prompts=['3*[4]']", *WORDS]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3*[4]") and out.count("3*[4]") == 1
    assert "critical path" in out and sampled == []
    assert cli.main(["generate", "--watched", *WORDS]) == 2
    assert "unknown option '--watched'" in capsys.readouterr().err


def test_a_server_answers(tokenizer, schema, task, tmp_path, monkeypatch, capsys):
    """The run's folder gives the tokenizer alone; the key comes from the environment."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tokenizer.save_pretrained(tmp_path / "run" / "tokenizer")
    problem = task.problem("heldout", 0, 0)
    written = encode_response(tokenizer, problem.parallel, schema.eos_id).tolist()
    asked = encode_prompt(tokenizer, problem.prompt).tolist()

    def answer(body, write):
        """Goes on with the worked solution; threads are found behind their headers."""
        stop, context = body["stop_token_ids"][0], body["prompt"]
        done = len(context) - len(asked)
        if context[len(asked) :] != written[:done]:  # a thread behind the first
            header = context[-4:]
            done = next(
                i + 4 for i in range(len(written)) if written[i : i + 4] == header
            )  # fmt: skip
        rest = written[done:]
        rest = rest[: rest.index(stop) + 1] if stop in rest else rest
        return {"token_ids": rest, "finish_reason": "stop", "stop_reason": stop}

    with CompletionsServer(answer) as server:
        words = [
            f"checkpoint={tmp_path / 'run'}",
            f"server={server.url}",
            "server.model=m",
            "server.dialect=vllm",
            "server.context_len=900",
            "server.api_key_env=SOME_KEY",
            "task.multiplication.digits=2",
            "count=1",
        ]
        assert cli.main(["generate", *words]) == 2
        assert "SOME_KEY is not set" in capsys.readouterr().err
        monkeypatch.setenv("SOME_KEY", "s3cret")
        assert cli.main(["generate", *words]) == 0
        assert set(server.keys) == {"Bearer s3cret"} and len(server.bodies) >= 4
    out = capsys.readouterr().out
    assert "ended by eos, correct" in out and "s3cret" not in out
    assert cli.main(["generate", *words, f"checkpoint={tmp_path}"]) == 2
    assert "set tokenizer=FOLDER|HUB_ID" in capsys.readouterr().err
    assert cli.main(["generate", *words, "--watch"]) == 2
    assert "a server does not show its threads" in capsys.readouterr().err
