"""What is taken for a sign of life, and what a stuck process is said to be doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ghostpool._stall import Vigil, condition

STALL_S = 0.3

BUSY = "while True: pass"
WAKING = "import time\nwhile True: time.sleep(0.02)"
COPYING = """
import os, tempfile
with tempfile.TemporaryFile() as file:
    while True:
        os.pwrite(file.fileno(), bytes(1 << 20), 0)
"""
ASLEEP = "import time\ntime.sleep(60)"


@contextmanager
def running(code: str) -> Iterator[int]:
    """The pidfd of a process that runs `code`."""
    program = f"print('.', flush=True)\n{code}"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"."
            pidfd = os.pidfd_open(process.pid)
            try:
                yield pidfd
            finally:
                os.close(pidfd)
        finally:
            process.kill()


def hangs(pidfd: int, seconds: float) -> float | None:
    """After how many seconds the process is found to hang."""
    vigil = Vigil(pidfd, STALL_S)
    begun = time.monotonic()
    while (now := time.monotonic()) - begun < seconds:
        if vigil.hangs(now):
            return now - begun
        time.sleep(vigil.interval_s)
    return None


@pytest.mark.parametrize("code", [BUSY, WAKING, COPYING])
def test_who_moves_does_not_hang(code: str) -> None:
    with running(code) as pidfd:
        assert hangs(pidfd, 5 * STALL_S) is None


def test_who_sleeps_or_was_stopped_hangs() -> None:
    with running(ASLEEP) as pidfd:
        found = hangs(pidfd, 10 * STALL_S)
        assert found is not None
        assert found >= STALL_S
        assert condition(pidfd).startswith("asleep, in ")
    with running(BUSY) as pidfd:
        signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
        assert hangs(pidfd, 10 * STALL_S) is not None
        assert condition(pidfd).startswith("stopped by a signal")


def test_who_goes_on_in_time_does_not_hang() -> None:
    """A stop that is shorter than the stall time, again and again."""
    with running(BUSY) as pidfd:
        vigil = Vigil(pidfd, 10 * STALL_S)
        for number in range(8):
            stop = signal.SIGCONT if number % 2 else signal.SIGSTOP
            signal.pidfd_send_signal(pidfd, stop)
            time.sleep(0.05)
            # By a clock on which a look is half the stall time.
            assert not vigil.hangs(number * 5 * STALL_S)


def test_of_what_can_not_be_seen_nothing_is_said() -> None:
    """Without a process, or without a /proc that shows it."""
    assert hangs(-1, 2 * STALL_S) is None
    assert condition(-1) == "state unknown"
    with open("/dev/null", encoding="ascii") as file:
        assert hangs(file.fileno(), 2 * STALL_S) is None
