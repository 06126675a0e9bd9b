"""Starts a command as a service manager does: descriptors from 3 on, and variables that say so.

    passing.py KIND[:PATH]… -- COMMAND

KIND is what is passed: a file, a descriptor that it has been given (`fd:NUMBER`), or a socket of
some kind, bound to PATH. `closed` passes nothing but says so; `stranger`, as the only one, has the
variables name another process. The kinds are the names, if there are no others in the environment.
Standard library only.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys

_ABOVE = 100


def made(kind: str, path: str) -> int:
    """A descriptor of that kind, above the numbers that are passed."""
    if kind == "file":
        fd = os.open(path, os.O_RDONLY)
    elif kind == "fd":
        fd = int(path)
    else:
        types = {"stream": socket.SOCK_STREAM, "datagram": socket.SOCK_DGRAM}
        made = socket.socket(socket.AF_UNIX, types.get(kind, socket.SOCK_SEQPACKET))
        if kind == "relative":
            os.chdir(os.path.dirname(path))
            path = os.path.basename(path)
        made.bind(f"\0{path}" if kind == "abstract" else path)
        if kind not in ("datagram", "bound"):
            made.listen()
        fd = made.detach()
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE)


def main(arguments: list[str]) -> None:
    """Never returns."""
    at = arguments.index("--")
    kinds = [kind.partition(":")[::2] for kind in arguments[:at]]
    fds = [made(kind, path) for kind, path in kinds if kind not in ("closed", "stranger")]
    for number, fd in enumerate(fds, 3):
        os.dup2(fd, number)
    if len(fds) < len(kinds):
        os.closerange(3, _ABOVE)
    os.environ["LISTEN_PID"] = str(1 if kinds[0][0] == "stranger" else os.getpid())
    os.environ["LISTEN_FDS"] = str(len(kinds))
    os.environ.setdefault("LISTEN_FDNAMES", ":".join(kind for kind, _ in kinds))
    os.execvp(arguments[at + 1], arguments[at + 1 :])


if __name__ == "__main__":
    main(sys.argv[1:])
