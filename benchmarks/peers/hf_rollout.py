"""Worker of `python -m benchmarks rollout`: `generate` of transformers on torch, one thread.

Runs with the folder that `benchmarks.rollout` prepared, in the dtype that the second word names.
"""

import importlib.metadata
import json
import pathlib
import sys
import time

import torch
from transformers import Qwen3ForCausalLM

from benchmarks.blocks import answer, asked_blocks


def main(folder: pathlib.Path, dtype: torch.dtype) -> None:
    """Runs the workload as often as asked on standard input."""
    torch.set_num_threads(1)
    workload = json.loads((folder / "workload.json").read_text())
    model = Qwen3ForCausalLM.from_pretrained(folder / "weights", dtype=dtype).eval()
    prompts, new_tokens = torch.tensor(workload["prompts"]), workload["new_tokens"]
    size, tokens = workload["batch"], []
    for count in asked_blocks():
        start = time.perf_counter()
        for _ in range(count):
            tokens = []
            for at in range(0, len(prompts), size):
                asked, batch = new_tokens[at : at + size], prompts[at : at + size]
                out = model.generate(
                    batch,
                    attention_mask=torch.ones_like(batch),
                    max_new_tokens=max(asked),
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=workload["pad_id"],
                )
                rows = zip(out[:, batch.shape[1] :], asked, strict=True)
                tokens += [row[:n].tolist() for row, n in rows]
        answer(seconds=time.perf_counter() - start)
    names = ("torch", "transformers")
    answer(tokens=tokens, versions={name: importlib.metadata.version(name) for name in names})


if __name__ == "__main__":
    with torch.inference_mode():
        main(pathlib.Path(sys.argv[1]), getattr(torch, sys.argv[2]))
