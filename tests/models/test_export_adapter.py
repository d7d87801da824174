"""Adapters on their way out: merged folders compute the same in transformers, peft's names fit."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests.models.qwen3_reference import seeded_params
from tests.models.test_export_weights import TIED, UNTIED, our_logits
from tests.small_tokenizer import bpe_tokenizer
from tw_jax.errors import UserError
from tw_jax.models.export_adapter import export_adapter
from tw_jax.models.export_weights import export_model
from tw_jax.models.lora import AdapterConfig, bind_adapter, merged

CONTROL = (7, 250)
CONFIGS = {"tied": TIED, "untied": UNTIED}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return bpe_tokenizer()


def trained_on(config: Any, **settings: Any) -> tuple[Any, Any, Any]:
    """An adapter with random values everywhere, its arrays, and the base's parameters."""
    adapter = bind_adapter(AdapterConfig(rank=4, block_size=16, **settings), config, CONTROL)
    params = jax.tree.map(jnp.asarray, seeded_params(config))
    rng = np.random.default_rng(1)
    trained = jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), adapter.init(params, 0)
    )
    return adapter, trained, params


def exported(out: pathlib.Path, tokenizer: Any, config: Any, **settings: Any) -> Any:
    adapter, trained, params = trained_on(config, **settings)
    export_adapter(out, trained, adapter, tokenizer, base_name="./base", base=params)
    tensors = safetensors.numpy.load_file(out / "adapter_model.safetensors")
    return json.loads((out / "adapter_config.json").read_text()), tensors, trained, params


@pytest.mark.parametrize("base", ["same", "nf4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same_as_the_adapted_model(
    name: str, base: str, tokenizer: Any, tmp_path: pathlib.Path
) -> None:
    torch = pytest.importorskip("torch", reason="transformers computes with torch")
    import transformers

    config = CONFIGS[name]
    adapter, trained, params = trained_on(config, base=base)
    assembled = adapter.assemble(trained, adapter.freeze(params))
    export_model(tmp_path / "out", merged(assembled), config, tokenizer)
    torch.set_num_threads(1)
    theirs, problems = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "out"), output_loading_info=True
    )
    assert not any(problems.values())
    tokens = np.array([[1, 7, 250, 12, 7, 31, 200, 5]])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    ours = our_logits(config, assembled, tokens)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_names_and_shapes_are_those_of_peft(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    """Compared with peft 0.21.2 by hand: it loads these files and computes the same logits."""
    targets = ("q_proj", "k_proj", "down_proj")
    fields, tensors, trained, params = exported(
        tmp_path / "out", tokenizer, UNTIED, targets=targets
    )
    widths = {"self_attn.q_proj": (48, 64), "self_attn.k_proj": (48, 32), "mlp.down_proj": (80, 48)}
    expected = {}
    for layer in range(2):
        for module, (inner, out) in widths.items():
            at = f"base_model.model.model.layers.{layer}.{module}"
            expected |= {f"{at}.lora_A.weight": (4, inner), f"{at}.lora_B.weight": (out, 4)}
    rows = "token_adapter.trainable_tokens_delta"
    expected[f"base_model.model.model.embed_tokens.{rows}"] = (2, 48)
    expected[f"base_model.model.lm_head.{rows}"] = (2, 48)
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"],
        trained["layers"]["mlp"]["down_proj"]["lora_a"][1].T,
    )
    np.testing.assert_array_equal(
        tensors[f"base_model.model.lm_head.{rows}"],
        params["lm_head"]["kernel"].T[list(CONTROL), :] + trained["lm_head"]["control_rows"],
    )
    assert (fields["peft_type"], fields["r"], fields["lora_alpha"]) == ("LORA", 4, 32.0)
    assert fields["target_modules"] == list(targets)
    assert fields["base_model_name_or_path"] == "./base"
    ids = list(CONTROL)
    assert fields["trainable_token_indices"] == {"embed_tokens": ids, "lm_head": ids}
    assert fields["modules_to_save"] is None
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_trained_tables_are_saved_whole(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    fields, tensors, trained, _ = exported(tmp_path / "out", tokenizer, TIED, embeddings="all")
    assert fields["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert fields["trainable_token_indices"] is None
    for name in ("model.embed_tokens", "lm_head"):
        np.testing.assert_array_equal(
            tensors[f"base_model.model.{name}.weight"], trained["embed_tokens"]["embedding"]
        )


def test_frozen_tables_are_left_out(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    fields, tensors, _, _ = exported(tmp_path / "out", tokenizer, UNTIED, embeddings="frozen")
    assert all(".lora_" in name for name in tensors)
    assert fields["modules_to_save"] is fields["trainable_token_indices"] is None
    adapter, trained, params = trained_on(UNTIED)
    with pytest.raises(UserError, match="out: is there already"):
        export_adapter(
            tmp_path / "out", trained, adapter, tokenizer, base_name="./base", base=params
        )
