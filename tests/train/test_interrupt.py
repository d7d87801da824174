"""Signals become a flag; a second Ctrl-C does not wait."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from tw_jax.train.interrupt import graceful_interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_flag(number, capfd):
    with graceful_interrupt() as interrupt:
        assert not interrupt.requested and not interrupt.requested_anywhere()
        os.kill(os.getpid(), number)
        assert interrupt.requested and interrupt.requested_anywhere()
        assert interrupt.signal_name == number.name
    assert f"{number.name}: saving what is done, then stopping" in capfd.readouterr().err


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), graceful_interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat themselves
        assert interrupt.signal_name == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal should have interrupted")


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), graceful_interrupt():
        assert signal.getsignal(signal.SIGINT) != before[0]
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_it_does_nothing():
    seen = []

    def work():
        before = signal.getsignal(signal.SIGINT)
        with graceful_interrupt() as interrupt:
            seen.append((interrupt.requested, signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


def test_a_process_saves_and_exits_0():
    program = """
import time
from tw_jax.train.interrupt import graceful_interrupt
with graceful_interrupt() as interrupt:
    step = 0
    print("ready", flush=True)
    while not interrupt.requested:
        time.sleep(0.02)
        step += 1
print("saved", step > 0, interrupt.signal_name)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=pathlib.Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "saved True SIGTERM\n")
    assert err.count("\n") == 2
