"""Packing and reading trajectories of the published training set's shape.

Trajectories have four blocks of two and three threads, 969 tokens per thread and 11,000 tokens in
all on average (ThreadWeaver, arXiv 2512.07843, Table 8). The paper gives no more of the lengths
than their mean; here they are log-normal around it, with the standard deviation at half of it, as
far as the tries fit 40,960 tokens. The text is this repository's documentation, sentence by
sentence in a random order.

`pack_tokens_per_s` goes from token ids to rows: parse, trie, best-fit rows, layout.
`text_tokens_per_s` begins at text and Qwen3's tokenizer. `store_tokens_per_s` is `tw-jax data pack`
from a file to a finished store, in one process that has the tokenizer loaded. Tokens are those of
prompts and responses, each once. `..._per_cpu_s` are the same per second of processor time of all
threads: what one core does that has nothing else to do. `packing_efficiency` is the share of places
that hold a token, for rows of 40,960 and 20,000 trajectories in windows of 512;
`one_window_efficiency` is that of one window by itself.

`loader_ratio` is the rate of batches read from a store over the rate at which the quickstart's
training step takes them, blocks of both in turn; `first_batch_s` is the time from opening the store
of long rows to its first batch.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tw_jax.config import load_config
from tw_jax.data.columns import DEFAULT_COLUMNS
from tw_jax.data.encoded_records import bound_tokenizer
from tw_jax.data.export_task import export_task
from tw_jax.data.pack import PackConfig, run_pack
from tw_jax.data.packing import LossWeights, best_fit_rows, lay_out_rows, rows_to_write
from tw_jax.data.records import Record
from tw_jax.data.store_batches import StoresConfig, store_batches
from tw_jax.data.trajectory_file import encode_trajectory, trajectory_record
from tw_jax.quickstart import QuickstartConfig
from tw_jax.tasks.registry import make_task
from tw_jax.train.optimizer import make_optimizer
from tw_jax.train.run_dir import new_model
from tw_jax.train.sft_data import training_batches
from tw_jax.train.state import init_train_state
from tw_jax.train.update import make_update, nll_sum
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import Trajectory

ROOT = pathlib.Path(__file__).parents[1]
# A copy beside the repository saves the download.
QWEN3 = ROOT.parent / "shared" / "qwen3_tokenizer"
TOKENIZER = str(QWEN3) if QWEN3.is_dir() else "Qwen/Qwen3-8B"
ROW_LEN, WINDOW, SHARD_ROWS = 40_960, 512, 64
MEAN_TOKENS, THREAD_TOKENS, THREADS = 11_176, 969, (2, 3, 2, 3)
CHARACTERS_PER_TOKEN = 3.6  # of the documentation, with Qwen3's tokenizer
TRAJECTORIES, REPEATS = 120, 7
EFFICIENCY_TRAJECTORIES = 20_000
STORE_PROBLEMS = 3000
WARM_UP, BLOCKS, STEPS, BATCHES = 3, 5, 8, 300


def run() -> dict[str, Any]:
    """Medians over repeats; see the top of the file."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(pathlib.Path(folder))


