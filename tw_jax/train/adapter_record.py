"""What the checkpoint of an adapter says of its base, so that nothing else is ever put under it."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any

from tw_jax.errors import UserError
from tw_jax.models.config import Qwen3Config
from tw_jax.models.lora import Adapter, AdapterConfig
from tw_jax.models.qwen3 import Params
from tw_jax.train.checkpoint_record import describe_arrays, flatten_by_path

ADAPTER = "adapter"  # settings that a run must share with its checkpoint
BASE = "base"  # where the base was found; it may have moved since
_WEIGHTS = "base_weights"


def adapter_meta(adapter: Adapter, params: Params) -> dict[str, Any]:
    """The adapter's settings and the fingerprint of the model that it was trained on."""
    return {
        **dataclasses.asdict(adapter.config),
        "control_ids": list(adapter.control_ids),
        _WEIGHTS: weights_fingerprint(params),
    }


def adapter_of(meta: Mapping[str, Any], model: Qwen3Config) -> Adapter | None:
    """The adapter that a checkpoint holds; None where it holds a whole model.

    Raises:
      UserError: another version of this library wrote it.
    """
    if meta.get(ADAPTER) is None:
        return None
    settings = {**meta[ADAPTER]}
    control_ids = tuple(settings.pop("control_ids"))
    del settings[_WEIGHTS]
    settings["targets"] = tuple(settings["targets"])
    try:
        return Adapter(AdapterConfig(**settings), model, control_ids)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the checkpoint's adapter cannot be read ({error}): another version of tw_jax wrote it"
        ) from error


def check_base(meta: Mapping[str, Any], params: Params, run: str, source: str) -> None:
    """Refuses a base that is not the one the adapter was trained on.

    Args:
      meta: of the adapter's checkpoint.
      params: the model that is to be its base.
      run: the adapter's run, for the message.
      source: where the base came from, for the message.

    Raises:
      UserError: the weights differ.
    """
    found, expected = weights_fingerprint(params), meta[ADAPTER][_WEIGHTS]
    if found != expected:
        raise UserError(
            f"{run} holds an adapter whose base, {source}, has changed since (fingerprint {found}, "
            f"trained on {expected}): put the former weights back there"
        )


def weights_fingerprint(params: Params) -> str:
    """Eight hexadecimal digits that depend on every bit of the layers, wherever they lie.

    Embedding and head are left out: rows that were added to them are means over other rows, whose
    rounding depends on how many devices share the sum.
    """
    layers = {name: params[name] for name in ("layers", "norm")}
    entries = describe_arrays(flatten_by_path(layers))
    record = {path: dataclasses.astuple(entry) for path, entry in entries.items()}
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"
