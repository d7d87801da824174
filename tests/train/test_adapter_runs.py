"""Runs that train an adapter: what changes, resuming, the base found again, bad input."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.small_tokenizer import bpe_tokenizer
from tests.train.crash import crashed_and_restarted
from tests.train.test_import_export import publish
from tests.train.test_rl import SMALL as SMALL_RL
from tests.train.test_sft import SMALL, losses
from tw_jax import cli
from tw_jax.errors import UserError
from tw_jax.models.lora import AdapterConfig, merged
from tw_jax.train.jsonl_tracker import read_metrics
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.rl import run_rl
from tw_jax.train.run_dir import ModelConfig, load_run, new_model, open_run, save_model
from tw_jax.train.sft import run_sft

NF4 = AdapterConfig(rank=4, base="nf4", block_size=32)


def config_in(folder, **changes):
    return dataclasses.replace(SMALL, run_dir=str(folder), **({"adapter": NF4} | changes))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run_sft(config_in(folder))


def saved_arrays(folder: pathlib.Path) -> dict[str, dict]:
    """Arrays of the newest checkpoint by path, as its record lists them."""
    newest = max((folder / "checkpoints").glob("[0-9]*"))
    (record,) = newest.rglob("record/metadata") or newest.glob("record/*")
    return json.loads(record.read_text())["record"]["arrays"]


def test_the_loss_falls_and_only_the_adapter_is_trained_and_saved(uninterrupted):
    folder, result = uninterrupted
    curve = losses(folder)
    assert curve[12] < 0.8 * curve[1]
    assert np.isfinite(result.heldout_loss)
    # A, B and rows of the control tokens, each with two moments of Adam.
    layers, hidden, wide, rank = 3, 128, 256, 4
    halves = rank * layers * (2 * (hidden + 128) + 2 * (hidden + 64) + 3 * (hidden + wide))
    control = len(result.model.schema.tag_ids) * hidden
    saved = saved_arrays(folder)
    sizes = {path: int(np.prod(entry["shape"])) for path, entry in saved.items()}
    assert sum(n for path, n in sizes.items() if path.startswith("params/")) == halves + control
    assert sum(n for n in sizes.values() if n > 1) == 3 * (halves + control)
    # The base is what it was: the preset's, rounded to 4 bits.
    fresh = new_model(ModelConfig(), 0).params["layers"]["mlp"]["up_proj"]["kernel"]
    base = result.model.params["layers"]["mlp"]["up_proj"]["kernel"].base
    assert 0.01 < np.abs(base.dense() - fresh).mean() / np.abs(fresh).mean() < 0.12


def test_a_run_is_loaded_merged(uninterrupted):
    folder, result = uninterrupted
    loaded = load_run(folder)
    assert loaded.step == 12
    jax.tree.map(np.testing.assert_array_equal, loaded.params, merged(result.model.params))


def test_a_stopped_run_goes_on_bit_for_bit(uninterrupted, tmp_path):
    folder = tmp_path / "crashed"
    result = crashed_and_restarted(config_in(folder), 6)  # two steps behind the checkpoint
    whole, expected = uninterrupted
    assert losses(folder) == losses(whole)
    jax.tree.map(np.testing.assert_array_equal, result.model.params, expected.model.params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, r"adapter\.rank \(checkpoint: 4, this run: 8\)"),
        ({"base": "int8"}, r"adapter\.base \(checkpoint: nf4, this run: int8\)"),
        ({"alpha": 1.0}, r"adapter\.alpha \(checkpoint: 32\.0, this run: 1\.0\)"),
    ],
)
def test_going_on_with_another_adapter_is_refused(uninterrupted, changes, message):
    folder, _ = uninterrupted
    adapter = dataclasses.replace(NF4, **changes)
    with pytest.raises(UserError, match=message):
        run_sft(config_in(folder, steps=20, adapter=adapter))


def test_adapters_and_whole_models_do_not_go_on_from_each_other(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    with pytest.raises(UserError, match="adapter"):
        run_sft(config_in(folder, steps=20, adapter=None))


# --- the base -------------------------------------------------------------------------------------

WORDS = [
    "data.row_len=512", "data.rows=1", "data.heldout_batches=0", "data.window=4", "seed=3",
    "tracker.tensorboard=false", "optimizer.warmup_steps=0", "adapter.rank=4",
    "adapter.targets=[q_proj,v_proj,down_proj]",
]  # fmt: skip


@pytest.fixture(scope="module")
def on_published(tmp_path_factory):
    """A published folder and the run of an adapter on it."""
    folder = tmp_path_factory.mktemp("published")
    source, run = publish(folder / "base", bpe_tokenizer()), folder / "run"
    assert cli.main(["sft", f"model={source}", f"run_dir={run}", *WORDS, "steps=2"]) == 0
    return source, run


def test_a_base_that_has_changed_is_refused(on_published, tmp_path, capsys):
    source, run = on_published
    file = source / "model-00001-of-00002.safetensors"
    before = file.read_bytes()
    tensors = safetensors.numpy.load_file(file)
    name = next(name for name in tensors if "proj" in name)
    tensors[name][0, 0] += 1
    try:
        safetensors.numpy.save_file(tensors, file)
        with pytest.raises(UserError, match=r"an adapter whose base, .*base, has changed since"):
            load_run(run)
        words = ["sft", f"model={source}", f"run_dir={run}", *WORDS, "steps=3"]
        assert cli.main(words) == cli.USER_ERROR_STATUS
        message = capsys.readouterr().err
        assert "does not fit this run" in message and "adapter.base_weights (checkpoint:" in message
        file.unlink()
        with pytest.raises(UserError, match=r"holds an adapter; its base .* cannot be loaded"):
            load_run(run)
    finally:
        file.write_bytes(before)


def test_a_base_that_has_moved_is_still_the_base(on_published, tmp_path):
    source, run = (shutil.copytree(folder, tmp_path / folder.name) for folder in on_published)
    assert cli.main(["sft", f"model={source}", f"run_dir={run}", *WORDS, "steps=3"]) == 0
    assert load_run(run).step == 3
    assert open_run(run).meta["base"]["model"]["source"] == str(source)


def test_an_adapter_on_the_model_of_a_run(on_published, tmp_path):
    """The base is the checkpoint that was the newest then, itself an adapter on another base."""
    _, base = on_published
    run = tmp_path / "run"
    words = [*WORDS, "model.tokenizer=auto", "steps=1"]
    assert cli.main(["sft", f"model={base}", f"run_dir={run}", *words]) == 0
    before, after = load_run(base), load_run(run)
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(before.params),
            jax.tree.leaves(after.params),
            strict=True,
        )
        if not np.array_equal(a, b)
    }
    assert changed == {
        "embed_tokens/embedding",
        "lm_head/kernel",
        "layers/self_attn/q_proj/kernel",
        "layers/self_attn/v_proj/kernel",
        "layers/mlp/down_proj/kernel",
    }
    rows = np.any(
        np.asarray(before.params["embed_tokens"]["embedding"])
        != np.asarray(after.params["embed_tokens"]["embedding"]),
        axis=1,
    )
    assert set(np.flatnonzero(rows)) <= set(after.schema.tag_ids.tolist())


def test_exporting(on_published, tmp_path, capsys):
    """Merged, it is a model like any other; alone, it names its base."""
    source, run = on_published
    assert cli.main(["export", str(run), f"out={tmp_path / 'whole'}"]) == 0
    again = new_model(ModelConfig(str(tmp_path / "whole")), 0)
    jax.tree.map(np.testing.assert_array_equal, again.params, load_run(run).params)
    out = tmp_path / "adapter"
    assert cli.main(["export", str(run), f"out={out}", "adapter=true"]) == 0
    fields = json.loads((out / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(source)
    rows = safetensors.numpy.load_file(out / "adapter_model.safetensors")[
        "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    ]
    merged_head = np.asarray(again.params["lm_head"]["kernel"]).T
    np.testing.assert_allclose(rows, merged_head[again.schema.tag_ids], rtol=1e-6)
    assert cli.main(["import", str(source), f"run_dir={tmp_path / 'run'}"]) == 0
    words = ["export", str(tmp_path / "run"), f"out={tmp_path / 'none'}", "adapter=true"]
    assert cli.main(words) == cli.USER_ERROR_STATUS
    assert "trained the whole model, no adapter" in capsys.readouterr().err


# --- reinforcement learning -----------------------------------------------------------------------


@pytest.mark.slow
def test_rl_samples_with_the_adapter_that_it_trains(tmp_path):
    start = tmp_path / "start"
    model = new_model(ModelConfig(), 0)
    save_model(start, model, model.params)
    config = dataclasses.replace(
        SMALL_RL,
        init_from=str(start),
        run_dir=str(tmp_path / "whole"),
        adapter=NF4,
        objective=ObjectiveConfig(kl_coefficient=0.1),
    )
    whole = run_rl(config)
    assert whole.max_logprob_abs_diff <= 1e-4
    rows = read_metrics(tmp_path / "whole/metrics.jsonl")
    assert all(np.isfinite(row["loss"]) for row in rows)
    loaded = load_run(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, merged(whole.model.params))
    assert not np.array_equal(
        loaded.params["layers"]["mlp"]["up_proj"]["kernel"],
        model.params["layers"]["mlp"]["up_proj"]["kernel"],
    )
    # Two steps and then one more are three steps.
    run_rl(dataclasses.replace(config, run_dir=str(tmp_path / "parts"), steps=2))
    parts = run_rl(dataclasses.replace(config, run_dir=str(tmp_path / "parts")))
    jax.tree.map(np.testing.assert_array_equal, parts.model.params, whole.model.params)
