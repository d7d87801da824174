"""The backend of attention on a mesh, and its equality with one device."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tw_jax.errors import UserError
from tw_jax.parallel.attention import backend_on, check_backend
from tw_jax.parallel.layout import Layout, ShardingRules


def layout_of(platform: str) -> Layout:
    """A layout whose mesh has one device of a platform that need not exist here."""
    devices = np.array([SimpleNamespace(platform=platform)])
    return Layout(SimpleNamespace(devices=devices), ShardingRules())


def test_the_devices_of_the_mesh_choose_the_backend():
    assert backend_on(layout_of("tpu")) == "tpu"
    assert backend_on(layout_of("cpu")) == "xla"
    assert backend_on(layout_of("tpu"), "xla") == "xla"
    assert backend_on(layout_of("cpu"), "tpu") == "tpu"
    assert backend_on(None) == "xla"  # the tests run on CPU


def test_a_kernel_for_other_devices_is_refused_at_once():
    for fine in ("auto", "xla"):
        check_backend(None, fine)
    check_backend(layout_of("tpu"), "tpu")
    for layout, choice in ((None, "tpu"), (None, "gpu"), (layout_of("tpu"), "gpu")):
        with pytest.raises(UserError, match=f"memory.attention={choice}.*take auto or xla"):
            check_backend(layout, choice)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", "tpu"])
def test_spread_over_rows_queries_and_heads(backend):
    words = [sys.executable, "-m", "tests.parallel.attention_worker", backend]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["relative_difference"] <= 1e-5
