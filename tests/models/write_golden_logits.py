"""Writes golden/qwen3_logits.npz: `python -m tests.models.write_golden_logits` (needs torch)."""

import dataclasses
import json
import pathlib

import numpy as np

from tests.models.qwen3_reference import CASES, case_tokens, seeded_params, torch_logits

GOLDEN = pathlib.Path(__file__).parent / "golden" / "qwen3_logits.npz"


def weight_sum(params) -> float:
    """Changes if NumPy ever draws other weights from the same seed."""
    if isinstance(params, dict):
        return sum(weight_sum(child) for child in params.values())
    return float(np.abs(params, dtype=np.float64).sum())


def main():
    arrays = {}
    for name, config in CASES.items():
        params, tokens = seeded_params(config), case_tokens(config, rows=1)
        arrays[f"{name}/config"] = np.array(json.dumps(dataclasses.asdict(config)))
        arrays[f"{name}/weight_sum"] = np.array(weight_sum(params))
        arrays[f"{name}/tokens"] = tokens
        arrays[f"{name}/logits"] = torch_logits(config, params, tokens).astype(np.float32)
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
