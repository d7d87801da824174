"""The SFT loop on the real model: learning, resuming, files, bad input."""

import dataclasses
import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.random_trajectories import BLOCKS
from tests.train.crash import crashed_and_restarted
from tests.train.live_copies import copies_counter
from tw_jax.config import to_yaml
from tw_jax.data.export_task import export_task
from tw_jax.errors import UserError
from tw_jax.tasks.registry import TaskConfig, make_task
from tw_jax.train.jsonl_tracker import read_metrics
from tw_jax.train.run_dir import load_run
from tw_jax.train.sft import SFTConfig, SFTDataConfig, run_sft

SMALL = SFTConfig(
    steps=12,
    data=SFTDataConfig(row_len=512, rows=1, window=8, heldout_batches=1),
    log_every=1,
    eval_every=6,
    checkpoint_every=4,
    optimizer=dataclasses.replace(SFTConfig().optimizer, warmup_steps=2),
)


def config_in(folder, **changes):
    return dataclasses.replace(SMALL, run_dir=str(folder), **changes)


def losses(folder):
    return {
        row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run_sft(config_in(folder))


def test_the_loss_falls_and_the_run_folder_is_complete(uninterrupted):
    folder, result = uninterrupted
    curve = losses(folder)
    assert curve[12] < 0.8 * curve[1]
    assert np.isfinite(result.heldout_loss)
    assert {p.name for p in folder.iterdir()} >= {
        "config.yaml", "tokenizer", "checkpoints", "metrics.jsonl", "tensorboard",
    }  # fmt: skip
    loaded = load_run(folder)
    assert loaded.step == 12
    jax.tree.map(np.testing.assert_array_equal, loaded.params, result.model.params)


def test_parameters_and_moments_are_all_that_is_in_memory(tmp_path):
    found, copies = [], copies_counter()
    run_sft(config_in(tmp_path, steps=3), [(1, lambda step, params: found.append(copies(params)))])
    assert found[:2] == pytest.approx([3, 3], abs=0.2)  # at the end a checkpoint is on its way


def test_a_run_stopped_by_a_hook_and_restarted_continues_bit_for_bit(uninterrupted, tmp_path):
    folder = tmp_path / "crashed"
    result = crashed_and_restarted(config_in(folder), 6)  # two steps behind the checkpoint
    whole, expected = uninterrupted
    assert losses(folder) == losses(whole)
    jax.tree.map(np.testing.assert_array_equal, result.model.params, expected.model.params)


def test_gradient_accumulation_equals_one_larger_batch(tmp_path):
    data = dataclasses.replace(SMALL.data, rows=2)
    one = run_sft(config_in(tmp_path / "one", steps=3, data=data))
    two = run_sft(config_in(tmp_path / "two", steps=3, gradient_accumulation=2))
    a, b = (losses(tmp_path / name) for name in ("one", "two"))
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    for x, y in zip(
        jax.tree.leaves(one.model.params), jax.tree.leaves(two.model.params), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_training_on_files(tmp_path):
    path = tmp_path / "data.jsonl"
    export_task(make_task(TaskConfig()), "train", 40, 0, 0.5, path)
    with path.open("a") as file:
        file.write("{broken\n")
    data = dataclasses.replace(
        SMALL.data, files=(str(path),), heldout_files=(str(path),), epochs=None
    )
    result = run_sft(config_in(tmp_path / "run", steps=3, data=data))
    assert np.isfinite(result.heldout_loss)
    rejects = [json.loads(line) for line in (tmp_path / "run/rejects.jsonl").open()]
    assert [reject["kind"] for reject in rejects] == ["malformed_json"]


def test_rows_too_short_for_the_task_are_refused(tmp_path):
    data = dataclasses.replace(SMALL.data, row_len=256)
    with pytest.raises(UserError, match=r"row_len=256 is too short: .* 285 tokens"):
        run_sft(config_in(tmp_path / "run", data=data))


def test_a_checkpoint_of_another_model_is_refused(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    with pytest.raises(UserError, match="seed"):
        run_sft(config_in(folder, seed=5))


def test_resuming_with_other_data_is_refused_and_keeps_the_old_configuration(uninterrupted):
    folder, _ = uninterrupted
    before = (folder / "config.yaml").read_text()
    with pytest.raises(UserError, match="parallel_share"):
        data = dataclasses.replace(SMALL.data, parallel_share=0.25)
        run_sft(config_in(folder, steps=20, data=data))
    assert (folder / "config.yaml").read_text() == before


def test_running_out_of_data_is_said(tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    export_task(make_task(TaskConfig()), "train", 4, 0, 1.0, path)
    data = dataclasses.replace(SMALL.data, files=(str(path),), epochs=1)
    assert run_sft(config_in(tmp_path / "run", data=data)).model.step < 12
    assert "The data ended after" in capsys.readouterr().out


@pytest.mark.parametrize(
    "field", ["steps", "gradient_accumulation", "log_every", "eval_every", "checkpoint_every"]
)
def test_counts_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field}=0: must be at least 1"):
        dataclasses.replace(SMALL, **{field: 0})


def test_data_settings_are_checked():
    for field, value in (("window", 0), ("rows", 0), ("parallel_share", 2.0)):
        with pytest.raises(ValueError, match=field):
            dataclasses.replace(SMALL.data, **{field: value})


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly_and_the_same_command_goes_on(tmp_path):
    folder = tmp_path / "run"
    config = config_in(folder, steps=4000, checkpoint_every=4000)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "tw_jax.cli", "sft", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Run the same command again" in output
    step = load_run(folder).step
    assert 3 <= step < 4000


@pytest.mark.parametrize("name", ["native", "apr"])
def test_every_schema_trains_from_files(tmp_path, name):
    file = tmp_path / "data.jsonl"
    blocks = [BLOCKS[name]((("a", f"x+{i}"), ("b", f"y+{2 * i}"))) for i in range(40)]
    lines = [
        json.dumps({"prompt": f"{i}=", "response": f"q{block}z#{i}"})
        for i, block in enumerate(blocks)
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = dataclasses.replace(SMALL.data, files=(str(file),), heldout_files=(str(file),), window=4)
    model = dataclasses.replace(SMALL.model, schema=name)
    result = run_sft(config_in(tmp_path / "run", steps=8, data=data, model=model))
    curve = losses(tmp_path / "run")
    assert curve[8] < 0.9 * curve[1]
    assert np.isfinite(result.heldout_loss)
    assert load_run(tmp_path / "run").schema.name == name
