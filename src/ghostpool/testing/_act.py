"""Carrying out a fault, from inside the process whose step it is or from outside."""

from __future__ import annotations

import os
import signal

from ghostpool.testing._area import Area, Fault


def act(area: Area, fault: Fault, own: int) -> bool:
    """Let it happen; `own` is the process whose step it is. OSError for an errno.

    False: there is nobody that it could happen to.
    """
    if fault[0] == "errno":
        area.fired(1)
        raise OSError(fault[1], os.strerror(fault[1]))
    if fault[0] == "stop":
        area.fired(1)
        os.kill(own, signal.SIGSTOP)
        return True
    victims = [own] if fault[1] == "worker" else alive(area.pids(fault[1]))
    for pid in victims:
        area.fired(1)
        os.kill(pid, signal.SIGKILL)
    return bool(victims)


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
