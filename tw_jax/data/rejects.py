"""The record of bad items: counted by kind, listed in a file, while the good ones go on."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Sequence

from tw_jax.data.whole_file import require_other_files
from tw_jax.errors import UserError

_SHOWN_PROBLEMS = 3


@dataclasses.dataclass(frozen=True)
class Reject:
    """A bad item; the arguments of `Rejects.add`."""

    file: str
    line: int
    kind: str
    message: str
    field: str | None = None


class Rejects:
    """Counts bad items by kind and writes each as one JSON line.

    Attributes:
      path: the rejects file; it exists only if something was rejected. None writes none.
      counts: number of rejected items by kind.
    """

    def __init__(self, path: str | pathlib.Path | None, *, sources: Sequence[str] = ()) -> None:
        """Starts an empty record; the rejects file of an earlier run goes.

        Args:
          path: the file to write.
          sources: what will be read.

        Raises:
          UserError: the file is one of the sources, or something else than a rejects file.
        """
        self.path = None if path is None else pathlib.Path(path)
        self.counts: collections.Counter[str] = collections.Counter()
        self._first: dict[str, list[str]] = collections.defaultdict(list)
        self._whole: Rejects | None = None
        if self.path is not None:
            require_other_files(sources, rejects=self.path)
            self._remove_old(self.path)

    def part(self) -> "Rejects":
        """A record that counts by itself what it adds to this one."""
        part = Rejects(None)
        part.path, part._whole = self.path, self
        return part

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
        if self._whole is not None:
            self._whole.add(file, line, kind, message, field)
            return
        first = self._first[str(file)]
        if len(first) < _SHOWN_PROBLEMS:
            first.append(f"line {line}: {kind}: {message}")
        if self.path is None:
            return
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
        record = self if self._whole is None else self._whole
        return tuple(record._first[str(file)])

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

    def summary(self) -> str:
        """One line: how many, of which kinds, listed where."""
        if not self.counts:
            return "0 rejected"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
        where = "" if self.path is None else f", listed in {self.path}"
        return f"{self.total} rejected ({kinds}){where}"

    def _remove_old(self, path: pathlib.Path) -> None:
        """Makes place for a new file, but only of an old rejects file."""
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                first = file.readline()
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            is_rejects = not first or {"file", "line", "kind", "message"} <= set(json.loads(first))
        except (ValueError, TypeError, RecursionError):
            is_rejects = False
        if not is_rejects:
            raise UserError(
                f"rejects={path} is there already and lists no rejects; choose another path"
            )
        try:
            path.unlink()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write the rejects file {self.path}: {error.strerror}; choose another path"
        )
