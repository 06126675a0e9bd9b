"""Starting the reader of images, and telling it what to read, before anything heavy is imported.

As with the fork server (see _launch) the boot, and here the reading too, takes place on another
CPU while the coordinator imports the rest.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from typing import NamedTuple

from ghostpool._errors import PlanError
from ghostpool._launch import execute, package_root

_BOOT = "import sys; sys.path += {paths!r}; from ghostpool import _reader as r; r.main(3)"


class Reading(NamedTuple):
    """A reader that is at work, or boots."""

    pid: int
    socket: int
    """The coordinator's end of its socket."""
    directory: int
    """The images, or the archive that they are in; the reader has it too."""
    path: str
    """As the user named it."""
    size: int
    """Largest apparent size of a ghost."""
    pidfd: int
    """Of the reader, whose pid may be another one's as soon as somebody has reaped it."""
    all_mounts: bool = True
    """False: only those that files were opened on, and what finding them again takes."""
    devshm: int = -1
    """The archive of a container's /dev/shm, if there is one; the reader has it too."""


def start_reading(
    path: str, size: int, *, all_mounts: bool = True, devshm: str | None = None
) -> Reading:
    """Have the images in the directory or archive `path` read. PlanError: there is none.

    `devshm`: the archive of a container's /dev/shm. PlanError: it can not be opened.

    A fresh interpreter in isolated mode, with an empty environment, and with no descriptor besides
    its socket, the images and /dev/null. It finds the modules where this process does.
    OSError if the interpreter can not be executed.
    """
    import _socket

    directory = open_images(path)
    archive = -1
    if devshm is not None:
        try:
            archive = os.open(devshm, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            os.close(directory)
            raise PlanError(f"--devshm {devshm}: {error.strerror}") from error
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        request = json.dumps([path, size, all_mounts, devshm]).encode()
        fds = b"".join(fd.to_bytes(4, sys.byteorder) for fd in (directory, archive) if fd >= 0)
        ours.sendmsg(
            [len(request).to_bytes(4, "little"), request],
            [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)],
        )
        pid = _spawn(theirs.fileno())
    except BaseException:
        os.close(directory)
        if archive >= 0:
            os.close(archive)
        ours.close()
        raise
    finally:
        theirs.close()
    pidfd = os.pidfd_open(pid)
    return Reading(pid, ours.detach(), directory, path, size, pidfd, all_mounts, archive)


def open_images(path: str) -> int:
    """A directory of images, or what may be an archive of them. PlanError: it is neither."""
    remedy = "name the directory that was given to criu dump -D, or a checkpoint archive"
    try:
        # Whoever opens a fifo without O_NONBLOCK waits for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}: {remedy}") from error
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind not in (stat.S_IFDIR, stat.S_IFREG):
        os.close(fd)
        raise PlanError(f"{path}: is neither a directory nor a regular file: {remedy}")
    return fd


def _spawn(socket: int) -> int:
    paths = [package_root(), *filter(os.path.isabs, sys.path)]
    return execute(_BOOT.format(paths=paths), socket, null=(0, 1, 2))


__all__ = ["Reading", "open_images", "start_reading"]
