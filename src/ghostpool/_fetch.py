"""The consumer of a served restore: take one task's descriptors and become a command.

Synchronous and light: it connects, receives, puts the descriptors at their numbers, says that it
is ready and execs when it is released. docs/task-socket.md describes what is said.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ghostpool import _descriptors, _listenfds
from ghostpool._errors import CommandError, PlanError, RestoreError
from ghostpool._needs import MOST_KEYS
from ghostpool._protocol import take_rights

VERSION = 1
MAX_MESSAGE = 1 << 16
_UCRED = struct.Struct("3i")
_SPACE = socket.CMSG_SPACE(253 * array.array("i").itemsize)


def fetch(path: str, task: int, argv: list[str], *, listen_fds: bool = False) -> None:
    """Fetch the descriptors of `task` from the socket at `path`, and exec `argv` when released.

    With `listen_fds` they come by the LISTEN_FDS convention, not at their numbers.
    Returns never. PlanError: nobody serves there, or not this task. RestoreError: the restore
    failed, and everything was undone. CommandError: exec failed.
    """
    if shutil.which(argv[0]) is None:
        # Before the hello: to end after it breaks the barrier.
        raise PlanError(f"{argv[0]}: no such command here")
    soft_limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connection = _connect(path)
    with _in_words(f"{path}: the server did not hand over task {task}"):
        descriptors, cloexec, keys = _take(connection, task)
    if len(keys) > MOST_KEYS:
        what = f"{len(keys)} mappings and the like, more than GHOSTPOOL_KEYS can tell of"
        _send(connection, {"type": "abort", "reason": what})
        raise CommandError(what)
    environment = {
        **os.environ,
        "GHOSTPOOL_TASK": str(task),
        "GHOSTPOOL_CLOEXEC": ",".join(map(str, sorted(cloexec))),
    }
    if listen_fds:
        environment |= _listenfds.variables(descriptors, keys)
        if descriptors:
            environment["LISTEN_PID"] = str(os.getpid())
        places = _listenfds.places(descriptors)
        keys = {key: places[number] for key, number in keys.items()}
        descriptors = _listenfds.arranged(descriptors)
    environment["GHOSTPOOL_KEYS"] = json.dumps(keys)
    targets = {number: number for number in range(3) if number not in descriptors}
    with _stderr_kept(max(descriptors, default=2) + 1):
        try:
            kept = _descriptors.place({**targets, **descriptors}, connection.fileno(), soft_limit)
        except OSError as error:
            what = f"the descriptors of task {task} do not get their numbers: {error.strerror}"
            _send(connection, {"type": "abort", "reason": what})
            raise CommandError(what) from error
        connection.detach()  # its number may be a ghost's by now
        connection = socket.socket(fileno=kept)
        with _in_words(f"{path}: the server did not release task {task}"):
            _send(connection, {"type": "ready"})
            _receive(connection, "released")
        try:
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)  # Python ignores them
            os.execvpe(argv[0], argv, environment)
        except OSError as error:
            raise CommandError(f"{argv[0]}: {error.strerror}") from error


def _connect(path: str) -> socket.socket:
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
    return connection


def _take(connection: socket.socket, task: int) -> tuple[dict[int, int], list[int], dict[str, int]]:
    """Descriptors by their numbers in the task, the numbers that are close-on-exec, and those of
    keys."""
    descriptors: dict[int, int] = {}
    cloexec: list[int] = []
    keys: dict[str, int] = {}
    _send(connection, {"type": "hello", "version": VERSION, "task": task})
    more = True
    while more:
        message, fds = _receive(connection, "files")
        for row, fd in zip(message["files"], fds, strict=True):
            descriptors[row["fd"]] = fd
            if row["close_on_exec"]:
                cloexec.append(row["fd"])
            if "key" in row:
                keys[row["key"]] = row["fd"]
        more = message["more"]
    return descriptors, cloexec, keys


def _send(connection: socket.socket, message: object) -> None:
    try:
        connection.sendmsg([json.dumps(message).encode()], [], socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it has closed, and what it said before that is still to be received


def _receive(connection: socket.socket, expected: str) -> tuple[dict[str, Any], list[int]]:
    data, ancillary, flags, _ = connection.recvmsg(MAX_MESSAGE, _SPACE, socket.MSG_CMSG_CLOEXEC)
    fds = take_rights(ancillary, flags)
    if not data:
        raise ConnectionResetError("it closed the connection")
    message: dict[str, Any] = json.loads(data)
    if message["type"] == "abort":
        if message.get("refused"):
            raise PlanError(f"refused: {message.get('reason')}")
        raise RestoreError(f"the restore was undone: {message.get('reason')}")
    if message["type"] != expected:
        raise ValueError(f"it said {message['type']!r} instead of {expected}")
    return message, fds


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """A RestoreError that begins so, for a server that is gone or talks nonsense."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RestoreError(f"{what}: {error}") from error


@contextmanager
def _stderr_kept(above: int) -> Iterator[None]:
    """A failure of the block is told on stderr as it is now, not on a ghost that took its number.

    The copy is out of the way of all numbers below `above`.
    """
    stderr = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, above)
    try:
        yield
    except BaseException:
        os.dup2(stderr, 2)
        raise
