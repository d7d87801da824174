"""Decoding throughput against a peer: same weights, prompts and numbers of new tokens, greedy.

The sides run as processes that take turns, a whole workload each, warm: what they compile, they
compile before. Throughput counts the tokens that were asked for.

- `ratio_tiny`: 16 requests of 256 new tokens, 3.3 million parameters.
- `ratio_100m`: 16 requests of 64 new tokens, 100 million parameters.
- `ratio_mixed`: 256 requests of 32 to 512 new tokens. The peer decodes them 16 at a time, in order
  of arrival, and each batch ends with its longest row; our engine has 16 rows (`ratio_mixed`: as
  much memory for keys and values) or 64 (`ratio_mixed_64_rows`) and refills them as they fall free.

Where float32 and bfloat16 are both run, the ratio is that of each side's faster one, which
`fastest_*` names, and `ratio_*_float32` and `ratio_*_bfloat16` compare like with like; all else is
float32. No request meets an end of text: the tokens that could end or pad a text have embeddings
of zero, and a greedy choice among random logits is above zero.

Torch keeps to one thread; two of its threads on a busy machine wait for each other actively and are
several times slower. So `ratio_tiny` against it is one thread of ours against one of theirs, and
`ratio_tiny_all_cores` has ours use all cores, which a model so small gains nothing from: waking a
thread takes as long as what it is woken for.

`equal_tokens` is the share of new tokens that both sides agree on in float32: greedy texts part
where two candidates tie but for rounding, and then for good.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks.beside_peer import ENVIRONMENT
from benchmarks.blocks import Worker, alternate, summary
from benchmarks.peers import peer_python
from benchmarks.shapes import SMALL, TINY
from tw_jax.models import Qwen3Config, init_params
from tw_jax.models.export_weights import export_model
from tw_jax.tasks.character_tokenizer import load_tokenizer

PROMPT_LEN = 32
PEER_ROWS = 16  # batch of the peer
MIXED_REQUESTS, MIXED_NEW = 256, (32, 512)
FLOAT32 = ("float32",)
BOTH = ("float32", "bfloat16")
WARM_UP = 2  # a second call may compile again, for arrays that have found their device meanwhile


@dataclasses.dataclass(frozen=True)
class Ours:
    """How our engine runs.

    Attributes:
      rows: of the batch.
      prefill_rows: see `EngineConfig`.
      threads: of XLA; None for as many as there are cores.
    """

    rows: int
    prefill_rows: int
    threads: int | None = None

    def environment(self) -> dict[str, str]:
        """What tells XLA, which asks once, when the process begins."""
        return {} if self.threads is None else {"PJRT_NPROC": str(self.threads)}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is asked of both sides.

    Attributes:
      model: shape of the model.
      new_tokens: of each request.
      dtypes: of the products and of what is stored between them, each side in each of them.
      engines: our engines, by the suffix of the ratio's name.
      turns: timed runs of each side.
    """

    model: Qwen3Config
    new_tokens: tuple[int, ...]
    dtypes: tuple[str, ...]
    engines: dict[str, Ours]
    turns: int

    @property
    def context_len(self) -> int:
        """Positions of the longest text."""
        return PROMPT_LEN + max(self.new_tokens)


def workloads(peer: str) -> dict[str, Workload]:
    """What is measured against a peer, by the name of its ratio."""
    all_at_once = Ours(PEER_ROWS, PEER_ROWS)  # as the prompts arrive
    if peer == "hf":
        fixed = {"": dataclasses.replace(all_at_once, threads=1), "_all_cores": all_at_once}
        return {"tiny": Workload(TINY, (256,) * PEER_ROWS, BOTH, fixed, 7)}
    fixed = {"": all_at_once}
    low, high = MIXED_NEW
    lengths = np.random.default_rng(0).integers(low, high + 1, MIXED_REQUESTS)
    mixed = {"": Ours(16, 2), "_64_rows": Ours(64, 4)}
    return {
        "tiny": Workload(TINY, (256,) * PEER_ROWS, FLOAT32, fixed, 7),
        "100m": Workload(SMALL, (64,) * PEER_ROWS, BOTH, fixed, 5),
        "mixed": Workload(TINY, tuple(lengths.tolist()), FLOAT32, mixed, 3),
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
    # The peer under the name None, our engines under the suffixes of their ratios.
    sides = [(side, dtype) for side in (None, *workload.engines) for dtype in workload.dtypes]
    with tempfile.TemporaryDirectory(prefix="tw_jax_") as folder_name:
        folder = pathlib.Path(folder_name)
        prepare(folder, workload)
        workers = []
        try:
            for index, (side, dtype) in enumerate(sides):
                if side is None:
                    command = [peer_python(peer), "-m", f"benchmarks.peers.{peer}_rollout"]
                    command, more = [*command, str(folder), dtype], {}
                else:
                    ours = workload.engines[side]
                    command = [sys.executable, "-m", "benchmarks.rollout_worker", str(folder)]
                    command += [dtype, json.dumps(dataclasses.asdict(ours))]
                    more = ours.environment()
                workers.append(Worker(command, environ | more, folder / f"{index}.log"))
            seconds = alternate(workers, warm_up=WARM_UP, blocks=workload.turns, steps=1)
            ends = [worker.ask("stop") for worker in workers]
        finally:
            for worker in workers:
                worker.close()
    times = dict(zip(sides, map(summary, seconds), strict=True))
    return compared(name, workload, times, dict(zip(sides, ends, strict=True)))


def compared(
    name: str, workload: Workload, times: dict[Any, Any], ends: dict[Any, Any]
) -> dict[str, Any]:
    """Ratios and what they are made of, from the times of (side, dtype)."""
    tokens = sum(workload.new_tokens)

    def fastest(side: str | None) -> str:
        return min(workload.dtypes, key=lambda dtype: median(side, dtype))

    def median(side: str | None, dtype: str) -> float:
        return times[side, dtype]["median_step_s"]

    theirs = fastest(None)
    found: dict[str, Any] = {f"peer_tokens_per_s_{name}": tokens / median(None, theirs)}
    for dtype in workload.dtypes:
        versions = {"versions": ends[None, dtype]["versions"]}
        found[f"theirs_{name}_{dtype}"] = times[None, dtype] | versions
    for side, engine in workload.engines.items():
        key, ours = name + side, fastest(side)
        found[f"ratio_{key}"] = median(None, theirs) / median(side, ours)
        found[f"ours_tokens_per_s_{key}"] = tokens / median(side, ours)
        texts = (ends[s, "float32"]["tokens"] for s in (side, None))
        found[f"equal_tokens_{key}"] = equal_share(*texts)
        if len(workload.dtypes) > 1:
            found[f"fastest_{key}"] = {"theirs": theirs, "ours": ours}
        for dtype in workload.dtypes:
            if len(workload.dtypes) > 1:
                found[f"ratio_{key}_{dtype}"] = median(None, dtype) / median(side, dtype)
            found[f"ours_{key}_{dtype}"] = times[side, dtype] | {
                "engine": dataclasses.asdict(engine),
                "versions": ends[side, dtype]["versions"],
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
