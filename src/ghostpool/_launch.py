"""Starting the fork server: the first thing a run does, before it imports an event loop.

Only light modules are imported here, so that the fork server boots on one CPU while the
coordinator imports the rest on another (docs/design.md, D-005).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NamedTuple

_BOOT = "import sys; sys.path.append({path!r}); from ghostpool import _forkserver as f; f.main(3)"

BLOCKED_AT_START = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Launched(NamedTuple):
    """A fork server that is booting."""

    pid: int
    socket: int
    """The coordinator's end of its socket."""


def launch() -> Launched:
    """Start the fork server. OSError if the interpreter can not be executed.

    A fresh interpreter in isolated mode and without site: no environment, no user packages, and
    none of the coordinator's memory or descriptors besides one socket, which is number 3.
    """
    import _socket

    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    actions = [
        (os.POSIX_SPAWN_DUP2, theirs.fileno(), 3),
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
        (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_RDWR, 0),
    ]
    argv = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _BOOT.format(path=package)]
    # A Ctrl-C goes to the whole process group. Blocked, it can not meet the fork server before
    # that ignores it; the mask of the children is cleared there.
    pid = os.posix_spawn(
        sys.executable, argv, {}, file_actions=actions, setsigmask=BLOCKED_AT_START
    )
    theirs.close()
    return Launched(pid, ours.detach())
