"""A child that shows the maps of a user namespace, by being in it.

The kernel shows them in /proc/PID/uid_map of a process there, as who opens that file has to see
them; a namespace that has no process, and a process whose mount namespace somebody else owns, are
no exceptions then. It holds its socket and the namespace, and does nothing more.
"""

from __future__ import annotations

import os
import signal

from ghostpool import _linux
from ghostpool._capabilities import Cap, Capabilities
from ghostpool._failed import Work
from ghostpool._protocol import BlockingChannel


def main(fds: list[int]) -> None:
    """Enter the user namespace, say so, and stay until the coordinator has looked."""
    channel = BlockingChannel(fds[0])
    os.dup2(0, 2)
    _linux.prctl(_linux.PR_SET_NO_NEW_PRIVS, 1)
    work = Work()
    try:
        capabilities = Capabilities(int(Cap.SYS_ADMIN))
        capabilities.need(int(Cap.SYS_ADMIN))
        work._step = "setns"
        _linux.setns(fds[1], _linux.CLONE_NEWUSER)
        # Whoever enters one has every capability there.
        capabilities.give_up(int(~Cap(0)))
        # New credentials: whoever is root there must not look into this process for it.
        _linux.prctl(_linux.PR_SET_DUMPABLE, 0)
        _linux.prctl(_linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    except OSError as error:
        channel.send((error.errno, getattr(error, "syscall", work._step)))
        return
    channel.send(None)
    channel.receive()
