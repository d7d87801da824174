"""Rollouts of a spread model are those of one device, in one process and in two."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.parallel.rollout_worker import CANCELLED, CASES, as_lists, engine_and_params, play
from tests.rollout.scenarios import request

REPOSITORY = pathlib.Path(__file__).parents[2]
WORKER = f"{sys.executable} -m tests.parallel.rollout_worker"
# The largest share of a layer's matrix that a device holds; routers are not split over `tensor`.
SHARES = {"fsdp_tensor": 1 / 8, "tensor": 1 / 2, "expert_tensor": 1 / 4}
LAUNCH = [str(REPOSITORY / "launch/local_multiprocess.sh"), "2", "4"]

pytestmark = pytest.mark.slow


def run(words: list[str], folder: pathlib.Path, **environ: str) -> list[dict]:
    """What each process of a run found."""
    done = subprocess.run(
        [*words, str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environ},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


def one_device(case: str) -> dict:
    engine, params = engine_and_params(case, None)
    plays = {"first": play(engine, params, 0), "second": play(engine, params, 1000)}
    plays["after"] = as_lists(engine.generate(params, [request(1)])[0])
    return json.loads(json.dumps(plays))


@pytest.fixture(scope="module")
def dense():
    return one_device("fsdp_tensor")


def check_same(found: dict, expected: dict) -> None:
    """The same rollouts, seen in the same way, from the same programs."""
    for name in ("first", "second"):
        ours, theirs = found[name], expected[name]
        assert ours["seen"] == theirs["seen"]
        assert ours["pages"] == theirs["pages"]
        for a, b in zip(ours["rollouts"], theirs["rollouts"], strict=True):
            check_rollout(a, b)
    check_rollout(found["after"], expected["after"])
    assert found["compiled"] == 0
    assert found["cache_share"] == 1 / 2


def check_rollout(ours: dict, theirs: dict) -> None:
    for field in ("tokens", "finish_reason", "units"):
        assert ours[field] == theirs[field]
    for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def check_refuses_other_meshes(found: dict) -> None:
    no_layout, too_many = found["refusals"][2:]
    assert "make the RolloutEngine with the layout of their mesh" in no_layout
    assert "2 key/value heads, which do not divide over the 8 devices" in too_many


def test_the_scenario_has_all_that_it_should(dense):
    rollouts = dense["first"]["rollouts"]
    assert rollouts[CANCELLED]["finish_reason"] == "cancelled"
    threads = [unit for rollout in rollouts for unit in rollout["units"] if unit[0] == "thread"]
    assert len(threads) > 10
    assert sum(len(live) for live in dense["first"]["seen"]) > 10
    assert dense["first"]["pages"][-1] > 0, "a prefix is kept"


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_samples_what_one_device_does(case, dense, tmp_path):
    (found,) = run([*WORKER.split(), case], tmp_path)
    check_same(found, dense if case != "expert_tensor" else one_device(case))
    assert found["weight_share"] == SHARES[case]
    assert found["copies"] == []
    late, differing = found["refusals"][:2]
    assert late == differing == ""
    check_refuses_other_meshes(found)


def test_two_processes_sample_what_one_device_does(dense, tmp_path):
    found = run([*LAUNCH, "fsdp_tensor"], tmp_path, TW_JAX=WORKER)
    assert len(found) == 2
    for process in found:
        check_same(process, dense)
        assert process["weight_share"] == SHARES["fsdp_tensor"]
        check_refuses_other_meshes(process)
        late, differing = process["refusals"][:2]
        assert "clocks of several processes" in late
        assert "different requests or cancellations" in differing
