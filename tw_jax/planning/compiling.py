"""Runs the worker that compiles, with a time limit, and keeps its results."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from tw_jax.config import to_yaml
from tw_jax.errors import UserError
from tw_jax.planning.chips import parse_topology
from tw_jax.planning.config import Assumptions, PlanConfig
from tw_jax.planning.facts import StepFacts, from_json
from tw_jax.planning.tpu_environment import compiler_environment, libtpu_version

_CHECK = re.compile(r"Check failed: .*")

Progress = Callable[[str], None]


def facts_of(config: PlanConfig, progress: Progress) -> StepFacts:
    """The facts of a step: from the cache, or from a process that compiles it.

    Args:
      config: what to plan.
      progress: called with a line of text when something that takes long begins.

    Raises:
      UserError: the plan is impossible, its compiler is missing, or it took too long.
    """
    topology = parse_topology(config.topology)
    compiler = libtpu_version(os.environ) if topology.chip.kind == "tpu" else ""
    kept = _cache_file(config, compiler)
    if kept is not None and kept.is_file():
        progress(f"read from {kept}")
        return from_json(json.loads(kept.read_text(encoding="utf-8")))
    values = _work(config, progress)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        whole = kept.with_suffix(f".{os.getpid()}.tmp")
        whole.write_text(json.dumps(values), encoding="utf-8")
        whole.replace(kept)
    return from_json(values)


def cache_key(config: PlanConfig, compiler: str) -> str:
    """Changes with whatever changes the facts: settings, versions, this package's own source."""
    plain = dataclasses.replace(
        config, assume=Assumptions(), search=False, search_limit=1, cache_dir="", json=None
    )
    digest = hashlib.sha256(to_yaml(plain).encode())
    for part in (importlib.metadata.version("jax"), compiler, _source_digest()):
        digest.update(part.encode())
    return digest.hexdigest()[:24]


def _source_digest() -> str:
    package = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cache_file(config: PlanConfig, compiler: str) -> pathlib.Path | None:
    if not config.cache_dir:
        return None
    return pathlib.Path(config.cache_dir).expanduser() / f"{cache_key(config, compiler)}.json"


def _work(config: PlanConfig, progress: Progress) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tw_jax_plan_") as folder:
        wanted, result = pathlib.Path(folder, "plan.yaml"), pathlib.Path(folder, "facts.json")
        wanted.write_text(to_yaml(config), encoding="utf-8")
        words = [sys.executable, "-m", "tw_jax.planning.worker", str(wanted), str(result)]
        with pathlib.Path(folder, "errors").open("w+", encoding="utf-8") as errors:
            process = subprocess.Popen(
                words, env=compiler_environment(), stdout=subprocess.PIPE, stderr=errors, text=True
            )
            late = threading.Timer(config.timeout_s, process.kill)
            late.start()
            try:
                for line in process.stdout or ():
                    progress(line.rstrip())
                status = process.wait()
            finally:
                timed_out = not late.is_alive()
                late.cancel()
                process.kill()
                process.wait()
            errors.seek(0)
            said = errors.read()[-4000:]
        if timed_out:
            raise UserError(
                f"compiling for {config.topology} took more than timeout_s={config.timeout_s} "
                "seconds; raise it, or plan on a machine with less load"
            )
        if status < 0 and (failed := _CHECK.search(said)):
            raise UserError(
                f"the TPU compiler itself broke down on this program for {config.topology} "
                f"({failed.group(0)[:200]}); other sizes or another mesh may avoid it"
            )
        if status != 0 or not result.is_file():
            raise RuntimeError(f"the planning process ended with status {status}:\n{said}")
        values = json.loads(result.read_text(encoding="utf-8"))
    if "error" in values:
        raise UserError(values["error"])
    return values
