"""Runs of several processes: one per host on TPU pods and GPU clusters, several on one machine.

What starts the processes tells them of each other through the environment:

* `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, set by
  `launch/local_multiprocess.sh` or by hand;
* or `TW_JAX_DISTRIBUTED=1` where JAX finds out by itself: Cloud TPU, SLURM, Kubernetes, Open MPI.

All processes run the same command. Process 0 writes what exists once (configuration, tokenizer,
metrics); checkpoints are written by all of them.
"""

from collections.abc import Mapping

import jax

from tw_jax.errors import UserError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_AUTOMATIC = "TW_JAX_DISTRIBUTED"


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
