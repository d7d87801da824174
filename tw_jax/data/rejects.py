"""The record of bad items: counted by kind, listed in a file, while the good ones go on."""

import collections
import json
import pathlib

from tw_jax.errors import UserError

_SHOWN_PROBLEMS = 3


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
        self._first: dict[str, list[str]] = collections.defaultdict(list)
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def add(
        self,
        file: str | pathlib.Path,
        line: int,
        kind: str,
        message: str,
        field: str | None = None,
    ) -> None:
        """Records one bad item.

        Args:
          file: where it was read.
          line: its line, from 1.
          kind: stable identifier of what is wrong.
          message: what was found, what was expected.
          field: of the item that is wrong; None if not one field is to blame.

        Raises:
          UserError: the rejects file cannot be written.
        """
        self.counts[kind] += 1
        first = self._first[str(file)]
        if len(first) < _SHOWN_PROBLEMS:
            first.append(f"line {line}: {kind}: {message}")
        entry = {"file": str(file), "line": line, "field": field, "kind": kind, "message": message}
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

    def first_of(self, file: str | pathlib.Path) -> tuple[str, ...]:
        """The first few problems of a file, in words."""
        return tuple(self._first[str(file)])

    def require_share(self, good: int, max_reject_share: float) -> None:
        """Stops a run whose input is worse than admitted, before anything is spent on it.

        Args:
          good: items that were not rejected.
          max_reject_share: largest share of rejected items that is admitted, 0 to 1.

        Raises:
          UserError: more were rejected.
        """
        seen = good + self.total
        if seen and self.total > max_reject_share * seen:
            raise UserError(
                f"{self.total} of {seen} items are bad, more than max_reject_share="
                f"{max_reject_share:g} admits: {self.summary()}. Mend or filter the input, or "
                "raise max_reject_share"
            )

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
