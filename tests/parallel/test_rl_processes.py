"""RL in two processes does what it does in one: the same rollouts, the same updates."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.train.test_rl import SMALL, saved_start
from tw_jax.config import to_yaml
from tw_jax.train.jsonl_tracker import read_metrics
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.rollout_devices import RolloutDevicesConfig
from tw_jax.train.rollout_samples import RolloutSamplesConfig, read_samples
from tw_jax.train.run_dir import load_run
from tw_jax.train.tracker import TrackerConfig

REPOSITORY = pathlib.Path(__file__).parents[2]
TW_JAX = f"{sys.executable} -m tw_jax.cli"
BASE = dataclasses.replace(
    SMALL,
    steps=6,
    prompts=5,  # so that the processes' shares differ in size
    rows=4,
    samples=RolloutSamplesConfig(every=1, rollouts=20),
    tracker=TrackerConfig(tensorboard=False),
    optimizer=dataclasses.replace(SMALL.optimizer, eps=0.1, clip_norm=float("inf")),
)
CONFIGS = {
    "shared": BASE,
    # One device of each process samples the next step while the others train.
    "apart": dataclasses.replace(
        BASE,
        rows=2,
        overlap=True,
        refill_rounds=1,
        objective=ObjectiveConfig(ratio="ppo_clip", importance_cap=2.0, drop_zero_variance=True),
        rollout_devices=RolloutDevicesConfig(dedicated=1),
    ),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return saved_start(tmp_path_factory.mktemp("start"))


def command(config, processes, devices):
    """Words and environment of the run."""
    path = pathlib.Path(config.run_dir).with_suffix(".yaml")
    path.write_text(to_yaml(config))
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if processes > 1:
        script = str(REPOSITORY / "launch/local_multiprocess.sh")
        words = [script, str(processes), str(devices), "rl", str(path)]
        return words, environ | {"TW_JAX": TW_JAX}
    flags = f"--xla_force_host_platform_device_count={devices}"
    return [*TW_JAX.split(), "rl", str(path)], environ | {"XLA_FLAGS": flags}


def rl(config, *, processes, devices):
    words, environ = command(config, processes, devices)
    done = subprocess.run(
        words, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def rl_killed(config, step, *, processes, devices):
    """Kills all processes of a run once it has logged a step."""
    words, environ = command(config, processes, devices)
    metrics = pathlib.Path(config.run_dir) / "metrics.jsonl"
    run = subprocess.Popen(
        words,
        cwd=REPOSITORY,
        env=environ,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (metrics.exists() and len(read_metrics(metrics)) >= step):
        assert run.poll() is None, "it ended by itself"
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def texts(folder):
    return [
        (s["step"], s["problem"], s["member"], s["response"], s["reward"], s["advantage"],
         s["rollout"]["policy_version"])
        for s in read_samples(folder / "rollouts.jsonl")
    ]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_roll_out_and_train_as_one(name, start, tmp_path):
    def config(folder, **changes):
        changes |= {"run_dir": str(tmp_path / folder), "init_from": str(start)}
        return dataclasses.replace(CONFIGS[name], **changes)

    one, two, parts = (tmp_path / folder for folder in ("one", "two", "parts"))
    # Two processes of two devices; of which one each may sample only.
    devices = 4 - CONFIGS[name].rollout_devices.dedicated
    rl(config("one"), processes=1, devices=devices)
    said = rl(config("two"), processes=2, devices=2)
    assert said.count("step 6, checkpoint saved") == 1  # one of the processes speaks
    rl_killed(config("parts"), 3, processes=2, devices=2)
    rl(config("parts"), processes=2, devices=2)

    assert texts(two) == texts(one)
    rows = {run: read_metrics(run / "metrics.jsonl") for run in (one, two, parts)}
    assert [row["step"] for row in rows[two]] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(rows[two], rows[one], strict=True):
        assert ours["reward"] == theirs["reward"]
        # Same mesh, same program: gloo adds up in another order than one process does.
        for metric in ("loss", "nll", "grad_norm", "kl_start", "entropy"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5, abs=1e-6)
        age = min(ours["step"] - 1, 1) if name == "apart" else 0
        assert ours["staleness/max"] == age
        # Rollouts that are one update old were sampled by another policy.
        assert (ours["logprob_abs_diff_max"] <= 1e-4) == (age == 0)
    models = {run: load_run(run) for run in (one, two, parts, start)}
    moved = max(_distances(models[one], models[start]))
    assert moved > 1e-6
    assert max(_distances(models[two], models[one])) < 1e-3 * moved

    assert texts(parts) == texts(two)
    jax.tree.map(np.testing.assert_array_equal, models[parts].params, models[two].params)
    for ours, theirs in zip(rows[parts], rows[two], strict=True):
        for metric in ("loss", "nll", "grad_norm", "kl_start", "reward"):
            assert ours[metric] == theirs[metric]
    assert json.loads((two / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def _distances(a, b):
    return [
        float(np.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    ]
