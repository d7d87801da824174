"""From token ids to a trie: a trajectory of 40,000 tokens with 16 blocks of three threads."""

import statistics
import time
from typing import Any

import numpy as np

from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.trajectory.schemas import make_schema

TOKENS, BLOCKS, THREADS, REPEATS = 40_000, 16, 3, 20


def trajectory_ids(tokenizer: Any) -> np.ndarray:
    """Prompt, then blocks whose threads fill up to `TOKENS`."""
    body = "x" * (TOKENS // (BLOCKS * THREADS) - 40)
    outlines = "".join(f"<Outline>{i}: plan</Outline>\n" for i in range(1, THREADS + 1))
    threads = "".join(f"<Thread>\n{i}: {body}\n</Thread>" for i in range(1, THREADS + 1))
    block = f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{threads}\n</Parallel>\n"
    text = "question" + block * BLOCKS
    ids = tokenizer(text, add_special_tokens=False).input_ids
    filler = tokenizer("y", add_special_tokens=False).input_ids
    return np.array(ids + filler * (TOKENS - len(ids)), np.int32)


def run() -> dict[str, float]:
    """Median over repeats of parse + trie."""
    tokenizer = load_tokenizer()
    schema = make_schema("threadweaver", tokenizer)
    ids = trajectory_ids(tokenizer)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        trajectory = schema.parse(ids, 8)
        trie = schema.forest([trajectory])  # pyright: ignore[reportArgumentType]
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {
        "tokens": len(ids),
        "trie_tokens": len(trie),
        "blocks": len(trajectory.blocks),  # pyright: ignore[reportAttributeAccessIssue]
        "seconds": median,
        "tokens_per_s": len(ids) / median,
    }
