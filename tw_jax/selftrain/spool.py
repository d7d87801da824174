"""JSON objects set aside on disk: what a run will need again at its end, but not in memory."""

import array
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from tw_jax.errors import UserError


class Spool:
    """Objects in a file without a name, which vanishes with the process; numbered from 0."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Opens the file.

        Args:
          folder: its disk must have room for all objects.

        Raises:
          UserError: no file can be made there.
        """
        self._folder = folder
        self._ends = array.array("q", [0])
        try:
            self._file = tempfile.TemporaryFile(dir=folder)
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, item: dict[str, Any]) -> int:
        """Sets an object aside and returns its number.

        Raises:
          UserError: the disk is full.
        """
        data = json.dumps(item).encode()
        try:
            self._file.seek(self._ends[-1])
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error
        self._ends.append(self._ends[-1] + len(data))
        return len(self) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        start, end = self._ends[number], self._ends[number + 1]
        self._file.seek(start)
        return json.loads(self._file.read(end - start))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"output={self._folder}: cannot write there ({error.strerror})")
