"""The rules of the house that a linter cannot know."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TOP_LEVEL = ("tw_jax", "configs", "launch", "tests", "notebooks", "benchmarks", "docs", ".ci")
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".ipynb", ".html", ".js", ".css", ".sh", ".txt", ""}
MAX_MODULE_LINES = 400


def project_files() -> Iterator[pathlib.Path]:
    for name in TOP_LEVEL:
        for folder, folders, files in os.walk(ROOT / name):
            if "pyvenv.cfg" in files:  # the environment of a peer is not ours
                folders.clear()
                continue
            folders[:] = [f for f in folders if f != "__pycache__"]
            yield from (pathlib.Path(folder, f) for f in files)
    # In a linked worktree .git is a file.
    yield from (f for f in ROOT.iterdir() if f.is_file() and f.name != ".git")


def test_imports_point_one_way():
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    words = [sys.executable, "-c", code, "--no-cache", "--no-logo"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_drawers():
    drawers = {"utils", "util", "common", "misc", "helpers", "stuff"}
    found = [f for f in project_files() if drawers & {f.stem, f.parent.name}]
    assert not found, "say what the file holds instead"


def test_modules_can_be_read_in_a_sitting():
    long = {
        str(f.relative_to(ROOT)): n
        for f in (ROOT / "tw_jax").rglob("*.py")
        if (n := len(f.read_text(encoding="utf-8").splitlines())) > MAX_MODULE_LINES
    }
    assert not long, f"more than {MAX_MODULE_LINES} lines"


def test_no_package_host_and_no_machine_path_is_named():
    # Written in pieces, so that this file does not name them either.
    hosts = ("pypi" + r"\.org", "python" + r"hosted\.org", "npm" + r"js\.", "conda" + r"\.anaconda")
    places = ("index" + "-url", r"/work" + "/(main|shared)", "/root" + "/")
    pattern = re.compile("|".join((*hosts, *places)))
    found = []
    for file in project_files():
        if file.suffix in TEXT and file.name != "uv.lock":
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if match := pattern.search(line):
                    found.append(f"{file.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found


def test_torch_is_never_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"tw-jax": "tw_jax.cli:main"}
    optional = project["optional-dependencies"]
    wishes = [*project["dependencies"], *(w for extra in optional.values() for w in extra)]
    assert not [w for w in wishes if w.startswith("torch")], "torch is for tests only, see Makefile"
