"""A whole GRPO step against a peer: sampling, rewards, reference, gradient, optimizer.

Same weights, prompts, reward and optimizer; 4 prompts of 32 tokens, 8 rollouts of 128 new tokens
each at temperature 1, sequential. Both objectives are on-policy GRPO: advantages divided by the
group's standard deviation, mean over rollouts of token means, 0.04 times the k3 estimate of the KL
to the start. The sides run as processes that take turns, warm; all is float32, nothing is
recomputed in the backward pass. No rollout ends early. They draw other random numbers, so texts
differ; steps cost the same whatever is sampled.

`ratio` is that of the medians: above 1, ours is faster. `cpu_ratio` is the same of the processor's
time, which whatever else the machine does hardly changes.
"""

import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.beside_peer import ADAMW, ENVIRONMENT, beside_peer
from benchmarks.blocks import summary
from benchmarks.shapes import TINY
from tw_jax.models import init_params
from tw_jax.models.export_weights import export_model
from tw_jax.tasks.character_tokenizer import load_tokenizer

PROMPTS, GROUP_SIZE, PROMPT_LEN, NEW_TOKENS = 4, 8, 32, 128
KL_COEFFICIENT = 0.04
WARM_UP, BLOCKS, STEPS = 4, 12, 1
OPTIMIZER = {"learning_rate": 1e-5, **ADAMW}


def prepare(folder: pathlib.Path) -> None:
    """Weights as published, prompts that begin with <bos> and hold no control tokens, settings."""
    tokenizer = load_tokenizer()
    export_model(folder / "weights", init_params(TINY, 0), TINY, tokenizer)
    shape = (WARM_UP + BLOCKS * STEPS, PROMPTS, PROMPT_LEN)
    prompts = np.random.default_rng(1).integers(len(tokenizer), TINY.vocab_size, shape)
    prompts[:, :, 0] = tokenizer.bos_token_id
    asked = {
        "shape": dataclasses.asdict(TINY),
        "prompts": prompts.tolist(),
        "group_size": GROUP_SIZE,
        "new_tokens": NEW_TOKENS,
        "kl_coefficient": KL_COEFFICIENT,
        "optimizer": OPTIMIZER,
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
    }
    (folder / "workload.json").write_text(json.dumps(asked))


def run(peer: str = "tunix") -> dict[str, Any]:
    """Medians over alternating blocks of one step each."""
    seconds, (ours, theirs) = beside_peer(
        "rl", peer, prepare, warm_up=WARM_UP, blocks=BLOCKS, steps=STEPS
    )
    our_time, their_time = map(summary, seconds)
    expected = PROMPTS * GROUP_SIZE * NEW_TOKENS
    for side in (ours, theirs):
        short = [count for count in side["sampled_tokens"] if count != expected]
        assert not short, f"steps must sample {expected} tokens: {short}"
    return {
        "ratio": their_time["median_step_s"] / our_time["median_step_s"],
        "cpu_ratio": _median_cpu_s(theirs) / _median_cpu_s(ours),
        "ours_cpu_step_s": _median_cpu_s(ours),
        "peer_cpu_step_s": _median_cpu_s(theirs),
        "ours_step_s": our_time["median_step_s"],
        "peer_step_s": their_time["median_step_s"],
        "ours_tokens_per_s": expected / our_time["median_step_s"],
        "peer_tokens_per_s": expected / their_time["median_step_s"],
        "peer": peer,
        "tokens_per_step": expected,
        "ours": our_time
        | {k: ours[k] for k in ("time_split_s", "logprob_abs_diff_max", "versions")},
        "theirs": their_time | {"versions": theirs["versions"]},
        "environment": ENVIRONMENT,
        "cores": os.cpu_count(),
    }


def _median_cpu_s(end: Mapping[str, Any]) -> float:
    """Processor seconds per step, over all blocks but the first, which is the warm-up."""
    return statistics.median(end["cpu_s"][1:])
