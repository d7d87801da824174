"""A store at gs://, packed, killed, finished and read over HTTP from a server that speaks GCS."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from tw_jax.config import to_yaml
from tw_jax.data.export_task import export_task
from tw_jax.data.pack import PackConfig, run_pack
from tw_jax.tasks.registry import TaskConfig, make_task

ROOT = pathlib.Path(__file__).parents[2]
PACK = """
import sys
from tw_jax.config import load_config
from tw_jax.data.pack import PackConfig, run_pack
run_pack(load_config(PackConfig, sys.argv[1], []))
"""
# Prints the rows' hash; `other` is the same store in a local folder.
READ = """
import sys
import numpy as np
from tw_jax.data.store import PackedStore
store, other = PackedStore(sys.argv[1]), PackedStore(sys.argv[2])
assert store.manifest == other.manifest
rows = list(range(len(store)))[::-1]
for name, array in store.read_rows(rows).items():
    np.testing.assert_array_equal(array, other.read_rows(rows)[name])
print("equal", len(rows))
"""


@pytest.fixture
def environ():
    """Environment of a process whose gs:// is a server of ours."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.data.fake_gcs"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    yield {
        **os.environ,
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",
    }
    server.kill()
    server.wait()


def journal_entries(environ):
    """Objects of the store's journal, asked from the server itself."""
    url = environ["TENSORSTORE_GCS_HTTP_URL"] + "/storage/v1/b/bucket/o?prefix=some/store/journal/"
    with urllib.request.urlopen(url) as answer:
        return len(json.load(answer)["items"])


@pytest.mark.slow
def test_a_store_at_gs_is_the_store_in_a_folder(tmp_path, environ):
    source = tmp_path / "data.jsonl"
    export_task(make_task(TaskConfig()), "train", 1500, 0, 0.5, source)
    local = PackConfig(
        inputs=(str(source),),
        output=str(tmp_path / "store"),
        rejects=str(tmp_path / "rejects.jsonl"),
        row_len=600,
        window=50,
        shard_rows=8,
    )
    run_pack(local)
    remote = dataclasses.replace(local, output="gs://bucket/some/store")
    (tmp_path / "config.yaml").write_text(to_yaml(remote))
    command = [sys.executable, "-c", PACK, str(tmp_path / "config.yaml")]
    killed = subprocess.Popen(command, env=environ)
    while killed.poll() is None and journal_entries(environ) < 5:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    went_on = subprocess.run(
        command, env=environ, check=True, timeout=120, capture_output=True, text=True
    )
    assert "gs://bucket/some/store: going on behind" in went_on.stdout
    assert journal_entries(environ) == 0
    words = [sys.executable, "-c", READ, remote.output, local.output]
    read = subprocess.run(
        words, env=environ, check=True, timeout=120, capture_output=True, text=True
    )
    assert read.stdout.startswith("equal")
