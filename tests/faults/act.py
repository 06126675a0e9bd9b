"""Carrying out a fault, from inside a worker or from its coordinator."""

from __future__ import annotations

import os
import signal
import time

from tests.faults.area import Area, Fault

CHILDREN = ("worker", "guardian", "build", "spawn", "forkserver")
ACKNOWLEDGE_S = 2.0


def act(area: Area, fault: Fault, coordinator: int, own: int) -> None:
    """Let it happen; `own` is the process whose step it is. OSError for an errno."""
    kind = fault[0]
    if kind == "errno":
        area.fired(1)
        raise OSError(fault[1], os.strerror(fault[1]))
    if kind == "cancel":
        area.fired(1)
        os.kill(coordinator, signal.SIGUSR1)
        give_up = time.monotonic() + ACKNOWLEDGE_S
        while not area.acknowledged() and time.monotonic() < give_up:
            time.sleep(0.0005)
    elif kind == "stop":
        area.fired(1)
        os.kill(own, signal.SIGSTOP)
    elif fault[1] == "worker":
        area.fired(1)
        os.kill(own, signal.SIGKILL)
    elif fault[1] == "coordinator":
        area.fired(1)
        os.kill(coordinator, signal.SIGKILL)
    elif fault[1] == "all":
        area.fired(1)
        everybody(area, coordinator)
    else:  # the guardian, or the fork server, if there is one yet
        for pid in alive(area.pids(fault[1])):
            area.fired(1)
            os.kill(pid, signal.SIGKILL)


def alive(pids: list[int]) -> list[int]:
    """Those that can still be signalled. None of them was waited for by anybody but its parent."""
    found = []
    for pid in pids:
        try:
            os.kill(pid, 0)
            found.append(pid)
        except ProcessLookupError:
            pass
    return found


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
