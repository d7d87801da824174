"""The TPU backend passes the real TPU compiler, ahead of time, for every kind of chip.

It says that layouts, on-chip memory and scalar memory are right; only a TPU says how fast.
"""

import json
import subprocess
import sys

import pytest

from tests.libtpu import needs_libtpu
from tw_jax.planning.tpu_environment import compiler_environment

pytestmark = [pytest.mark.slow, needs_libtpu]

CASES = {
    "8k": [{"dtype": d, "depth": h} for d in ("bfloat16", "float32") for h in (0, 1)],
    "head_dims": [{"dim": dim} for dim in (32, 64, 80, 96, 256)]
    + [{"dim": dim, "dtype": "float32", "depth": 2} for dim in (80, 256)],
    "groups": [{"heads": heads, "kv_heads": 1} for heads in (1, 2, 8, 16)],
    "lengths": [
        # The longest list of tiles; few heads, for 16 of so many tokens would not fit into a v5e.
        {"row_len": 40_960, "rows": 20, "heads": 4, "kv_heads": 1},
        {"row_len": 40_960, "parts": 4},
        {"row_len": 100, "rows": 3, "dtype": "float32", "heads": 4},
        {"row_len": 192, "parts": 12, "heads": 1, "kv_heads": 1, "dim": 64},
    ],
}


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("name", CASES)
def test_compiles(topology, name):
    words = ["-m", "tests.kernels.compile_worker", topology, json.dumps(CASES[name])]
    done = subprocess.run(
        [sys.executable, *words], env=compiler_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(CASES[name])
    assert [found for found in results if found["problem"]] == []
    assert all(found["kernels"] == 3 for found in results)
