"""Where the wall time of a run of several stages goes, interruptions left out."""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator


class StageMinutes:
    """Wall time of every stage, added up over interrupted calls in a file."""

    def __init__(self, path: pathlib.Path) -> None:
        """Goes on with what the file holds, if it is there."""
        self._path = path
        self._minutes: dict[str, float] = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        )

    @contextlib.contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Counts the block's time towards a stage, also where it raises."""
        began = time.monotonic()
        try:
            yield
        finally:
            minutes = (time.monotonic() - began) / 60
            self._minutes[stage] = self._minutes.get(stage, 0.0) + minutes
            self._path.write_text(json.dumps(self._minutes), encoding="utf-8")

    def total(self) -> float:
        """Minutes of all stages."""
        return sum(self._minutes.values())

    def by_stage(self) -> dict[str, float]:
        """Minutes by stage."""
        return dict(self._minutes)
