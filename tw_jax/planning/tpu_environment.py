"""What libtpu needs to compile on a machine that has no TPU."""

import importlib.metadata
import importlib.util
import os
import pathlib
from collections.abc import Mapping

from tw_jax.errors import UserError

_LIBRARY = "TPU_LIBRARY_PATH"


def libtpu_version(environment: Mapping[str, str]) -> str:
    """Version of the TPU compiler, to tell cached plans apart.

    Raises:
      UserError: it is not there.
    """
    path = environment.get(_LIBRARY)
    if path and pathlib.Path(path).is_file():
        for found in importlib.metadata.distributions(path=[str(pathlib.Path(path).parents[1])]):
            if found.name == "libtpu":
                return found.version
        stat = pathlib.Path(path).stat()
        return f"of {stat.st_size} bytes and time {stat.st_mtime_ns}"
    if importlib.util.find_spec("libtpu") is not None:
        return importlib.metadata.version("libtpu")
    raise UserError(
        "planning for a TPU compiles with libtpu, which is not installed: "
        "pip install 'tw-jax[plan]' (no TPU is needed), or let TPU_LIBRARY_PATH name a libtpu.so"
    )


def compiler_environment() -> dict[str, str]:
    """Environment of a process that compiles for TPUs: no search for hardware, no chatter."""
    return dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE="v5litepod-16",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_STDERR_LOG_LEVEL="3",
        TPU_MIN_LOG_LEVEL="3",
    )
