"""What the benchmarks measure is what they say: turns, rows, and the command line."""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import attention, serve
from benchmarks.blocks import Worker, alternate
from benchmarks.compiled_copies import compiled_copies
from benchmarks.forkjoin import PLOTS
from benchmarks.rollout import PROMPT_LEN, equal_share, workloads
from benchmarks.rollout import prepare as prepare_rollouts
from benchmarks.scripted import scripted_trajectory
from benchmarks.sft import prepare
from benchmarks.sft_worker import packed
from benchmarks.shapes import TINY
from tw_jax.models.import_weights import load_params
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
    assert json.loads((tmp_path / "shape.json").read_text())["vocab_size"] == TINY.vocab_size
    batch = packed(make_schema("threadweaver", load_tokenizer()), tokens)
    rows, row_len = tokens.shape
    np.testing.assert_array_equal(batch.tokens, tokens)
    np.testing.assert_array_equal(batch.positions, np.tile(np.arange(row_len), (rows, 1)))
    np.testing.assert_array_equal(batch.visible_end, np.full((rows, row_len), row_len))
    np.testing.assert_array_equal(batch.parent[:, 1:], batch.positions[:, :-1])
    np.testing.assert_array_equal(batch.loss_weight, batch.positions > 0)  # all that is predicted


def test_rollout_prompts_are_plain_text_and_their_end_is_never_likeliest(tmp_path) -> None:
    workload = dataclasses.replace(workloads("hf")["tiny"], new_tokens=(4, 6))
    prepare_rollouts(tmp_path, workload)
    asked, tokenizer = json.loads((tmp_path / "workload.json").read_text()), load_tokenizer()
    prompts = np.array(asked["prompts"])
    assert prompts.shape == (2, PROMPT_LEN)
    assert (prompts[:, 0] == tokenizer.bos_token_id).all()
    assert (prompts[:, 1:] >= len(tokenizer)).all()
    assert asked["context_len"] == PROMPT_LEN + 6
    table = load_params(str(tmp_path / "weights"), TINY)["embed_tokens"]["embedding"]
    assert not table[np.array([asked["pad_id"], asked["eos_id"]])].any()


def test_ours_runs_on_one_thread_where_transformers_does() -> None:
    engines = workloads("hf")["tiny"].engines
    assert engines[""].environment() == {"PJRT_NPROC": "1"}
    assert engines["_all_cores"].environment() == {}
    assert not any(
        ours.environment() for w in workloads("tunix").values() for ours in w.engines.values()
    )


def test_equal_share_counts_tokens() -> None:
    assert equal_share([[1, 2], [3]], [[1, 9], [3]]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="shorter"):
        equal_share([[1, 2]], [[1]])


@pytest.mark.parametrize("plot", PLOTS)
def test_a_scripted_trajectory_follows_its_plot(plot) -> None:
    tokenizer = load_tokenizer()
    schema = make_schema("threadweaver", tokenizer)
    story = scripted_trajectory(plot, schema, tokenizer, 0, prompt_len=20)
    assert story.prompt_len == 20
    assert story.tokens[-1] == schema.eos_id
    wrapping = len(" \n") + 1  # of a body: a space before it, a line break and the tag behind
    bodies = tuple(tuple(t.end - t.body - wrapping for t in b.threads) for b in story.blocks)
    assert bodies == plot.blocks
    saved = sum(sum(lengths) - max(lengths) for lengths in plot.blocks)
    assert len(story.tokens) - 20 - schema.critical_path(story) >= saved


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trie", "--peer", "tunix"], "unrecognized arguments: --peer tunix"),
        (["sft", "--peer", "none"], "invalid choice: 'none'"),
        (["sft", "--peer", "hf"], "invalid choice: 'hf'"),
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


def test_the_attention_row_has_the_corpus_shape() -> None:
    """Four blocks of two or three threads with 58 % of the text; tries fill their places."""
    trajectory, trie = attention.trie_of_text(764)
    assert [len(block.threads) for block in trajectory.blocks] == [2, 3, 2, 3]
    share = attention.thread_tokens(trajectory) / len(trajectory.tokens)
    assert share == pytest.approx(attention.PARALLEL_RATIO, abs=0.01)
    row = attention.trie_row(8192, tries=8)[0]
    fill = len(attention.corpus_trie(1023))
    assert 1000 <= fill <= 1023
    assert len(trie) <= fill + 10
    roots = [start for start in range(8192) if row[start] - start >= fill]
    assert roots == [1024 * i for i in range(8)]
    close = attention.trie_row(8192, tries=8, aligned=False)[0]
    assert (close[: 8 * fill] > np.arange(8 * fill)).all() and close[fill] == 2 * fill
    assert attention.visible_pairs(row[None]) == attention.visible_pairs(close[None])


@pytest.mark.slow
def test_serving_counts_what_clients_see() -> None:
    found = serve.run(clients=4, warm_up_s=1, measure_s=4)
    assert found["errors"] == 0 and found["requests"] >= 4
    assert found["tokens"] >= found["requests"]
    assert found["p50_first_token_s"] <= found["p50_latency_s"] <= found["p95_latency_s"]
    assert found["memory_growth_mb"] < 50


def test_a_copy_is_seen():
    """What holds the engine to no copies must see one."""

    def changed(x):
        return x.at[0].set(1.0)

    def compiled(function, **options):
        x = jnp.zeros((11, 13))
        return jax.jit(function, **options).lower(x).compile().as_text()

    assert (11, 13) in compiled_copies(compiled(changed))
    assert (11, 13) not in compiled_copies(compiled(changed, donate_argnums=0))
