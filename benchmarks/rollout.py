"""Decoding throughput against a peer: same weights, prompts and numbers of new tokens, greedy.

The sides run as processes that take turns, a whole workload each, warm: what they compile, they
compile before. Throughput counts the tokens that were asked for.

- `ratio_tiny`: 16 requests of 256 new tokens, 3.3 million parameters.
- `ratio_100m`: 16 requests of 64 new tokens, 100 million parameters.
- `ratio_mixed`: 256 requests of 32 to 512 new tokens. The peer decodes them 16 at a time, in order
  of arrival, and each batch ends with its longest row; our engine has 16 rows (`ratio_mixed`: as
  much memory for keys and values) or 64 (`ratio_mixed_64_rows`) and refills them as they fall free.

All is float32, which on CPU is the faster dtype of both sides. No request meets an end of text:
the tokens that could end or pad a text have embeddings of zero, and a greedy choice among random
logits is above zero. Torch keeps to one thread; two of its threads on a busy machine wait for each
other actively and are several times slower. `equal_tokens` is the share of new tokens that both
sides agree on: greedy texts part where two candidates tie but for rounding, and then for good.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks.blocks import Worker, alternate, summary
from benchmarks.peers import peer_python
from benchmarks.shapes import SMALL, TINY
from tw_jax.models import Qwen3Config, init_params
from tw_jax.models.export_weights import export_model
from tw_jax.tasks.character_tokenizer import load_tokenizer

PROMPT_LEN = 32
PEER_ROWS = 16  # batch of the peer
MIXED_REQUESTS, MIXED_NEW = 256, (32, 512)
WARM_UP = 2  # a second call may compile again, for arrays that have found their device meanwhile
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is asked of both sides.

    Attributes:
      model: shape of the model.
      new_tokens: of each request.
      engines: sizes of our engine, by the suffix of the ratio's name.
      turns: timed runs of each side.
    """

    model: Qwen3Config
    new_tokens: tuple[int, ...]
    engines: dict[str, dict[str, int]]
    turns: int

    @property
    def context_len(self) -> int:
        """Positions of the longest text."""
        return PROMPT_LEN + max(self.new_tokens)


def _engine(rows: int, prefill_rows: int) -> dict[str, int]:
    return {"rows": rows, "prefill_rows": prefill_rows}


def workloads(peer: str) -> dict[str, Workload]:
    """What is measured against a peer, by the name of its ratio."""
    fixed = {"": _engine(PEER_ROWS, PEER_ROWS)}  # all prompts arrive at once
    tiny = {"tiny": Workload(TINY, (256,) * PEER_ROWS, fixed, 7)}
    if peer == "hf":
        return tiny
    low, high = MIXED_NEW
    lengths = np.random.default_rng(0).integers(low, high + 1, MIXED_REQUESTS)
    mixed = {"": _engine(16, 2), "_64_rows": _engine(64, 4)}
    return tiny | {
        "100m": Workload(SMALL, (64,) * PEER_ROWS, fixed, 5),
        "mixed": Workload(TINY, tuple(lengths.tolist()), mixed, 3),
    }


def prepare(folder: pathlib.Path, workload: Workload) -> None:
    """Weights as published, prompts that begin with <bos> and hold no control tokens, and sizes."""
    tokenizer, config = load_tokenizer(), workload.model
    params = init_params(config, 0)
    table = params["embed_tokens"]["embedding"]
    never_sampled = np.array([tokenizer.pad_token_id, tokenizer.eos_token_id])
    params["embed_tokens"]["embedding"] = table.at[never_sampled].set(0.0)
    export_model(folder / "weights", params, config, tokenizer)
    shape = (len(workload.new_tokens), PROMPT_LEN)
    prompts = np.random.default_rng(1).integers(len(tokenizer), config.vocab_size, shape)
    prompts[:, 0] = tokenizer.bos_token_id
    asked = {
        "shape": dataclasses.asdict(config),
        "prompts": prompts.tolist(),
        "new_tokens": workload.new_tokens,
        "context_len": workload.context_len,
        "batch": PEER_ROWS,
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
    }
    (folder / "workload.json").write_text(json.dumps(asked))


def measure(name: str, workload: Workload, peer: str) -> dict[str, Any]:
    """Times one workload; keys end in its name."""
    repository = pathlib.Path(__file__).parents[1]
    environ = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(repository)}
    with tempfile.TemporaryDirectory(prefix="tw_jax_") as folder_name:
        folder = pathlib.Path(folder_name)
        prepare(folder, workload)
        words = [[peer_python(peer), "-m", f"benchmarks.peers.{peer}_rollout", str(folder)]]
        for sizes in workload.engines.values():
            module = "benchmarks.rollout_worker"
            words.append([sys.executable, "-m", module, str(folder), json.dumps(sizes)])
        workers = []
        try:
            for index, command in enumerate(words):
                workers.append(Worker(command, environ, folder / f"{index}.log"))
            seconds = alternate(workers, warm_up=WARM_UP, blocks=workload.turns, steps=1)
            theirs, *ours = (worker.ask("stop") for worker in workers)
        finally:
            for worker in workers:
                worker.close()
    their_time, *our_times = map(summary, seconds)
    tokens = sum(workload.new_tokens)
    found: dict[str, Any] = {
        f"peer_tokens_per_s_{name}": tokens / their_time["median_step_s"],
        f"theirs_{name}": their_time | {"versions": theirs["versions"]},
    }
    for (suffix, sizes), our_time, one in zip(
        workload.engines.items(), our_times, ours, strict=True
    ):
        key = name + suffix
        found |= {
            f"ratio_{key}": their_time["median_step_s"] / our_time["median_step_s"],
            f"ours_tokens_per_s_{key}": tokens / our_time["median_step_s"],
            f"equal_tokens_{key}": equal_share(one["tokens"], theirs["tokens"]),
            f"ours_{key}": our_time | {"engine": sizes, "versions": one["versions"]},
        }
    return found


def equal_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of tokens that are the same on both sides; both must be as many as were asked for."""
    same = [a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(same) / len(same)


def run(peer: str = "tunix") -> dict[str, Any]:
    """Ratios of the medians of turns: above 1, ours is faster."""
    found: dict[str, Any] = {"peer": peer, "environment": ENVIRONMENT, "cores": os.cpu_count()}
    for name, workload in workloads(peer).items():
        found |= measure(name, workload, peer)
    return found
