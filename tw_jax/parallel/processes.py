"""Runs of several processes: one per host on TPU pods and GPU clusters, several on one machine.

What starts the processes tells them of each other through the environment:

* `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, set by
  `launch/local_multiprocess.sh` or by hand;
* or `TW_JAX_DISTRIBUTED=1` where JAX finds out by itself: Cloud TPU, SLURM, Kubernetes, Open MPI.

All processes run the same command. Process 0 writes what exists once (configuration, tokenizer,
metrics); checkpoints are written by all of them.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from tw_jax.errors import UserError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_AUTOMATIC = "TW_JAX_DISTRIBUTED"
_REPORT_BYTES = 4096
_FINE, _USER_ERROR, _BUG = range(3)


def join_processes(environ: Mapping[str, str]) -> bool:
    """Joins the other processes of the run, if the environment names any.

    Must come before anything touches a device.

    Args:
      environ: `os.environ`.

    Returns:
      Whether there was a run to join.

    Raises:
      UserError: only some of the variables are set, or they are not numbers.
    """
    present = [name for name in _EXPLICIT if environ.get(name)]
    if not present and environ.get(_AUTOMATIC) == "1":
        jax.distributed.initialize()
        return True
    # JAX itself reads the address, so that alone may have been set for something else.
    if not set(present) & set(_EXPLICIT[1:]):
        return False
    missing = [name for name in _EXPLICIT if name not in present]
    if missing:
        raise UserError(
            f"the environment has {', '.join(present)} but not {', '.join(missing)}: set all "
            "three, e.g. as launch/local_multiprocess.sh does"
        )
    try:
        count, index = (int(environ[name]) for name in _EXPLICIT[1:])
    except ValueError as error:
        raise UserError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers: {error}") from error
    if not 0 <= index < count:
        raise UserError(
            f"JAX_PROCESS_ID={index}: must lie in 0..{count - 1} (JAX_NUM_PROCESSES={count})"
        )
    jax.distributed.initialize(environ["JAX_COORDINATOR_ADDRESS"], count, index)
    return True


def is_first_process() -> bool:
    """Whether this process writes what exists once."""
    return jax.process_index() == 0


def gathered_bytes(data: bytes) -> list[bytes]:
    """What every process gives, in the order of processes; all of them must call it."""
    if jax.process_count() == 1:
        return [data]
    raw = np.frombuffer(data, np.uint8)
    lengths = multihost_utils.process_allgather(np.int64(raw.size))
    rows = multihost_utils.process_allgather(np.pad(raw, (0, int(lengths.max()) - raw.size)))
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


@contextlib.contextmanager
def led_by_first_process() -> Iterator[Callable[[], None]]:
    """A block in which the first process does what may fail, and the others go along.

    Where the first process raises, the others raise too, with its message: at the next check, or
    at the end of the block. So none waits for one that has given up.

    Yields:
      The check. All processes call it equally often, between things they do together. A first
      process that fails must still take part in what the others do before their next check.

    Raises:
      UserError: in the others, where the first process raised one.
      RuntimeError: in the others, where the first process raised anything else.
    """
    if jax.process_count() == 1:
        yield lambda: None
        return
    if not is_first_process():
        yield _hear_of_failure
        _hear_of_failure()
        return
    try:
        yield lambda: _tell_others(_FINE, "")
    except Exception as error:
        if isinstance(error, UserError):
            _tell_others(_USER_ERROR, str(error))
        else:
            _tell_others(_BUG, f"{type(error).__name__}: {error}")
        raise
    _tell_others(_FINE, "")


def _tell_others(outcome: int, message: str) -> None:
    report = np.zeros(_REPORT_BYTES, np.uint8)
    text = bytes([outcome]) + message.encode()[: _REPORT_BYTES - 1]
    report[: len(text)] = np.frombuffer(text, np.uint8)
    multihost_utils.broadcast_one_to_all(report)


def _hear_of_failure() -> None:
    """Raises what the first process tells of."""
    report = np.asarray(multihost_utils.broadcast_one_to_all(np.zeros(_REPORT_BYTES, np.uint8)))
    message = report[1:].tobytes().rstrip(b"\0").decode(errors="replace")
    if report[0] == _USER_ERROR:
        raise UserError(message)
    if report[0] == _BUG:
        raise RuntimeError(f"the first process failed: {message}")
