"""An adapter alone, as the library peft stores it: its configuration and its weights.

There, matrices are `[out, in]`, so both halves are transposed. Trained rows of single tokens are
written as what they have become (peft calls them a delta, but puts them in the place of the base's
rows), trained tables as modules that were saved beside the adapter.
"""

import os
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from tw_jax.models.export_weights import new_folder, write_json
from tw_jax.models.lora import Adapter
from tw_jax.models.qwen3 import Params

_PREFIX = "base_model.model"
_MODULES = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}


def export_adapter(
    out: str | os.PathLike[str],
    trained: Params,
    adapter: Adapter,
    tokenizer: Any,
    *,
    base_name: str,
    base: Params | None,
) -> None:
    """Writes an adapter in float32, with the tokenizer.

    Args:
      out: the new folder; nothing may be there yet.
      trained: what was trained, all of it on devices of this process.
      adapter: its configuration and model.
      tokenizer: the tokenizer with its control tokens.
      base_name: where peft shall look for the base: a folder or a hub id.
      base: parameters of the base, of which embedding and head are read where rows of control
        tokens were trained; else None.

    Raises:
      UserError: `out` exists or cannot be written.
    """
    tensors = _layer_tensors(trained)
    tables = [name for name in trained if name != "layers"]
    whole = adapter.config.embeddings == "all"
    ids = list(adapter.control_ids)
    for name in tables:
        key = f"{_PREFIX}.{_MODULES[name]}"
        if whole:
            tensors[f"{key}.weight"] = _by_row(trained[name])
        else:
            assert base is not None
            rows = _by_row(base[name])[ids] + np.asarray(trained[name]["control_rows"])
            tensors[f"{key}.token_adapter.trainable_tokens_delta"] = rows
    if whole and "lm_head" not in tables:  # peft parts a saved embedding from the head tied to it
        tables.append("lm_head")
        tensors[f"{_PREFIX}.lm_head.weight"] = tensors[f"{_PREFIX}.model.embed_tokens.weight"]
    config = adapter.config
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(config.projections),
        "modules_to_save": tables if whole else None,
        "trainable_token_indices": None if whole or not tables else dict.fromkeys(tables, ids),
    }
    with new_folder(pathlib.Path(out)) as folder:
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        file = folder / "adapter_model.safetensors"
        safetensors.numpy.save_file(contiguous, file, metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", fields)
        tokenizer.save_pretrained(str(folder))


def _layer_tensors(trained: Params) -> dict[str, np.ndarray]:
    tensors = {}
    for parent, projections in trained["layers"].items():
        for projection, halves in projections.items():
            for letter in "AB":
                for layer, matrix in enumerate(np.asarray(halves[f"lora_{letter.lower()}"])):
                    module = f"{_PREFIX}.model.layers.{layer}.{parent}.{projection}"
                    tensors[f"{module}.lora_{letter}.weight"] = matrix.T
    return tensors


def _by_row(table: Params) -> np.ndarray:
    """The embedding, or the head transposed, in float32: a row for each token."""
    if "embedding" in table:
        return np.asarray(table["embedding"]).astype(np.float32)
    return np.asarray(table["kernel"]).T.astype(np.float32)
