"""The peak of host memory while a checkpoint of more than a gigabyte is read and written.

Peak means the kernel's VmHWM (reset through /proc/self/clear_refs just before): all resident
memory, anonymous and file-backed. Nothing is left out: weights are mapped a few megabytes at a
time, so the page cache hardly counts even though it is included.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from benchmarks.checkpoint_io import CONFIG, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs /proc"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """1.2 GB, deleted afterwards."""
    folder = tmp_path_factory.mktemp("checkpoint")
    file = write_checkpoint(folder, CONFIG)
    assert file.stat().st_size > 1e9
    yield folder
    shutil.rmtree(folder)


def run_json(*words: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_and_export_on_one_device(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    try:
        words = ("-m", "benchmarks.checkpoint_io", str(checkpoint), str(tmp_path / "out"))
        assert run_json(*words)["memory_ratio"] < 1.3
        # The order of tensors differs, their bytes do not.
        assert (
            abs(
                (tmp_path / "out" / "model.safetensors").stat().st_size
                - (checkpoint / "model.safetensors").stat().st_size
            )
            < 1e5
        )
    finally:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


SCRIPT = """
import dataclasses, json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import NamedSharding, PartitionSpec as P
from benchmarks.checkpoint_io import CONFIG, peak_bytes, reset_peak
from tw_jax.models.import_weights import load_params
from tw_jax.models.qwen3 import abstract_params

url, param_dtype = sys.argv[1:]
config = dataclasses.replace(CONFIG, param_dtype=param_dtype)
mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
specs = {1: P(), 2: P("tensor", "fsdp"), 3: P(None, "fsdp", "tensor")}
place = lambda leaf: NamedSharding(mesh, specs[len(leaf.shape)])
shardings = jax.tree.map(place, abstract_params(config))
before = reset_peak()
leaves = jax.tree.leaves(load_params(url, config, shardings))
growth = peak_bytes() - before
held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
print(json.dumps({"ratio": (growth - held) / max(leaf.nbytes for leaf in leaves)}))
"""


@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_import_to_four_devices(scheme: str, param_dtype: str, checkpoint: pathlib.Path) -> None:
    """Mapped from a folder or requested in ranges, as it is or converted on the way."""
    assert run_json("-c", SCRIPT, f"{scheme}{checkpoint}", param_dtype)["ratio"] < 1.3