def _run(folder: pathlib.Path) -> dict[str, Any]:
    tokenizer, schema = bound_tokenizer(TOKENIZER, "threadweaver")
    rng = np.random.default_rng(0)
    records = [
        Record("benchmark", i, text_of(rng, tokens))
        for i, tokens in enumerate(lengths(rng, TRAJECTORIES, most=24_000), start=1)
    ]
    encoded = [encoded_record(record, schema, tokenizer) for record in records]
    tokens = sum(len(trajectory.tokens) for trajectory in encoded)
    ids = [(trajectory.tokens, trajectory.prompt_len) for trajectory in encoded]
    pack_s, pack_cpu_s = median_s(lambda: packed([parsed(schema, *item) for item in ids], schema))
    text_s, text_cpu_s = median_s(
        lambda: packed([encoded_record(item, schema, tokenizer) for item in records], schema)
    )
    source = folder / "trajectories.jsonl"
    source.write_text("".join(json.dumps(record.fields) + "\n" for record in records))
    config = PackConfig(
        inputs=(str(source),),
        output=str(folder / "long"),
        tokenizer=TOKENIZER,
        row_len=ROW_LEN,
        rejects=str(folder / "rejects.jsonl"),
    )
    start = time.perf_counter()
    manifest = run_pack(config)
    store_s = time.perf_counter() - start
    blocks = [block for trajectory in encoded for block in trajectory.blocks]
    threads = [thread for block in blocks for thread in block.threads]
    return {
        "trajectories": len(encoded),
        "tokens_per_trajectory": tokens / len(encoded),
        "tokens_per_thread": float(np.mean([t.end - t.start - 2 for t in threads])),
        "threads_per_block": len(threads) / len(blocks),
        "pack_tokens_per_s": tokens / pack_s,
        "pack_tokens_per_cpu_s": tokens / pack_cpu_s,
        "text_tokens_per_s": tokens / text_s,
        "text_tokens_per_cpu_s": tokens / text_cpu_s,
        "store_tokens_per_s": tokens / store_s,
        "store_bytes_per_token": _bytes(folder / "long") / manifest.counts["trie_tokens"],
        **efficiency(encoded, schema),
        "first_batch_s": statistics.median(
            first_batch_s(str(folder / "long"), tokenizer, schema) for _ in range(REPEATS)
        ),
        **loader(folder),
    }


