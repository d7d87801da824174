"""Import and export of a published checkpoint against copying its file there and back.

The checkpoint has the shapes of Qwen3-0.6B in bfloat16, 1.2 GB. Each repeat copies the file twice
(as many bytes read and written as import and export together), then imports and exports it in a
fresh process. Files are in the page cache; start-up, imports and generation are not timed.

Each part finds as much free memory as it takes in the hands of this machine: a virtual one gives
free memory back to its host, and to get it again takes longer than to fill it.

`time_ratio` is the ratio of the medians over repeats. Other work on the machine raises it, since
import and export use all cores and a copy uses one; `cpu_ratio`, the same of processor seconds of
all threads, shows what it would be on a single core.

`memory_ratio` is the growth of the process's peak resident memory (the kernel's VmHWM, mapped
files included) during import or export, less the parameters that stay, over the largest parameter.
"""

import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.models.config import Qwen3Config, preset
from tw_jax.models.export_weights import export_model
from tw_jax.models.import_weights import load_params
from tw_jax.models.qwen3 import abstract_params
from tw_jax.models.weight_names import pieces_of
from tw_jax.tasks.character_tokenizer import load_tokenizer

REPEATS = 5
CLAIMS = 6  # at most
CONFIG = preset("qwen3-0.6b", param_dtype="bfloat16")
FILE = "model.safetensors"


def write_checkpoint(folder: pathlib.Path, config: Qwen3Config) -> pathlib.Path:
    """Random bfloat16 weights, a few megabytes of them repeated; returns the file."""
    header, end = {}, 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for piece in pieces_of(name, leaf.shape):
            start, end = end, end + 2 * int(np.prod(piece.tensor_shape))
            entry = {"dtype": "BF16", "shape": piece.tensor_shape, "data_offsets": (start, end)}
            header[piece.tensor] = entry
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    tile = rng.standard_normal(8 << 20, np.float32).astype(jnp.bfloat16).tobytes()
    with (folder / FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for at in range(0, end, len(tile)):
            file.write(tile[: end - at])
    return folder / FILE


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def reset_peak() -> int:
    """Forgets that; returns the resident memory now, which is the new one."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def claim_memory(size: int) -> None:
    """Takes memory from the host, and leaves it free: again, until it comes no faster than before.

    What the host takes back meanwhile would otherwise be missing in the part that follows.
    """
    before_s = math.inf
    for _ in range(CLAIMS):
        start = time.perf_counter()
        np.ones(size, np.uint8)
        claim_s = time.perf_counter() - start
        if claim_s > 0.8 * before_s:
            return
        before_s = claim_s


def measure(source: str, out: str, config: Qwen3Config = CONFIG) -> dict[str, float]:
    """Imports and exports in this process: seconds and growth of memory in bytes."""
    tokenizer = load_tokenizer()
    jax.block_until_ready(jnp.zeros(1))
    abstract_params(config)  # the first trace of a model is part of starting up
    size = (pathlib.Path(source) / FILE).stat().st_size
    claim_memory(2 * size)
    before = reset_peak()
    start, cpu_start = time.perf_counter(), time.process_time()
    params = load_params(source, config)
    import_s = time.perf_counter() - start
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    import_growth = peak_bytes() - before - held
    cpu_s = time.process_time() - cpu_start
    claim_memory(2 * size)
    before = reset_peak()
    start, cpu_start = time.perf_counter(), time.process_time()
    export_model(out, params, config, tokenizer)
    export_s = time.perf_counter() - start
    return {
        "import_s": import_s,
        "export_s": export_s,
        "cpu_s": cpu_s + time.process_time() - cpu_start,
        "memory_ratio": max(import_growth, peak_bytes() - before) / largest,
    }


def _copy_there_and_back(file: pathlib.Path, folder: pathlib.Path) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    start, cpu_start = time.perf_counter(), time.process_time()
    shutil.copyfile(file, folder / "there")
    shutil.copyfile(folder / "there", folder / "back")
    seconds = time.perf_counter() - start, time.process_time() - cpu_start
    (folder / "there").unlink()
    (folder / "back").unlink()
    return seconds


def run() -> dict[str, Any]:
    """Medians over repeats."""
    copies, measured = [], []
    with tempfile.TemporaryDirectory(prefix="tw_jax_") as name:
        folder = pathlib.Path(name)
        (folder / "source").mkdir()
        file = write_checkpoint(folder / "source", CONFIG)
        size = file.stat().st_size
        words = [sys.executable, "-m", __name__, str(folder / "source"), str(folder / "out")]
        for _ in range(REPEATS):
            os.sync()  # what an earlier part wrote must not slow down this one
            claim_memory(3 * size)
            copies.append(_copy_there_and_back(file, folder))
            os.sync()
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            measured.append(json.loads(done.stdout.splitlines()[-1]))
            shutil.rmtree(folder / "out")
    copied_s = [seconds for seconds, _ in copies]
    both_s = [one["import_s"] + one["export_s"] for one in measured]
    cpu_s = statistics.median(one["cpu_s"] for one in measured)
    return {
        "gigabytes": size / 1e9,
        "repeats": REPEATS,
        "copy_there_and_back_s": statistics.median(copied_s),
        "import_s": statistics.median(one["import_s"] for one in measured),
        "export_s": statistics.median(one["export_s"] for one in measured),
        "time_ratio": statistics.median(both_s) / statistics.median(copied_s),
        "time_ratio_of_each": [a / b for a, b in zip(both_s, copied_s, strict=True)],
        "cpu_ratio": cpu_s / statistics.median(cpu for _, cpu in copies),
        "memory_ratio": max(one["memory_ratio"] for one in measured),
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2])))
