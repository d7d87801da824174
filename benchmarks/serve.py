"""200 streaming clients against `tw-jax serve`: errors, tokens, time to the first token, memory.

The server is the real command with the tiny preset's random weights; the clients live in another
process, and each sends its next request when its last has ended. Biases on a few control tokens
make the random model fork now and then. More clients come than the engine runs at once, so a
request's time to its first token is mostly spent in the queue.

`memory_growth_mb` is what the server's resident memory (1e6 bytes) gains during the measured time,
after a warm-up under the same load: the difference of the medians of its last and its first
seconds. Whatever a request leaves behind shows there.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

CLIENTS = 200
WARM_UP_S = 30
MEASURE_S = 60
WINDOW_S = 5
SERVER = (
    "model=tiny",
    "port=0",
    "engine.context_len=128",
    "engine.rows=64",
    "engine.requests=48",
    "engine.steps_per_dispatch=8",
    "sampling.max_response_tokens=64",
    "sampling.max_thread_tokens=8",
    "max_queue=256",
)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def measure(url: str, pid: int, *, clients: int, warm_up_s: float, measure_s: float) -> dict:
    """Runs the clients, and watches the server's memory meanwhile."""
    words = [sys.executable, "-m", "benchmarks.serve_clients", url, str(clients)]
    words += [str(warm_up_s), str(measure_s)]
    samples: list[tuple[float, int]] = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # they have begun
        start = time.monotonic()
        while (now := time.monotonic() - start) < warm_up_s + measure_s:
            if now >= warm_up_s:
                samples.append((now - warm_up_s, resident_bytes(pid)))
            time.sleep(0.25)
        found = json.loads(process.communicate()[0].splitlines()[-1])
    window_s = min(WINDOW_S, measure_s / 3)
    first = statistics.median(size for at, size in samples if at < window_s)
    last = statistics.median(size for at, size in samples if at >= measure_s - window_s)
    memory = {"memory_growth_mb": (last - first) / 1e6, "memory_mb": last / 1e6}
    return {**found, **memory}


def run(
    *, clients: int = CLIENTS, warm_up_s: float = WARM_UP_S, measure_s: float = MEASURE_S
) -> dict[str, Any]:
    """Starts the server, measures, and stops it."""
    words = [sys.executable, "-m", "tw_jax.cli", "serve", *SERVER]
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=log, text=True, env=dict(os.environ)
        ) as server:
            assert server.stdout is not None
            line = server.stdout.readline()
            try:
                if not line:
                    log.seek(0)
                    raise RuntimeError(f"the server did not start:\n{log.read()[-3000:]}")
                found = measure(
                    line.split()[-1],
                    server.pid,
                    clients=clients,
                    warm_up_s=warm_up_s,
                    measure_s=measure_s,
                )
            finally:
                server.terminate()
                status = server.wait(60)
        log.seek(0)
        complaints = log.read()
    # A server that failed inside or does not stop cleanly is an error as well; compilers' notes,
    # such as those on slow compiles, are not.
    found["errors"] += complaints.count("Traceback") + (status != 0)
    sys.stderr.write(complaints[-3000:])
    return {"clients": clients, "seconds": measure_s, **found}
