"""Two processes that take turns: each runs a block of steps when told, then waits.

Whatever else the machine does then slows down both alike. The parent writes `go N` or `stop` to a
worker's standard input; the worker answers each with one line of JSON. Standard library only,
since the peers' workers run in environments of their own.
"""

import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def asked_blocks() -> Iterator[int]:
    """Worker: the number of steps of each block, until told to stop."""
    for line in sys.stdin:
        word, *count = line.split()
        if word == "stop":
            return
        yield int(count[0])


def answer(**fields: Any) -> None:
    """Worker: says how a block went."""
    print(json.dumps(fields), flush=True)


class Worker:
    """Parent's side of one worker."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str], log: pathlib.Path):
        """Starts it; what it says on standard error goes to `log`."""
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=dict(environ),
                text=True,
            )

    def ask(self, request: str) -> dict[str, Any]:
        """Sends a request and waits for its answer; other lines of output are skipped."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(request, file=self._process.stdin, flush=True)
            for line in self._process.stdout:
                if line.startswith("{"):
                    return json.loads(line)
        except BrokenPipeError:
            pass
        self._process.wait()
        raise RuntimeError(f"{self._process.args} ended:\n{self._log.read_text()[-3000:]}")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def alternate(
    workers: Sequence[Worker], *, warm_up: int, blocks: int, steps: int
) -> list[list[float]]:
    """Seconds per step of each worker's blocks, after `warm_up` steps that do not count."""
    seconds: list[list[float]] = [[] for _ in workers]
    for worker in workers:
        worker.ask(f"go {warm_up}")
    for block in range(blocks):
        # Who is first changes, so that neither always runs behind the other.
        order = list(zip(workers, seconds, strict=True))
        for worker, found in order if block % 2 == 0 else reversed(order):
            found.append(worker.ask(f"go {steps}")["seconds"] / steps)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of block times per step."""
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median_step_s": median, "quartiles_step_s": [low, high], "blocks": len(seconds)}
