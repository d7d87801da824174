"""The record of bad items: counted by kind, listed in a file, while the good ones go on."""

import collections
import json
import pathlib

from tw_jax.errors import UserError


class Rejects:
    """Counts bad items by kind and writes each as one JSON line.

    Attributes:
      path: the rejects file; it exists only if something was rejected.
      counts: number of rejected items by kind.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        """Starts an empty record.

        Raises:
          UserError: a rejects file of an earlier run cannot be replaced.
        """
        self.path = pathlib.Path(path)
        self.counts: collections.Counter[str] = collections.Counter()
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, file: str | pathlib.Path, line: int, kind: str, message: str) -> None:
        """Records one bad item.

        Args:
          file: where it was read.
          line: its line, from 1.
          kind: stable identifier of what is wrong.
          message: what was found, what was expected.

        Raises:
          UserError: the rejects file cannot be written.
        """
        self.counts[kind] += 1
        entry = {"file": str(file), "line": line, "kind": kind, "message": message}
        try:
            # Opened per item: rejects are rare, and a killed run keeps what it has found so far.
            with self.path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise self._unwritable(error) from error

    @property
    def total(self) -> int:
        """Number of rejected items."""
        return self.counts.total()

    def summary(self, counts: collections.Counter[str] | None = None) -> str:
        """One line: how many, of which kinds, listed where.

        Args:
          counts: of one file, where several share this record; all of them by default.
        """
        counts = self.counts if counts is None else counts
        if not counts:
            return "0 rejected"
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        return f"{counts.total()} rejected ({kinds}), listed in {self.path}"

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write the rejects file {self.path}: {error.strerror}; choose another path"
        )
