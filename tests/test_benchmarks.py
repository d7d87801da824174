"""What the benchmarks measure is what they say: turns, rows, and the command line."""

import json
import pathlib
import sys

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import serve
from benchmarks.blocks import Worker, alternate
from benchmarks.sft import CONFIG, prepare
from benchmarks.sft_worker import packed
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.trajectory.schemas import make_schema

ROOT = pathlib.Path(__file__).parent.parent

# Notes its turns in a file that two of them share.
WORKER = """
import sys
from benchmarks.blocks import answer, asked_blocks
print("noise that is no answer")
for count in asked_blocks():
    with open(sys.argv[1], "a") as file:
        file.write(sys.argv[2] * count + " ")
    answer(seconds=float(count))
answer(name=sys.argv[2])
"""


def worker(tmp_path: pathlib.Path, *words: str) -> Worker:
    environ = {"PYTHONPATH": str(ROOT)}
    return Worker([sys.executable, "-c", *words], environ, tmp_path / f"{words[-1]}.log")


def test_workers_take_turns(tmp_path: pathlib.Path) -> None:
    turns = tmp_path / "turns"
    workers = [worker(tmp_path, WORKER, str(turns), name) for name in "ab"]
    try:
        seconds = alternate(workers, warm_up=3, blocks=3, steps=2)
        assert [w.ask("stop") for w in workers] == [{"name": "a"}, {"name": "b"}]
    finally:
        for one in workers:
            one.close()
    assert seconds == [[1.0] * 3] * 2
    assert turns.read_text().split() == ["aaa", "bbb", "aa", "bb", "bb", "aa", "aa", "bb"]


def test_a_worker_that_dies_is_quoted(tmp_path: pathlib.Path) -> None:
    dying = worker(tmp_path, "raise SystemExit('no such wheel')")
    try:
        with pytest.raises(RuntimeError, match="no such wheel"):
            dying.ask("go 1")
    finally:
        dying.close()


def test_sft_rows_are_full_and_causal(tmp_path: pathlib.Path) -> None:
    prepare(tmp_path)
    tokens = np.load(tmp_path / "tokens.npy")[0]
    assert json.loads((tmp_path / "shape.json").read_text())["vocab_size"] == CONFIG.vocab_size
    batch = packed(make_schema("threadweaver", load_tokenizer()), tokens)
    rows, row_len = tokens.shape
    np.testing.assert_array_equal(batch.tokens, tokens)
    np.testing.assert_array_equal(batch.positions, np.tile(np.arange(row_len), (rows, 1)))
    np.testing.assert_array_equal(batch.visible_end, np.full((rows, row_len), row_len))
    np.testing.assert_array_equal(batch.parent[:, 1:], batch.positions[:, :-1])
    np.testing.assert_array_equal(batch.loss_weight, batch.positions > 0)  # all that is predicted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trie", "--peer", "tunix"], "unrecognized arguments: --peer tunix"),
        (["sft", "--peer", "none"], "invalid choice: 'none'"),
    ],
)
def test_peers_only_where_a_benchmark_takes_one(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    with pytest.raises(SystemExit):
        command.main()
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_serving_counts_what_clients_see() -> None:
    found = serve.run(clients=4, warm_up_s=1, measure_s=4)
    assert found["errors"] == 0 and found["requests"] >= 4
    assert found["tokens"] >= found["requests"]
    assert found["p50_first_token_s"] <= found["p50_latency_s"] <= found["p95_latency_s"]
    assert found["memory_growth_mb"] < 50
