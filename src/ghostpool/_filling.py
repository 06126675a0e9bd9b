"""Putting back the bytes that waited in a fifo, before anybody opens it.

A pipe's buffer is there as long as an end of it is open, whichever. So the bytes go in through an
end of our own, open for reading and writing, which never blocks; it goes back to the coordinator,
and keeps them until all the real ends are open.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import Any

from ghostpool import _linux
from ghostpool._directories import Directories
from ghostpool._failed import Failed, Mismatch, Work
from ghostpool._linux import INSIDE
from ghostpool._protocol import STREAMED, FillOp


class FillWork(Work):
    """The request that fills fifos. `own_fds` is the worker's /proc/self/fd, the host's."""

    def __init__(self, directories: Directories, own_fds: int) -> None:
        self._directories = directories
        self._own_fds = own_fds

    def do_fill(self, out: list[int], operations: list[tuple[Any, ...]], images: int) -> list[Any]:
        """Fill fifos that have their temporary names; an end of each goes back, in order."""
        for index, fields in enumerate(operations):
            operation = FillOp(*fields)
            try:
                self._step = "openat2"
                out.append(self._fill(operation, images))
            except (Mismatch, OSError) as error:
                path = operation.directory + b"/" + operation.name
                if isinstance(error, Mismatch):
                    raise Failed(index, 0, str(error), path, operation.mount) from error
                code = error.errno or errno.EIO
                raise Failed(index, code, self._step, path, operation.mount) from error
        return []

    def _fill(self, operation: FillOp, images: int) -> int:
        directory = self._directories.open(operation.mount, operation.directory)
        self._step = "openat2"
        path_fd = _linux.openat2(directory, operation.name, os.O_PATH | os.O_NOFOLLOW, INSIDE)
        try:
            self._step = "fstat"
            status = os.fstat(path_fd)
            if (status.st_dev, status.st_ino) != (operation.device, operation.inode):
                raise Mismatch("identity: another file has the name")
            if not stat.S_ISFIFO(status.st_mode):
                raise Mismatch("type: it is no fifo")
            self._step = "openat"
            flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(b"%d" % path_fd, flags, dir_fd=self._own_fds)
            try:
                self._resize(fd, operation.size)
                if operation.length:
                    self._copy(operation, images, fd)
                if operation.times is not None:
                    # Writing has changed them.
                    self._step = "utimensat"
                    _linux.utimens_fd(path_fd, *operation.times)
            except BaseException:
                os.close(fd)
                raise
            return fd
        finally:
            os.close(path_fd)

    def _resize(self, fd: int, size: int) -> None:
        self._step = "fcntl of the pipe"
        if not size or fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) == size:
            return
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
        except OSError as error:
            # EPERM: the user has too many pages in pipes (fs.pipe-user-pages-soft); what matters is
            # whether the bytes fit, which writing them tells.
            if error.errno != errno.EPERM:
                raise

    def _copy(self, operation: FillOp, images: int, fd: int) -> None:
        image = images
        if operation.image:
            self._step = "open of the image"
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            image = os.open(operation.image, flags, dir_fd=images)
        try:
            # At most what a pipe may hold, which the plan has seen to.
            self._step = "read of the image"
            if operation.position == STREAMED:
                data = _read_all(image, operation.length)
            else:
                data = os.pread(image, operation.length, operation.position)
        finally:
            if operation.image:
                os.close(image)
        if len(data) != operation.length:
            raise Mismatch("length of the image: it was cut since the plan")
        self._step = "write to the pipe"
        try:
            written = os.write(fd, data)
        except BlockingIOError:
            written = 0
        if written != len(data):
            raise Mismatch(f"room: {len(data)} bytes waited in it, and {written} fit")


def _read_all(stream: int, length: int) -> bytes:
    """So many bytes of a stream; fewer if it ends."""
    data = b""
    while len(data) < length and (piece := os.read(stream, length - len(data))):
        data += piece
    return data