@functools.cache
def sentences() -> list[str]:
    """The documentation's prose."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = " ".join(file.read_text(encoding="utf-8") for file in files)
    text = re.sub(r"<[^>]*>", "", text)  # tags of the schemas too
    return [sentence for sentence in re.split(r"(?<=[.:])\s+", text) if len(sentence) > 40]


def lengths(rng: np.random.Generator, count: int, most: int) -> list[int]:
    """Tokens per trajectory: log-normal, cut off at both ends."""
    sigma = np.sqrt(np.log(1 + 0.5**2))
    drawn = rng.lognormal(np.log(MEAN_TOKENS) - sigma**2 / 2, sigma, 2 * count)
    return drawn[(drawn > 500) & (drawn < most)][:count].astype(int).tolist()


def text_of(rng: np.random.Generator, tokens: int) -> dict[str, str]:
    """A trajectory of about so many tokens: blocks stretch with it."""
    prose = sentences()
    scale = tokens / MEAN_TOKENS

    def text(tokens: float) -> str:
        wanted, pieces = tokens * CHARACTERS_PER_TOKEN, []
        while sum(map(len, pieces)) < wanted:
            pieces.append(prose[rng.integers(len(prose))])
        return "\n".join(pieces)[: int(wanted)]

    in_threads = sum(THREADS) * THREAD_TOKENS
    between = (MEAN_TOKENS - in_threads - len(THREADS) * 120) / (len(THREADS) + 1)
    response = text(between * scale)
    for count in THREADS:
        numbers = range(1, count + 1)
        plans = "".join(f"<Outline>{i}: {text(30)}</Outline>\n" for i in numbers)
        bodies = "".join(
            f"<Thread>\n{i}: {text(THREAD_TOKENS * scale)}\n</Thread>" for i in numbers
        )
        response += f"\n<Parallel>\n<Outlines>\n{plans}</Outlines>\n{bodies}\n</Parallel>\n"
        response += text(between * scale)
    return {"prompt": text(120), "response": response}


def encoded_record(record: Record, schema: Schema, tokenizer: Any) -> Trajectory:
    """Text to a trajectory."""
    return encode_trajectory(trajectory_record(record, DEFAULT_COLUMNS), schema, tokenizer)


def parsed(schema: Schema, tokens: np.ndarray, prompt_len: int) -> Trajectory:
    """Token ids to a trajectory."""
    trajectory = schema.parse(tokens, prompt_len)
    assert isinstance(trajectory, Trajectory)
    return trajectory


def packed(trajectories: list[Trajectory], schema: Schema) -> None:
    """Trajectories to rows."""
    tries = [schema.forest([trajectory]) for trajectory in trajectories]
    rows = best_fit_rows([len(trie) for trie in tries], ROW_LEN)
    lay_out_rows([[tries[i] for i in row] for row in rows], ROW_LEN)


def median_s(function: Callable[[], Any]) -> tuple[float, float]:
    """Median time of a call over `REPEATS` of them, and median processor time of all threads."""
    wall, cpu = [], []
    for _ in range(REPEATS):
        start, cpu_start = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    return statistics.median(wall), statistics.median(cpu)


def efficiency(encoded: list[Trajectory], schema: Schema) -> dict[str, float]:
    """Share of used places, for many lengths; tries grow on them as those of `encoded` do."""
    growth = np.mean([len(schema.forest([t])) / len(t.tokens) for t in encoded])
    drawn = lengths(np.random.default_rng(1), EFFICIENCY_TRAJECTORIES, most=int(ROW_LEN / growth))
    trie_lens = [int(tokens * growth) for tokens in drawn]
    waiting: list[int] = []
    rows = 0
    for start in range(0, len(trie_lens), WINDOW):
        window = waiting + trie_lens[start : start + WINDOW]
        last = start + WINDOW >= len(trie_lens)
        done, left = rows_to_write(window, ROW_LEN, SHARD_ROWS, last=last)
        rows += len(done)
        waiting = [window[i] for i in left]
    by_itself = len(best_fit_rows(trie_lens[:WINDOW], ROW_LEN))
    return {
        "trie_tokens_per_token": float(growth),
        "packing_efficiency": sum(trie_lens) / (rows * ROW_LEN),
        "one_window_efficiency": sum(trie_lens[:WINDOW]) / (by_itself * ROW_LEN),
    }


def first_batch_s(store: str, tokenizer: Any, schema: Schema) -> float:
    """Time from opening a store to its first batch."""
    start = time.perf_counter()
    batches = store_batches(
        StoresConfig(paths=(store,)),
        tokenizer,
        schema,
        LossWeights(),
        rows=2,
        row_len=ROW_LEN,
        seed=0,
        epochs=None,
    )
    next(iter(batches))
    return time.perf_counter() - start


def loader(folder: pathlib.Path) -> dict[str, float]:
    """Reading a store against the training step of the quickstart, in turn."""
    config = load_config(QuickstartConfig, ROOT / "configs" / "quickstart.yaml").sft
    source = folder / "task.jsonl"
    export_task(make_task(config.task), "train", STORE_PROBLEMS, 0, 0.5, source)
    pack = PackConfig(
        inputs=(str(source),),
        output=str(folder / "task"),
        row_len=config.data.row_len,
        rejects=str(folder / "rejects.jsonl"),
    )
    run_pack(pack)
    stores = StoresConfig(paths=(str(folder / "task"),))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, stores=stores))
    model = new_model(config.model, config.seed)
    optimizer = make_optimizer(config.optimizer, config.steps)
    update = make_update(nll_sum(model.graphdef, config.memory), optimizer)
    state = jax.jit(lambda params: init_train_state(params, optimizer))(model.params)
    micro = list(itertools.islice(training_batches(config, model), config.gradient_accumulation))
    tokens = sum(batch.tokens.size for batch in micro)
    train, read = [], []
    for block in range(WARM_UP + BLOCKS):
        start = time.perf_counter()
        for _ in range(STEPS):
            state, sums = update(state, micro)
        jax.block_until_ready(sums)
        train_s = time.perf_counter() - start
        batches = iter(training_batches(config, model))
        next(batches)
        start = time.perf_counter()
        size = sum(batch.tokens.size for batch in itertools.islice(batches, BATCHES))
        read_s = time.perf_counter() - start
        if block >= WARM_UP:
            train.append(STEPS * tokens / train_s)
            read.append(size / read_s)
    return {
        "train_tokens_per_s": statistics.median(train),
        "loader_tokens_per_s": statistics.median(read),
        "loader_ratio": statistics.median(read) / statistics.median(train),
    }


def _bytes(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
