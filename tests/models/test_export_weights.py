"""Exported folders load elsewhere and compute the same; the bits survive the way there and back."""

import dataclasses
import errno
import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from tests.models.published import EXPERTS, named_tensors, random_params
from tests.models.qwen3_reference import SMALL, seeded_params
from tests.small_tokenizer import bpe_tokenizer
from tw_jax.errors import UserError
from tw_jax.models import Params, Qwen3Config, graphdef
from tw_jax.models.export_weights import export_model
from tw_jax.models.hf_config import config_from_hf, config_to_hf
from tw_jax.models.import_weights import load_params
from tw_jax.models.safetensors_file import read_json
from tw_jax.models.weight_location import open_folder
from tw_jax.trajectory.vocabulary import add_control_tokens

TIED = dataclasses.replace(SMALL, vocab_size=320)
UNTIED = dataclasses.replace(TIED, tie_word_embeddings=False, rope_theta=1e6)
CONFIGS = {
    "tied": TIED,
    "untied": UNTIED,
    "experts": dataclasses.replace(EXPERTS, vocab_size=320),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return bpe_tokenizer()


def on_device(params: Any, dtype: str = "float32") -> Params:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def our_logits(config: Qwen3Config, params: Params, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits `[rows, len, vocab]` of causal rows."""
    return np.asarray(_logits(config, params, jnp.asarray(tokens)))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: Qwen3Config, params: Params, tokens: Any) -> Any:
    def causal(q, k, v, layer, carry):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True), carry

    model = nnx.merge(graphdef(config), params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model.hidden_states(tokens, positions, causal)
    return model.logits(hidden)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same(name: str, tokenizer: Any, tmp_path: pathlib.Path) -> None:
    """Same logits for a text, and the same greedy continuation."""
    torch = pytest.importorskip("torch", reason="transformers computes with torch")
    import transformers

    config, params = CONFIGS[name], on_device(random_params(CONFIGS[name]))
    export_model(tmp_path / "out", params, config, tokenizer, max_shard_bytes=60_000)
    torch.set_num_threads(1)
    theirs, problems = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "out"), output_loading_info=True
    )
    assert not any(problems.values())
    assert theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    text = "Parallel threads think"
    tokens = their_tokenizer(text, return_tensors="np").input_ids
    assert tokens.tolist() == [tokenizer(text).input_ids]

    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(our_logits(config, params, tokens), expected, rtol=0, atol=1e-5)

    generated = theirs.generate(torch.tensor(tokens), do_sample=False, max_new_tokens=16)[0]
    ours = np.zeros((1, len(generated)), tokens.dtype)  # causal: what is behind does not matter
    ours[:, : tokens.shape[1]] = tokens
    for at in range(tokens.shape[1], len(generated)):
        ours[0, at] = our_logits(config, params, ours)[0, at - 1].argmax()
    assert their_tokenizer.decode(ours[0]) == their_tokenizer.decode(generated)
    assert ours[0].tolist() == generated.tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes_is_read(name: str, tmp_path: pathlib.Path) -> None:
    """The other direction: its own folder, loaded here, computes what it computed there."""
    torch = pytest.importorskip("torch", reason="transformers computes with torch")
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    fields = config_to_hf(CONFIGS[name])
    settings = transformers.AutoConfig.for_model(**fields)
    theirs = transformers.AutoModelForCausalLM.from_config(settings).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"), max_shard_size="50KB")
    folder = open_folder(str(tmp_path / "theirs"))
    config = config_from_hf(
        read_json(folder, "config.json"),
        origin="config.json",
        param_dtype="float32",
        compute_dtype="float32",
    )
    assert config == CONFIGS[name]
    tokens = np.random.default_rng(0).integers(0, 320, (2, 24))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    found = our_logits(config, load_params(folder, config), tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["untied", "experts"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back_no_bit_changes(
    name: str, param_dtype: str, tokenizer: Any, tmp_path: pathlib.Path
) -> None:
    config = dataclasses.replace(CONFIGS[name], param_dtype=param_dtype)
    params = on_device(random_params(config), param_dtype)
    first, second = tmp_path / "first", tmp_path / "second"
    export_model(first, params, config, tokenizer)
    again = load_params(str(first), config)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    export_model(second, again, config, tokenizer)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_the_safetensors_library_reads_what_was_written(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
    params = seeded_params(UNTIED)
    files = export_model(
        tmp_path / "out", on_device(params), UNTIED, tokenizer, max_shard_bytes=50_000
    )
    assert len(files) > 3
    found, index = {}, json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for file in files:
        tensors = safetensors.numpy.load_file(tmp_path / "out" / file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 50_000 or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {file}
        found |= tensors
    expected = named_tensors(params)
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def test_the_dtype_can_be_chosen(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    params = on_device(seeded_params(TIED))
    export_model(tmp_path / "out", params, TIED, tokenizer, dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = load_params(str(tmp_path / "out"), dataclasses.replace(TIED, param_dtype="bfloat16"))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), loaded, params
    )


def test_the_tokenizer_is_written_in_words_that_transformers_4_knows(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
    """Checked against 4.57.6 by hand: with version 5's own words it refuses the folder."""
    import transformers

    tags = ["<Parallel>", "</Parallel>"]
    tokenizer, _ = add_control_tokens(tokenizer, tags)
    export_model(tmp_path / "out", on_device(seeded_params(TIED)), TIED, tokenizer)
    fields = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert fields["additional_special_tokens"] == tags
    assert "extra_special_tokens" not in fields
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers_version"] == transformers.__version__
    again = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.extra_special_tokens == tokenizer.extra_special_tokens
    assert again.special_tokens_map == tokenizer.special_tokens_map


def test_settings_of_generation_are_kept(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    params = on_device(seeded_params(TIED))
    given = {"temperature": 0.6, "eos_token_id": [2, 0]}
    export_model(tmp_path / "out", params, TIED, tokenizer, generation_config=given)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"pad_token_id": tokenizer.pad_token_id, **given}


# --- all or nothing -------------------------------------------------------------------------------


def test_nothing_stays_of_an_export_that_fails(
    tokenizer: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: Any, at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match="out: cannot write .*No space left"):
            export_model(tmp_path / "out", on_device(seeded_params(TIED)), TIED, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_is_replaced(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model-00009-of-00009.safetensors").write_bytes(b"torn")
    (tmp_path / "out").mkdir()  # empty: as good as absent
    export_model(tmp_path / "out", on_device(seeded_params(TIED)), TIED, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob("*00009*"))


def test_nothing_is_overwritten(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="out: is there already; remove it or export to another"):
        export_model(tmp_path / "out", on_device(seeded_params(TIED)), TIED, tokenizer)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_tokenizer_that_is_too_large_is_refused(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(TIED, vocab_size=len(tokenizer) - 1)
    message = f"has {len(tokenizer)} tokens but the model only {len(tokenizer) - 1} rows"
    with pytest.raises(UserError, match=message):
        export_model(tmp_path / "out", on_device(seeded_params(config)), config, tokenizer)
    assert list(tmp_path.iterdir()) == []
