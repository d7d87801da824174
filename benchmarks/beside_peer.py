"""Our worker and a peer's, by turns on one machine (`benchmarks.blocks`)."""

import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.blocks import Worker, alternate
from benchmarks.peers import peer_python

# Of both sides' workers.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
ADAMW = {
    "schedule": "constant",
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}


def beside_peer(
    name: str,
    peer: str,
    prepare: Callable[[pathlib.Path], None],
    *,
    warm_up: int,
    blocks: int,
    steps: int,
) -> tuple[list[list[float]], list[dict[str, Any]]]:
    """Runs `benchmarks.NAME_worker` and `benchmarks.peers.PEER_NAME` by turns.

    Args:
      name: of the benchmark.
      peer: whose environment the other worker runs in.
      prepare: fills the folder that both are given.
      warm_up: steps that do not count.
      blocks: of each worker.
      steps: of a block.

    Returns:
      For ours and for theirs the seconds per step of every block, and what it said at the end.
    """
    repository = pathlib.Path(__file__).parents[1]
    environ = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(repository)}
    modules = {
        f"benchmarks.{name}_worker": sys.executable,
        f"benchmarks.peers.{peer}_{name}": peer_python(peer),
    }
    with tempfile.TemporaryDirectory(prefix="tw_jax_") as made:
        folder = pathlib.Path(made)
        prepare(folder)
        workers = []
        try:
            for module, python in modules.items():
                log = folder / f"{module}.log"
                workers.append(Worker([python, "-m", module, str(folder)], environ, log))
            seconds = alternate(workers, warm_up=warm_up, blocks=blocks, steps=steps)
            return seconds, [worker.ask("stop") for worker in workers]
        finally:
            for worker in workers:
                worker.close()
