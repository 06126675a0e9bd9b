"""The consumer of a served restore: take one task's descriptors and become a command.

Synchronous and light: it connects, receives, puts the descriptors at their numbers and execs.
The messages are described in `_serve`.
"""

from __future__ import annotations

import array
import json
import os
import resource
import shutil
import signal
import socket
import struct
from typing import Any

from ghostpool import _descriptors, _listenfds
from ghostpool._errors import CommandError, PlanError, RestoreError
from ghostpool._protocol import take_rights

VERSION = 1
_UCRED = struct.Struct("3i")
_SPACE = socket.CMSG_SPACE(253 * array.array("i").itemsize)


def fetch(path: str, task: int, argv: list[str], *, listen_fds: bool = False) -> None:
    """Fetch the descriptors of `task` from the socket at `path` and exec `argv`.

    With `listen_fds` they come by the LISTEN_FDS convention, not at their numbers.
    Returns never. PlanError: nobody serves there, or not this task. CommandError: exec failed.
    """
    if shutil.which(argv[0]) is None:
        # Before the descriptors are taken, which happens once.
        raise PlanError(f"{argv[0]}: no such command here")
    soft_limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(path)
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}: is ghostpool serving there?") from error
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, server, _ = _UCRED.unpack(credentials)
    if server not in (0, os.geteuid()):
        # What it hands over would end up in a process that trusts it.
        raise PlanError(f"{path}: user {server} serves there, neither root nor this user")
    descriptors: dict[int, int] = {}
    cloexec: list[int] = []
    try:
        connection.send(json.dumps({"type": "hello", "version": VERSION, "task": task}).encode())
        more = True
        while more:
            message, fds = _receive(connection)
            for row, fd in zip(message["files"], fds, strict=True):
                descriptors[row["fd"]] = fd
                if row["close_on_exec"]:
                    cloexec.append(row["fd"])
            more = message["more"]
        connection.send(json.dumps({"type": "ready"}).encode())
        _receive(connection)
    except (OSError, ValueError, KeyError) as error:
        raise RestoreError(f"{path}: the server did not hand over task {task}: {error}") from error
    environment = {
        **os.environ,
        "GHOSTPOOL_TASK": str(task),
        "GHOSTPOOL_CLOEXEC": ",".join(map(str, sorted(cloexec))),
    }
    if listen_fds:
        environment |= _listenfds.variables(descriptors)
        if descriptors:
            environment["LISTEN_PID"] = str(os.getpid())
        descriptors = _listenfds.arranged(descriptors)
    targets = {number: number for number in range(3) if number not in descriptors}
    try:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # Python ignores them
        _descriptors.place({**targets, **descriptors}, connection.detach(), soft_limit)
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        raise CommandError(f"{argv[0]}: {error.strerror}") from error


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, ancillary, flags, _ = connection.recvmsg(1 << 16, _SPACE, socket.MSG_CMSG_CLOEXEC)
    fds = take_rights(ancillary, flags)
    if not data:
        raise ConnectionResetError("it closed the connection")
    message: dict[str, Any] = json.loads(data)
    if message.get("type") == "abort":
        raise PlanError(f"refused: {message.get('reason')}")
    return message, fds
