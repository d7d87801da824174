"""Runs of the verb in a temporary folder."""

import json
import pathlib

from tests.data.rewrite.marked_traces import cases, record
from tw_jax.data.rewrite.command import run_rewrite
from tw_jax.data.rewrite.config import (
    ChatServerConfig,
    RewriteBudget,
    RewriteConfig,
    RewriteLimits,
)
from tw_jax.rollout.client_http import RetryPolicy

LIMITS = RewriteLimits(min_saved_chars=20, max_changed_share=0.5)
RETRY = RetryPolicy(retries=3, first_pause_s=0.001, max_pause_s=0.01)


def write_jsonl(path: pathlib.Path, records: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(fields) + "\n" for fields in records))
    return path


def read_jsonl(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def all_records() -> tuple[list[dict], list[str]]:
    """The 20 traces in their four forms, and the responses that must come out."""
    made = [record(case, number % 4) for number, case in enumerate(cases())]
    return [fields for fields, _ in made], [response for _, response in made]


def server_config(url: str, **changes) -> ChatServerConfig:
    settings = {"concurrency": 8, "call_timeout_s": 20.0, "retry": RETRY, "max_answer_tokens": 500}
    return ChatServerConfig(url=url, **({"model": "scripted"} | settings | changes))


def config(tmp_path: pathlib.Path, url: str, *, server: dict | None = None, **changes):
    source = tmp_path / "input.jsonl"
    if not source.exists():
        write_jsonl(source, all_records()[0])
    settings = {"limits": LIMITS, "budget": RewriteBudget(), "inputs": (str(source),)} | changes
    return RewriteConfig(
        output=tmp_path / "out",
        server=server_config(url, **(server or {})),
        **settings,
    )


def run(tmp_path: pathlib.Path, url: str, **changes) -> tuple[int, dict, list[dict]]:
    """Exit status, summary and rejects of a run."""
    status = run_rewrite(config(tmp_path, url, **changes))
    out = tmp_path / "out"
    return (
        status,
        json.loads((out / "summary.json").read_text()),
        read_jsonl(out / "rejects.jsonl"),
    )


def responses(tmp_path: pathlib.Path) -> list[str]:
    return [line["response"] for line in read_jsonl(tmp_path / "out" / "trajectories.jsonl")]
