"""The notebooks run from top to bottom, rehearsed in small."""

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = pathlib.Path(__file__).parents[2] / "notebooks"
SMALL = (
    "sft.steps=60 sft.eval_every=30 sft.data.row_len=512 measure.greedy_problems=8 rl.steps=2 "
    "rl.prompts=2 rl.group_size=2 rl.optimizer.warmup_steps=1 rl.row_len=1024 "
    "rl.engine.rows=8 rl.engine.requests=4"
)


@pytest.mark.slow
def test_quickstart_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("TW_JAX_NOTEBOOK_OVERRIDES", f"run_dir={tmp_path / 'run'} {SMALL}")
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = nbformat.read(NOTEBOOKS / "01_quickstart.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOKS)}}
    ).execute()
    # rich displays rich text in notebooks; plain prints are streams.
    printed = "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    assert "token-latency speedup" in printed
    assert "sampler and trainer differ by at most" in printed
    assert os.listdir(tmp_path / "run") != []
