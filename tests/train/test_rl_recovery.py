"""A run that is killed, at any moment and as often as you like, ends as one that never was."""

import dataclasses
import json
import os
import pathlib
import random
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
from tw_jax.train.pending_rollouts import FOLDER
from tw_jax.train.rollout_samples import read_samples
from tw_jax.train.run_dir import load_run
from tw_jax.train.tracker import TrackerConfig

pytestmark = pytest.mark.slow

STEPS = 80
CONFIGS = {
    "in_turn": dataclasses.replace(SMALL, steps=STEPS, checkpoint_every=7),
    "overlapping": dataclasses.replace(
        SMALL,
        steps=STEPS,
        checkpoint_every=7,
        overlap=True,
        objective=ObjectiveConfig(ratio="ppo_clip", importance_cap=2.0, drop_zero_variance=True),
        refill_rounds=1,
    ),
}
KILLS = {"in_turn": 10, "overlapping": 5}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return saved_start(tmp_path_factory.mktemp("start"))


def begin(name, start, folder):
    """Starts the command in a process of its own."""
    config = dataclasses.replace(
        CONFIGS[name],
        run_dir=str(folder),
        init_from=str(start),
        tracker=TrackerConfig(tensorboard=False),
    )
    path = folder.with_suffix(".yaml")
    path.write_text(to_yaml(config))
    return subprocess.Popen(
        [sys.executable, "-m", "tw_jax.cli", "rl", str(path)],
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]
    return said


def last_step(folder):
    metrics = folder / "metrics.jsonl"
    return max((row["step"] for row in read_metrics(metrics)), default=0) if metrics.exists() else 0


def wait_for_step(process, folder, step):
    """Returns when the run has sampled something and logged that step, or ended."""
    while process.poll() is None:
        # The run removes the folders of finished steps meanwhile; `os.walk` passes over them.
        sampled = any(files for _, _, files in os.walk(folder / FOLDER))
        if sampled and last_step(folder) >= step:
            return
        time.sleep(0.02)


def check_same(folder, whole):
    rows, expected = (
        [
            {k: v for k, v in row.items() if not k.startswith("time") and not k.endswith("_per_s")}
            for row in read_metrics(run / "metrics.jsonl")
        ]
        for run in (folder, whole)
    )
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            if name.startswith("logprob_"):
                # What the sampler recorded depends in its last bits on what else was sampled.
                assert row[name] == pytest.approx(other[name], abs=1e-5)
            else:
                assert row[name] == other[name], (row["step"], name)
    samples, expected = (
        [json.dumps(_without_places(s)) for s in read_samples(run / "rollouts.jsonl")]
        for run in (folder, whole)
    )
    assert samples == expected
    ours, theirs = load_run(folder), load_run(whole)
    assert ours.step == theirs.step == STEPS
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert not [p for p in (folder / FOLDER).iterdir() if p.name.isdigit()]


def _without_places(sample):
    """Rows and engine steps tell how a rollout was scheduled, and half a step is otherwise."""
    units = [
        {k: v for k, v in unit.items() if k not in ("row", "start_step", "end_step", "logprobs")}
        for unit in sample["rollout"]["units"]
    ]
    return {**sample, "rollout": {**sample["rollout"], "units": units}}


@pytest.mark.parametrize("name", CONFIGS)
def test_kill_9_at_random_moments_changes_nothing(name, start, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    finish(begin(name, start, whole))
    moments, kills, reached = random.Random(name), 0, 0
    while kills < KILLS[name]:
        process = begin(name, start, folder)
        # Up to five steps on, and anywhere within one: a step takes about a quarter of a second.
        wait_for_step(process, folder, reached + moments.randint(0, 5))
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        said, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, said[-3000:]
        kills, reached = kills + 1, max(reached, last_step(folder))
    assert 10 < reached < STEPS
    finish(begin(name, start, folder))
    check_same(folder, whole)


@pytest.mark.parametrize("name", CONFIGS)
def test_sigterm_ends_within_seconds_and_loses_nothing(name, start, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    finish(begin(name, start, whole))
    for step in (1, 20):
        process = begin(name, start, folder)
        wait_for_step(process, folder, step)
        process.send_signal(signal.SIGTERM)
        began_s = time.monotonic()
        said = finish(process)
        assert time.monotonic() - began_s < 30
        assert "Stopped at step" in said, said
    finish(begin(name, start, folder))
    check_same(folder, whole)
