"""Worker of `python -m benchmarks rollout`: our engine, with all requests given to it at once.

The folder is the one that `benchmarks.rollout` prepared; the other words are the dtype to compute
in and `benchmarks.rollout.Ours`.
"""

import importlib.metadata
import json
import pathlib
import sys
import time

import numpy as np

from benchmarks.blocks import answer, asked_blocks
from benchmarks.rollout import Ours
from tw_jax.models import Qwen3Config, graphdef
from tw_jax.models.import_weights import load_params
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import Request, SamplingParams
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.trajectory.schemas import make_schema


def main(folder: pathlib.Path, dtype: str, ours: Ours) -> None:
    """Runs the workload as often as asked on standard input."""
    workload = json.loads((folder / "workload.json").read_text())
    shape = workload["shape"] | {"compute_dtype": dtype}
    config = Qwen3Config.from_dict(shape, origin="the benchmark")
    params = load_params(str(folder / "weights"), config)
    engine = RolloutEngine(
        graphdef(config),
        make_schema("threadweaver", load_tokenizer()),
        EngineConfig(
            context_len=workload["context_len"],
            rows=ours.rows,
            requests=ours.rows,
            prefill_rows=ours.prefill_rows,
            max_threads=1,
            max_blocks=1,
            prefill_chunk=32,
            steps_per_dispatch=workload["context_len"],
        ),
    )
    requests = [
        Request(
            np.array(prompt, np.int32),
            seed=0,
            sampling=SamplingParams(
                temperature=0.0, max_response_tokens=count, max_threads=1, max_blocks=1
            ),
            mode="sequential",
        )
        for prompt, count in zip(workload["prompts"], workload["new_tokens"], strict=True)
    ]
    rollouts = []
    for count in asked_blocks():
        start = time.perf_counter()
        for _ in range(count):
            rollouts = engine.generate(params, requests)
        answer(seconds=time.perf_counter() - start)
    answer(
        tokens=[rollout.response.tolist() for rollout in rollouts],
        versions={name: importlib.metadata.version(name) for name in ("tw-jax", "jax")},
    )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], Ours(**json.loads(sys.argv[3])))
