"""Text files that appear whole or not at all."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import TextIO

from tw_jax.errors import UserError


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Opens a file that takes the place of `path` when the block ends well.

    A reader, or a process that is killed, never sees half of it. Missing folders are made.

    Raises:
      UserError: the file cannot be written.
    """
    path = pathlib.Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another path") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
