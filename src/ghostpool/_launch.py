"""Starting the fork server: the first thing a run does, before it imports an event loop.

Only light modules are imported here, so that the fork server boots on one CPU while the
coordinator imports the rest on another (docs/design.md, D-005).
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ghostpool import _linux

# It ends without what the interpreter does then, which the end of a run would wait for.
_BOOT = (
    "import os, sys; sys.path.append({path!r}); "
    "from ghostpool import _forkserver as f; f.main(3); os._exit(0)"
)

_BLOCKED_AT_START = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_ABOVE = 10
"""Numbers below it are given to the fork server."""


class Launched(NamedTuple):
    """A fork server that is booting."""

    pid: int
    socket: int
    """The coordinator's end of its socket."""
    pidfd: int
    """The program that this is part of may reap it, and its pid be another one's then."""


def launch() -> Launched:
    """Start the fork server. OSError if the interpreter can not be executed.

    A fresh interpreter in isolated mode and without site: no environment, no user packages, and
    none of the coordinator's memory or descriptors besides one socket, which is number 3.
    """
    import _socket

    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        pid = _spawn(theirs.fileno())
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return Launched(pid, ours.detach(), os.pidfd_open(pid))


def _spawn(socket: int) -> int:
    interpreter = os.path.realpath(sys.executable)
    try:
        return _spawn_read_only(interpreter, socket)
    except OSError:
        # No privilege, or Linux before 5.12. Then it is only that nothing leads to it.
        return execute(_BOOT.format(path=package_root()), socket)


def _spawn_read_only(interpreter: str, socket: int) -> int:
    executable = _read_only(interpreter)
    try:
        return execute(
            _BOOT.format(path=package_root()),
            socket,
            path=f"/proc/self/fd/{executable}",
            environment=_libraries(),
        )
    finally:
        os.close(executable)


def _read_only(path: str) -> int:
    """The file, on a private mount of its own that is read-only and that nobody else has.

    Every child has it as its /proc/PID/exe. Whoever gets at that link can not open it for writing,
    however long it waits for the process to end (CVE-2019-5736; docs/design.md, D-018).
    """
    clone = _linux.open_tree(_linux.AT_FDCWD, os.fsencode(path), _linux.OPEN_TREE_CLONE)
    try:
        _linux.mount_setattr(clone, attr_set=_linux.Attr.RDONLY)
        return fcntl.fcntl(clone, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
    finally:
        os.close(clone)


def _libraries() -> dict[str, str]:
    """An environment in which the loader finds the library that this interpreter was found with.

    It may be looked for at $ORIGIN, which comes from /proc/self/exe and leads nowhere there.
    """
    with open("/proc/self/maps", "rb") as file:
        for line in file:
            if b"/libpython" in line:
                path = line.split(maxsplit=5)[5]
                return {"LD_LIBRARY_PATH": os.fsdecode(os.path.dirname(path))}
    return {}


def execute(
    code: str,
    socket: int,
    *,
    path: str | None = None,
    environment: Mapping[str, str] | None = None,
    null: Sequence[int] = (0, 1),
) -> int:
    """Run `code` in a fresh interpreter, isolated and without site; its pid.

    Its socket is number 3, and the numbers `null` are /dev/null. `path`: what to execute in place
    of this interpreter's own file. OSError if that is not possible.
    """
    actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_DUP2, socket, 3)]
    actions += [(os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in null]
    # By its first word the interpreter finds its modules, whatever file it was executed from.
    argv = [sys.executable, "-I", "-S", "-X", "utf8", "-c", code]
    # A Ctrl-C goes to the whole process group. Blocked, it can not meet the child before that has
    # said what it makes of it.
    return os.posix_spawn(
        path or sys.executable,
        argv,
        environment or {},
        file_actions=actions,
        setsigmask=_BLOCKED_AT_START,
        # Ignored, it would have the kernel reap the children of this child: waitpid(2).
        setsigdef=(signal.SIGCHLD,),
    )


def package_root() -> str:
    """The directory that this package is found in."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
