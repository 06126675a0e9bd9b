"""Faults beyond the package's own: cancellation, death of the coordinator, or of all at once."""

from __future__ import annotations

import os
import signal
import time

from ghostpool.testing import _act
from ghostpool.testing._act import alive
from ghostpool.testing._area import Area, Fault

CHILDREN = ("worker", "guardian", "build", "spawn", "forkserver")
ACKNOWLEDGE_S = 2.0


def act(area: Area, fault: Fault, own: int, *, coordinator: int) -> bool:
    """Let it happen, as `_act.act` does: ("cancel",) and ("kill", "coordinator" or "all") too."""
    if fault[0] == "cancel":
        area.fired(1)
        os.kill(coordinator, signal.SIGUSR1)
        give_up = time.monotonic() + ACKNOWLEDGE_S
        while not area.acknowledged() and time.monotonic() < give_up:
            time.sleep(0.0005)
    elif fault == ("kill", "coordinator"):
        area.fired(1)
        os.kill(coordinator, signal.SIGKILL)
    elif fault == ("kill", "all"):
        area.fired(1)
        everybody(area, coordinator)
    else:
        return _act.act(area, fault, own)
    return True


def everybody(area: Area, coordinator: int) -> None:
    """Kill all processes of a run at one instant: none goes on while the next one is killed.

    The caller too, if it is one of them.
    """
    own = os.getpid()
    # The fork server last: with it die the workers, the caller perhaps among them.
    children = [pid for kind in CHILDREN for pid in alive(area.pids(kind))]
    others = [pid for pid in (coordinator, *children) if pid != own]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in others:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
    if own == coordinator or own in area.pids(*CHILDREN):
        os.kill(own, signal.SIGKILL)
