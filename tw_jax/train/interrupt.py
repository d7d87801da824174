"""Ctrl-C and SIGTERM: finish the step, save, go; never lose work to an impatient scheduler."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Whether somebody asked this run to stop.

    Attributes:
      requested: this process received a signal; the loop reads it between steps.
      signal_name: the first signal, such as "SIGTERM"; None before it.
    """

    def __init__(self):
        self.requested = False
        self.signal_name: str | None = None

    def requested_anywhere(self) -> bool:
        """True once any process of the run received a signal.

        A scheduler may stop processes at slightly different times, and all must leave the loop
        after the same step. Every process calls this once per step; it costs one small exchange,
        and nothing in a run of one process.
        """
        if jax.process_count() == 1:
            return self.requested
        return bool(np.any(multihost_utils.process_allgather(np.bool_(self.requested))))


@contextmanager
def graceful_interrupt() -> Iterator[Interrupt]:
    """Turns SIGINT and SIGTERM into a flag while the block runs.

    The first signal sets the flag and says so on stderr; the loop is expected to finish its step,
    save, and tell how to resume. A second SIGINT raises KeyboardInterrupt at once. The handlers
    found on entry are put back on exit. Outside the main thread, where Python delivers no
    signals, the flag simply stays unset.

    Yields:
      The flag.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        name = signal.Signals(number).name
        if interrupt.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        interrupt.requested = True
        interrupt.signal_name = name
        # Not print: a handler may run in the middle of another print and must not re-enter it.
        os.write(
            2, f"\n{name}: saving what is done, then stopping. Ctrl-C stops at once.\n".encode()
        )

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
