"""Adapters on eight virtual devices: the update of one device, and a base that is spread."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.parallel.adapter_worker import CASES


@pytest.fixture(scope="module")
def found():
    run = subprocess.run(
        [sys.executable, "-m", "tests.parallel.adapter_worker"],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    entries = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {entry["case"]: entry for entry in entries}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_mesh_equals_one_device(found, name):
    entry = found[name]
    assert entry["loss"][1] == pytest.approx(entry["loss"][0], rel=1e-5)
    assert entry["gradient_rel_diff"] <= 2e-5
    assert entry["merged_rel_diff"] <= 1e-5
    assert entry["largest_share"] <= 1 / 4  # of the base's matrices
