"""Two processes of four virtual devices each do what one process with eight, or one, does."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.parallel.export_worker import MAX_SHARD_BYTES, MODELS
from tw_jax.models import init_params
from tw_jax.models.export_weights import export_model
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.train.import_export import ExportConfig, run_export
from tw_jax.train.run_dir import load_run

REPOSITORY = pathlib.Path(__file__).parents[2]
TW_JAX = f"{sys.executable} -m tw_jax.cli"
LAUNCH = [str(REPOSITORY / "launch/local_multiprocess.sh"), "2", "4"]
SETTINGS = [
    "sft",
    "seed=5",
    "gradient_accumulation=2",
    "data.rows=8",
    "data.row_len=320",
    "data.window=32",
    "data.heldout_batches=1",
    "eval_every=2",
    "log_every=1",
    "tracker.tensorboard=false",
    "optimizer.warmup_steps=1",
    "optimizer.schedule=constant",
]

pytestmark = pytest.mark.slow


def run(words: list[str], **environ: str) -> str:
    """Runs a command from the repository and returns what it printed."""
    done = subprocess.run(
        words,
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environ},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def sft(run_dir: pathlib.Path, steps: int, *, processes: int, devices: int) -> dict[int, dict]:
    """Trains and returns the metrics by step."""
    words = [*SETTINGS, f"run_dir={run_dir}", f"steps={steps}", f"checkpoint_every={steps}"]
    if processes > 1:
        script = [str(REPOSITORY / "launch/local_multiprocess.sh"), str(processes), str(devices)]
        run([*script, *words], TW_JAX=TW_JAX)
    else:
        flags = f"--xla_force_host_platform_device_count={devices}"
        run([*TW_JAX.split(), *words], XLA_FLAGS=flags)
    found: dict[int, dict] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["step"], {}).update(entry)
    return found


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_processes_train_save_and_go_on_as_one(tmp_path):
    one = sft(tmp_path / "one", 4, processes=1, devices=1)
    eight = sft(tmp_path / "eight", 4, processes=1, devices=8)
    two = sft(tmp_path / "two", 2, processes=2, devices=4)

    # Same mesh, same program: gloo adds up in another order than one process does.
    for step in (1, 2):
        for key in ("loss", "grad_norm"):
            assert two[step][key] == pytest.approx(eight[step][key], rel=1e-6)
            assert eight[step][key] == pytest.approx(one[step][key], rel=1e-5)
    assert two[2]["heldout_loss"] == pytest.approx(eight[2]["heldout_loss"], rel=1e-6)

    # What two processes saved goes on in one process, on one device.
    went_on = sft(tmp_path / "two", 4, processes=1, devices=1)
    assert sorted(went_on) == [1, 2, 3, 4]
    for step in (3, 4):
        assert went_on[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-5)

    model = load_run(tmp_path / "two", 2)
    run_export(ExportConfig(run_dir=str(tmp_path / "two"), out=str(tmp_path / "exported")))
    assert (tmp_path / "exported" / "model.safetensors").exists()
    words = ["export", str(tmp_path / "two"), f"out={tmp_path / 'exported_by_two'}"]
    run([*LAUNCH, *words], TW_JAX=TW_JAX)
    assert contents(tmp_path / "exported_by_two") == contents(tmp_path / "exported")
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in [model.params["norm"]["scale"]])


def test_two_processes_export_as_one(tmp_path):
    worker = f"{sys.executable} -m tests.parallel.export_worker"
    run([*LAUNCH, str(tmp_path)], TW_JAX=worker)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(MODELS)
    for name, (config, _) in MODELS.items():
        files = export_model(
            tmp_path / "one",
            init_params(config, 0),
            config,
            load_tokenizer(),
            max_shard_bytes=MAX_SHARD_BYTES,
        )
        assert len(files) > 2
        assert contents(tmp_path / name) == contents(tmp_path / "one")
        shutil.rmtree(tmp_path / "one")


def test_a_failing_process_ends_the_run(tmp_path):
    words = [*LAUNCH, *SETTINGS, f"run_dir={tmp_path}", "steps=2", "data.row_len=1"]
    done = subprocess.run(
        words,
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TW_JAX": TW_JAX},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "row_len=1" in done.stderr
