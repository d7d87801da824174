"""Worker of `python -m benchmarks rollout`: tunix's Sampler, batch after batch.

Runs in the environment `benchmarks/peers/tunix`, from the repository, with the folder that
`benchmarks.rollout` prepared, in the dtype that the second word names. The cache is exactly as long
as the longest text, and prompts have a power of two as their length, to which the sampler pads
them: both are the best case for it.
"""

import importlib.metadata
import json
import pathlib
import sys
import time

from tunix.generate.sampler import CacheConfig, Sampler

from benchmarks.blocks import answer, asked_blocks
from benchmarks.peers.tunix_model import load_model


class NumberTokenizer:
    """Text is token ids, written as numbers; the sampler puts the first token in front."""

    def __init__(self, bos_id: int, eos_id: int, pad_id: int):
        self._bos_id, self._eos_id, self._pad_id = bos_id, eos_id, pad_id

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return self._bos_id

    def eos_id(self) -> int:
        return self._eos_id

    def pad_id(self) -> int:
        return self._pad_id


def main(folder: pathlib.Path, dtype: str) -> None:
    """Runs the workload as often as asked on standard input."""
    workload = json.loads((folder / "workload.json").read_text())
    shape = workload["shape"]
    model = load_model(folder / "weights", shape, dtype)
    tokenizer = NumberTokenizer(workload["bos_id"], workload["eos_id"], workload["pad_id"])
    cache = CacheConfig(
        cache_size=workload["context_len"],
        num_layers=shape["num_hidden_layers"],
        num_kv_heads=shape["num_key_value_heads"],
        head_dim=shape["head_dim"],
    )
    sampler = Sampler(model, tokenizer, cache)
    texts = [tokenizer.decode(prompt[1:]) for prompt in workload["prompts"]]
    new_tokens, size = workload["new_tokens"], workload["batch"]
    tokens = []
    for count in asked_blocks():
        start = time.perf_counter()
        for _ in range(count):
            tokens = []
            for at in range(0, len(texts), size):
                asked = new_tokens[at : at + size]
                out = sampler(texts[at : at + size], max_generation_steps=max(asked))
                rows = zip(out.tokens, asked, strict=True)
                tokens += [row[:n].tolist() for row, n in rows]
        answer(seconds=time.perf_counter() - start)
    names = ("google-tunix", "jax", "flax")
    answer(tokens=tokens, versions={name: importlib.metadata.version(name) for name in names})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
