"""Training throughput at the quickstart's shape: useful (not padding) tokens per second."""

import itertools
import statistics
import time

import jax
import numpy as np

from tw_jax.config import load_config
from tw_jax.quickstart import QuickstartConfig
from tw_jax.train.optimizer import make_optimizer
from tw_jax.train.run_dir import new_model
from tw_jax.train.sft_data import training_batches, useful_tokens
from tw_jax.train.state import init_train_state
from tw_jax.train.update import make_update, nll_sum

WARM_UP, STEPS = 5, 60


def run() -> dict[str, float]:
    """Median step time of the quickstart's SFT, input pipeline included."""
    config = load_config(QuickstartConfig, "configs/quickstart.yaml").sft
    model = new_model(config.model, config.seed)
    optimizer = make_optimizer(config.optimizer, config.steps)
    update = make_update(nll_sum(model.graphdef, config.memory), optimizer)
    state = jax.jit(lambda params: init_train_state(params, optimizer))(model.params)
    batches = iter(training_batches(config, model))
    seconds, tokens = [], []
    for step in range(WARM_UP + STEPS):
        start = time.perf_counter()
        micro = list(itertools.islice(batches, config.gradient_accumulation))
        state, sums = update(state, micro)
        jax.block_until_ready(sums)
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - start)
            tokens.append(useful_tokens(micro))
    step_s = statistics.median(seconds)
    return {
        "tokens_per_s": float(np.mean(tokens)) / step_s,
        "step_s": step_s,
        "rows": config.data.rows,
        "row_len": config.data.row_len,
        "useful_share": float(np.mean(tokens)) / (config.data.rows * config.data.row_len),
    }
