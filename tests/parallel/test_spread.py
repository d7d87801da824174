"""Every sharding preset on eight virtual devices: the update of one device, and its traffic."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.parallel.spread_worker import PRESETS

GOLDEN = pathlib.Path(__file__).parent / "golden_collectives.json"
BASIC = ("fsdp", "fsdp_tensor", "tensor", "expert", "context")
FURTHER = tuple(name for name in PRESETS if name not in BASIC)


def run_presets(names: tuple[str, ...]) -> dict[str, dict]:
    """What `spread_worker` found, by preset, from a process with eight devices."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.parallel.spread_worker", *names],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {entry["preset"]: entry for entry in found}


@pytest.fixture(scope="module")
def basic():
    return run_presets(BASIC)


@pytest.fixture(scope="module")
def further():
    return run_presets(FURTHER)


def check(found: dict) -> None:
    assert found["loss"][1] == pytest.approx(found["loss"][0], rel=1e-5)
    assert found["grad_norm"][1] == pytest.approx(found["grad_norm"][0], rel=1e-5)
    assert found["gradient_rel_diff"] <= 1e-5
    assert found["params_rel_diff"] <= 1e-5
    assert found["smallest_share"] <= 1 / 4  # most weights are spread, not copied
    golden = json.loads(GOLDEN.read_text())[found["preset"]]
    assert found["collectives"] == golden, (
        "the compiled update communicates differently; if that is meant, write the file anew: "
        "python -m tests.parallel.spread_worker --golden"
    )


@pytest.mark.parametrize("name", BASIC)
def test_preset_equals_one_device(basic, name):
    check(basic[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FURTHER)
def test_further_mesh_equals_one_device(further, name):
    check(further[name])


def test_only_the_axes_of_a_preset_communicate():
    golden = json.loads(GOLDEN.read_text())
    assert set(golden) == set(PRESETS)
    for name in BASIC:
        axes = {axis for key in golden[name] for axis in key.split(" ")[1].split("+")}
        assert axes == set(name.split("_")), name
