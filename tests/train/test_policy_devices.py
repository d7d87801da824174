"""An RL update on eight virtual devices is that of one device, with every sum that is logged."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.train.policy_devices_worker import MESHES


@pytest.fixture(scope="module")
def found():
    run = subprocess.run(
        [sys.executable, "-m", "tests.train.policy_devices_worker"],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {entry["mesh"]: entry for entry in lines}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_gradient_and_sums_of_one_device(found, mesh):
    assert found[mesh]["gradient_rel_diff"] <= 1e-5
    sums = found[mesh]["sums"]
    for name in (
        "clipped_low",
        "clipped_high",
        "clipped_dual",
        "importance_capped",
        "entropy/tags",
    ):
        assert sums[name][0] > 0, "the test would show nothing"
    for name, (one, many) in sums.items():
        assert many == pytest.approx(one, rel=2e-5, abs=1e-4), name
