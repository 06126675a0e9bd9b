"""A consumer of ghostpool's task socket without dependencies; docs/task-socket.md has the messages.

    python3 fetch.py SOCKET TASK COMMAND [ARGUMENT...]

puts the descriptors of one task at their numbers, waits until all tasks have theirs, and becomes
the command. An agent that starts processes in its own way imports it:

    with Connection(path) as connection:
        files = connection.hello(task)
        ...                                 # start the process, hand them over
        connection.ready()
        connection.wait_released()          # now it may run
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import sys
from typing import Any, NamedTuple, Self

MAX_MESSAGE = 1 << 16
MAX_FDS = 253
"""The most that one message carries: SCM_MAX_FD."""


class Aborted(Exception):
    """The restore was undone, and the message says why."""


class Refused(Aborted):
    """Nothing was begun with this task."""


class File(NamedTuple):
    """One file of the task."""

    number: int
    """In the task; with a key, one that no descriptor of the task has."""
    fd: int
    """Here; close-on-exec, and the caller's."""
    flags: int
    """Of open(2), as they were."""
    offset: int | None
    """Where the next read begins; None where that means nothing."""
    close_on_exec: bool
    """In the task."""
    key: str | None
    """Set for what the task had in another way than as a descriptor: cwd, root, exe, map:…"""


class Connection:
    """What is said to the server, in this order: `hello`, `ready`, `wait_released`.

    Leaving the block before the last of them has returned breaks the barrier: no task is released.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.connect(path)
            credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            _, user, _ = struct.unpack("3i", credentials)
            if user not in (0, os.geteuid()):
                # What it hands over would end up in a process that trusts it.
                raise Refused(f"user {user} serves there")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def hello(self, task: int) -> list[File]:
        """The files of the task with this pid in the images. Refused: it is not to be had."""
        self._send({"type": "hello", "version": 1, "task": task})
        files = []
        more = True
        while more:
            message, fds = self._receive("files")
            for row, fd in zip(message["files"], fds, strict=True):
                about = row["flags"], row["offset"], row["close_on_exec"]
                files.append(File(row["fd"], fd, *about, row.get("key")))
            more = message["more"]
        return files

    def ready(self) -> None:
        """Arrive at the barrier: this task is as far as it was to come."""
        self._send({"type": "ready"})

    def wait_released(self) -> None:
        """Wait until all tasks have arrived and the mounts are back. Aborted: one did not."""
        self._receive("released")

    def abort(self, reason: str) -> None:
        """End it for all tasks, and let the others know why."""
        self._send({"type": "abort", "reason": reason})

    def keep_clear_of(self, above: int) -> None:
        """Move the connection itself out of the way of the numbers below `above`."""
        moved = fcntl.fcntl(self._socket, fcntl.F_DUPFD_CLOEXEC, above)
        self._socket.close()
        self._socket = socket.socket(fileno=moved)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._socket.send(json.dumps(message).encode(), socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has closed, and what it said before that is still to be received

    def _receive(self, expected: str) -> tuple[dict[str, Any], list[int]]:
        data, fds, flags, _ = socket.recv_fds(
            self._socket, MAX_MESSAGE, MAX_FDS, socket.MSG_CMSG_CLOEXEC
        )
        if flags & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            raise Aborted("descriptors were lost: RLIMIT_NOFILE is too low")
        if not data:
            raise Aborted("the server is gone")
        message: dict[str, Any] = json.loads(data)
        if message["type"] == "abort":
            raise (Refused if message.get("refused") else Aborted)(message["reason"])
        if message["type"] != expected:
            raise Aborted(f"the server said {message['type']} instead of {expected}")
        return message, fds


def place(files: list[File]) -> None:
    """Put each descriptor at its number, inheritable; what is there now is closed."""
    above = max((file.number for file in files), default=2) + 1
    # First out of the way of each other's numbers, then each to its own.
    moved = []
    for file in files:
        moved.append(fcntl.fcntl(file.fd, fcntl.F_DUPFD_CLOEXEC, above))
        os.close(file.fd)
    for file, fd in zip(files, moved, strict=True):
        os.dup2(fd, file.number)
        os.close(fd)


def main(path: str, task: str, *command: str) -> None:
    """Become the command."""
    with Connection(path) as connection:
        files = connection.hello(int(task))
        above = max((file.number for file in files), default=2) + 1
        connection.keep_clear_of(above)
        stderr = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, above)
        try:
            place(files)
            connection.ready()
            connection.wait_released()
            os.environ["GHOSTPOOL_TASK"] = task
            cloexec = sorted(file.number for file in files if file.close_on_exec)
            os.environ["GHOSTPOOL_CLOEXEC"] = ",".join(map(str, cloexec))
            keys = {file.key: file.number for file in files if file.key}
            os.environ["GHOSTPOOL_KEYS"] = json.dumps(keys)
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it
            os.execvp(command[0], command)
        finally:
            os.dup2(stderr, 2)  # what went wrong is for people, and 2 may be a ghost's by now


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(f"usage: {sys.argv[0]} SOCKET TASK COMMAND [ARGUMENT...]")
    try:
        main(*sys.argv[1:])
    except (Aborted, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        print(f"fetch.py: {error!r}", file=sys.stderr)
        sys.exit(2 if isinstance(error, Refused) else 1)
