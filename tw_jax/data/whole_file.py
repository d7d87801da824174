"""Text files that appear whole or not at all, and never in the place of what is read."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator, Sequence
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


def require_other_files(sources: Sequence[str], **outputs: str | os.PathLike[str] | None) -> None:
    """Checks that no output takes the place of something that is read.

    Args:
      sources: names of what is read.
      outputs: setting -> file that will be written; None for none.

    Raises:
      UserError: one does; names the setting.
    """
    read = {os.path.realpath(source) for source in sources}
    for name, path in outputs.items():
        if path is not None and os.path.realpath(path) in read:
            raise UserError(f"{name}={path} is what is read as well; choose another path")
