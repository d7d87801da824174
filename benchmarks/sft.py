"""SFT throughput on plain causal rows against a peer: same shape, weights, rows and optimizer.

The two run as processes that take turns, a block of steps each, on the same processor with the
same environment. Nothing is recomputed in the backward pass on either side (remat none, the
default of both), all is float32, and every row is full, so tokens per step are the same.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from benchmarks.beside_peer import ADAMW, ENVIRONMENT, beside_peer
from benchmarks.blocks import summary
from benchmarks.shapes import TINY
from tw_jax.models import init_params
from tw_jax.models.export_weights import export_model
from tw_jax.tasks.character_tokenizer import load_tokenizer

ROWS, ROW_LEN = 8, 512
WARM_UP, BLOCKS, STEPS = 4, 24, 2  # the peer compiles its step twice
OPTIMIZER = {"learning_rate": 1e-3, **ADAMW}


def prepare(folder: pathlib.Path) -> None:
    """Weights as published, token ids that are no control tokens, and settings."""
    tokenizer = load_tokenizer()
    export_model(folder / "weights", init_params(TINY, 0), TINY, tokenizer)
    rng = np.random.default_rng(0)
    shape = (WARM_UP + BLOCKS * STEPS, ROWS, ROW_LEN)
    np.save(folder / "tokens.npy", rng.integers(len(tokenizer), TINY.vocab_size, shape, np.int32))
    (folder / "shape.json").write_text(json.dumps(dataclasses.asdict(TINY)))
    (folder / "optimizer.json").write_text(json.dumps(OPTIMIZER))


def run(peer: str = "tunix") -> dict[str, Any]:
    """Medians over alternating blocks."""
    seconds, (ours, theirs) = beside_peer(
        "sft", peer, prepare, warm_up=WARM_UP, blocks=BLOCKS, steps=STEPS
    )
    our_time, their_time = map(summary, seconds)
    tokens = ROWS * ROW_LEN
    apart = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
    return {
        "ratio": their_time["median_step_s"] / our_time["median_step_s"],
        "ours_tokens_per_s": tokens / our_time["median_step_s"],
        "peer_tokens_per_s": tokens / their_time["median_step_s"],
        "loss_abs_diff": apart[0],
        "loss_abs_diff_max": max(apart),
        "losses": {"first": ours["losses"][0], "last": ours["losses"][-1]},
        "peer": peer,
        "tokens_per_step": tokens,
        "steps_each": BLOCKS * STEPS,
        "steps_per_block": STEPS,
        "ours": our_time | {"memory": ours["memory"], "versions": ours["versions"]},
        "theirs": their_time | {"remat": theirs["remat"], "versions": theirs["versions"]},
        "environment": ENVIRONMENT,
    }
