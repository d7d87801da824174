"""One process at a time in a folder: two that write the same files would spoil each other's."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

from tw_jax.errors import UserError


@contextlib.contextmanager
def only_process(folder: str | os.PathLike[str], *, setting: str, work: str) -> Iterator[None]:
    """Keeps others out of a local folder while the block runs; the folder is made.

    The lock goes with the process, however that ends. Where the file system knows no locks,
    nothing is kept out.

    Args:
      folder: the folder.
      setting: that names it, for messages.
      work: what another process may be doing there, for messages.

    Raises:
      UserError: another process is in the folder, or it cannot be made.
    """
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(
            f"{setting}={folder}: no folder can be made there: {error.strerror}; choose another"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{setting}={folder}: another process is {work}") from error
        except OSError:  # some network file systems
            pass
        yield
    finally:
        os.close(descriptor)
