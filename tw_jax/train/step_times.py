"""Where the wall time of a training step goes."""

import contextlib
import time
from collections.abc import Callable, Iterator


class StepTimes:
    """Adds up the seconds of a step's parts; use it as `with times.of("rollout"):`.

    Attributes:
      seconds: wall time by part, in the order in which the parts began first.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts with nothing.

        Args:
          clock: gives seconds.
        """
        self._clock = clock
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Counts the block's time towards `part`, also where it raises."""
        self.seconds.setdefault(part, 0.0)
        began = self._clock()
        try:
            yield
        finally:
            self.seconds[part] += self._clock() - began
