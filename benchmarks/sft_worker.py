"""Worker of `python -m benchmarks sft`: our SFT update on causal rows, one trajectory per row.

The folder is the one that `benchmarks.sft` prepared. Packing is part of the measured step.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import sys
import time

import jax
import numpy as np

from benchmarks.blocks import answer, asked_blocks
from tw_jax.data.packed_batch import PackedBatch
from tw_jax.data.packing import LossWeights, WeightedTrie, best_fit_rows, pack_rows
from tw_jax.models import Qwen3Config, graphdef
from tw_jax.models.import_weights import load_params
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.train.optimizer import OptimizerConfig, make_optimizer
from tw_jax.train.state import init_train_state
from tw_jax.train.update import MemoryConfig, make_update, nll_sum
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.schemas import make_schema
from tw_jax.trajectory.trajectory import Trajectory

TOTAL_STEPS = 1_000_000  # of the schedule, which is constant


def packed(schema: Schema, rows: np.ndarray) -> PackedBatch:
    """Token ids `[rows, row_len]`, the first of each row its prompt, as the SFT pipeline packs."""
    items = []
    for ids in rows:
        trajectory = schema.parse(ids, 1)
        assert isinstance(trajectory, Trajectory)
        trie = schema.forest([trajectory])
        items.append(WeightedTrie(trie, LossWeights().of(trie)))
    order = best_fit_rows([len(item.trie) for item in items], rows.shape[1])
    return pack_rows([[items[i] for i in row] for row in order], rows.shape[1])


def main(folder: pathlib.Path) -> None:
    """Trains in blocks as asked on standard input."""
    shape = json.loads((folder / "shape.json").read_text())
    config = Qwen3Config.from_dict(shape, origin="the benchmark")
    settings = json.loads((folder / "optimizer.json").read_text())
    tokens = np.load(folder / "tokens.npy")
    schema = make_schema("threadweaver", load_tokenizer())
    memory = MemoryConfig()
    optimizer = make_optimizer(OptimizerConfig(**settings), TOTAL_STEPS)
    update = make_update(nll_sum(graphdef(config), memory), optimizer)
    params = load_params(str(folder / "weights"), config)
    state = jax.jit(lambda params: init_train_state(params, optimizer))(params)
    metrics, step = [], 0
    for count in asked_blocks():
        start = time.perf_counter()
        for _ in range(count):
            state, sums = update(state, [packed(schema, tokens[step % len(tokens)])])
            metrics.append(sums)
            step += 1
        jax.block_until_ready((state, sums))
        answer(seconds=time.perf_counter() - start)
    names = ("tw-jax", "jax", "flax", "optax")
    answer(
        losses=[float(sums["loss"] / sums["weight"]) for sums in metrics],
        skipped_updates=int(state.skipped_updates),
        memory=dataclasses.asdict(memory),
        versions={name: importlib.metadata.version(name) for name in names},
    )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
