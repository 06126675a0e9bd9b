"""The socket that descriptors are served on, from its name to its end.

It is bound here, or was bound and is listening already when this process was started (socket
activation): then its name and its mode are the business of whoever bound it.
"""

from __future__ import annotations

import os
import secrets
import socket
import stat

from ghostpool._errors import PlanError
from ghostpool._rundir import run_directory


class Listener:
    """The bound socket; made before anything is restored, so that a bad path is refused first."""

    def __init__(self, path: str | None, run_dir: str | None = None) -> None:
        """PlanError if it can not be bound. Without a path: a random name in the run directory."""
        if path is None:
            name = f"{os.getpid()}-{secrets.token_hex(4)}.sock"
            path = os.path.join(run_directory() if run_dir is None else run_dir, name)
        self.path: str = os.path.abspath(path)
        _check_directory(os.path.dirname(self.path))
        self.socket: socket.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # The mode of the name that bind(2) makes, less the umask, which is all threads' own.
            os.fchmod(self.socket.fileno(), 0o600)
            self.socket.bind(self.path)
            self._identity = _identity(self.path)
            self.socket.listen(128)
        except OSError as error:
            self.socket.close()
            raise PlanError(f"--serve {self.path}: {error.strerror or error}") from error
        self.socket.setblocking(False)

    @classmethod
    def inherited(cls, descriptors: list[int]) -> Listener:
        """On the one socket among `descriptors`, which it owns from then on."""
        if len(descriptors) != 1:
            raise PlanError(f"LISTEN_FDS: {len(descriptors)} sockets to serve on, expected one")
        self = cls.__new__(cls)
        try:
            self.socket = socket.socket(fileno=descriptors[0])
        except OSError as error:
            raise PlanError(f"LISTEN_FDS: no socket to serve on: {error.strerror}") from error
        self._identity = None
        try:
            self.path = _checked_name(self.socket)
        except PlanError:
            self.socket.close()
            raise
        self.socket.setblocking(False)
        return self

    def close(self) -> None:
        """Take the name away and stop listening."""
        self.socket.close()
        if self._identity is not None and _identity(self.path) == self._identity:
            os.unlink(self.path)


def _checked_name(inherited: socket.socket) -> str:
    """The path of a socket that can be served on. PlanError: it is of another kind."""
    sequenced = inherited.family == socket.AF_UNIX and inherited.type == socket.SOCK_SEQPACKET
    if not sequenced or not inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise PlanError(
            f"LISTEN_FDS: descriptor {inherited.fileno()} is no listening UNIX SOCK_SEQPACKET "
            "socket (systemd: ListenSequentialPacket=PATH with Accept=no)"
        )
    name = inherited.getsockname()
    if not isinstance(name, str) or not name.startswith("/"):
        # An abstract one is reached by everybody in the network namespace, root of a container
        # too; one that is named relatively leads somewhere else from anywhere else.
        raise PlanError(f"LISTEN_FDS: the socket to serve on is at {name!r}, not at a full path")
    return name


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _check_directory(path: str) -> None:
    """PlanError if others could put a socket of theirs in the place of ours: consumers would
    fetch the descriptors from them."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise PlanError(f"--serve {path}: {error.strerror}") from error
    foreign = status.st_uid not in (0, os.geteuid())
    shared = status.st_mode & stat.S_IWOTH or (
        status.st_mode & stat.S_IWGRP and status.st_gid != os.getegid()
    )
    if foreign or (shared and not status.st_mode & stat.S_ISVTX):
        raise PlanError(f"--serve: others may rename files in {path}: name another directory")
