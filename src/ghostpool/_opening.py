"""Opening ghosts for their tasks: link to the old name, open, check, take the name away."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any

from ghostpool import _linux
from ghostpool._directories import Directories
from ghostpool._failed import Failed, Mismatch, Work
from ghostpool._linux import INSIDE
from ghostpool._protocol import Opened, OpenOp


class OpenWork(Work):
    """Requests that open ghosts. `own_fds` is the worker's /proc/self/fd, the host's."""

    def __init__(self, directories: Directories, own_fds: int) -> None:
        self._directories = directories
        self._own_fds = own_fds

    def do_open(self, out: list[int], operations: list[tuple[Any, ...]]) -> list[Any]:
        """Link, open, check, unlink; the descriptors go back in order."""
        return self._each(operations, self._open, out)

    def do_open_discarded(self, out: list[int], operations: list[tuple[Any, ...]]) -> list[Any]:
        """The same for files that nobody takes: what is kept by name, or has lost its last one, is
        closed at once.

        Descriptors of ghosts that others open too go back: they have a name for a while yet.
        """
        return self._each(operations, self._open_and_close, out)

    def _each(
        self,
        operations: list[tuple[Any, ...]],
        open_one: Callable[[OpenOp, list[int]], Opened],
        out: list[int],
    ) -> list[Any]:
        done: list[Any] = []
        for index, fields in enumerate(operations):
            operation = OpenOp(*fields)
            try:
                self._step = "openat2"
                done.append(tuple(open_one(operation, out)))
            except (Mismatch, OSError) as error:
                path = operation.live_directory + b"/" + operation.names[0]
                if isinstance(error, Mismatch):
                    raise Failed(index, 0, str(error), path, operation.live) from error
                code = error.errno or errno.EIO
                raise Failed(index, code, self._step, path, operation.live) from error
        return done

    def _open_and_close(self, operation: OpenOp, out: list[int]) -> Opened:
        opened: list[int] = []
        try:
            result = self._open(operation, opened)
            if operation.keep:
                return result
            if operation.move:
                self._step = "fstat"
                links = os.fstat(opened[0]).st_nlink
                if links:
                    raise Mismatch(f"number of names: another process has given it {links}")
            else:
                out.append(opened.pop())
            return result
        finally:
            _linux.close_all(opened)

    def _open(self, operation: OpenOp, out: list[int]) -> Opened:
        if not operation.temp_name:
            directory = self._directories.open(operation.live, operation.live_directory)
            out.append(self._open_checked(operation, directory, operation.names[0]))
            return Opened(0, ())
        self._step = "mkdirat"
        made = self._directories.make(operation.link, operation.link_directory)
        linked = False
        used = 0
        try:
            self._step = "openat2"
            link_to = self._directories.open(operation.link, operation.link_directory)
            used = self._link(operation, link_to)
            linked = True
            self._step = "openat2"
            if operation.live == operation.link:
                directory = link_to
            else:
                directory = self._directories.open(operation.live, operation.live_directory)
            fd = self._open_checked(operation, directory, operation.names[used])
            out.append(fd)
            if operation.keep:
                return Opened(used, ())
            # Whoever has put another file there since keeps it.
            if self._has_identity(operation, link_to, operation.names[used]):
                self._step = "unlinkat"
                os.unlink(operation.names[used], dir_fd=link_to)
            linked = False
        except BaseException:
            if linked:
                self._unlink_own(operation, link_to, operation.names[used])
            self._directories.remove(operation.link, made)
            raise
        self._step = "rmdir"
        left = self._directories.remove(operation.link, made) if made else ()
        return Opened(used, tuple(left))

    def _link(self, operation: OpenOp, link_to: int) -> int:
        source = self._directories.open(operation.link, operation.temp_directory)
        last = len(operation.names) - 1
        for number, name in enumerate(operation.names):
            try:
                if operation.move:
                    self._move(operation, source, link_to, name)
                else:
                    self._make_link(source, operation.temp_name, link_to, name)
            except FileExistsError:
                if operation.keep and self._has_identity(operation, link_to, name):
                    break
                if number == last:
                    raise
            else:
                break
        return number

    def _move(self, operation: OpenOp, source: int, to: int, new: bytes) -> None:
        old = operation.temp_name
        try:
            self._step = "renameat2"
            _linux.renameat2(source, old, to, new, _linux.RENAME_NOREPLACE)
        except OSError as error:
            # Not every file system can rename and leave alone what is there.
            if error.errno != errno.EINVAL:
                raise
            self._make_link(source, old, to, new)
            if self._has_identity(operation, source, old):
                self._step = "unlinkat"
                os.unlink(old, dir_fd=source)

    def _make_link(self, source: int, old: bytes, to: int, new: bytes) -> None:
        self._step = "linkat"
        os.link(old, new, src_dir_fd=source, dst_dir_fd=to, follow_symlinks=False)

    def _has_identity(self, operation: OpenOp, directory: int, name: bytes) -> bool:
        self._step = "fstatat"
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return (status.st_dev, status.st_ino) == (operation.device, operation.inode)

    def _unlink_own(self, operation: OpenOp, directory: int, name: bytes) -> None:
        """Also if something else had the temporary name when it was linked: it still has that.

        What was moved and is not ours stays where it is: it may be a file that somebody has put
        there since.
        """
        try:
            self._undo_step = "fstatat"
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            own = (status.st_dev, status.st_ino) == (operation.device, operation.inode)
            if own or (not operation.move and self._is_link(operation, status)):
                self._undo_step = "unlinkat"
                os.unlink(name, dir_fd=directory)
        except OSError:
            pass

    def _is_link(self, operation: OpenOp, new: os.stat_result) -> bool:
        source = self._directories.open(operation.link, operation.temp_directory)
        self._undo_step = "fstatat"
        old = os.stat(operation.temp_name, dir_fd=source, follow_symlinks=False)
        return os.path.samestat(old, new)

    def _open_checked(self, operation: OpenOp, directory: int, name: bytes) -> int:
        is_fifo = stat.S_ISFIFO(operation.mode)
        fd, status = self._open_own(operation, directory, name, is_fifo)
        try:
            self._check_identity(operation, status)
            if operation.mode >= 0 and status.st_mode != operation.mode:
                raise Mismatch(f"mode: {status.st_mode:o} instead of {operation.mode:o}")
            if operation.size >= 0 and status.st_size != operation.size:
                raise Mismatch(f"size: {status.st_size} instead of {operation.size}")
            if operation.position >= 0 and not operation.flags & os.O_PATH and not is_fifo:
                self._step = "lseek"
                try:
                    os.lseek(fd, operation.position, os.SEEK_SET)
                except OSError as error:
                    # Some devices can not be seeked; then their position was never set either.
                    if error.errno != errno.ESPIPE or stat.S_ISREG(status.st_mode):
                        raise
        except BaseException:
            os.close(fd)
            raise
        return fd

    @staticmethod
    def _check_identity(operation: OpenOp, status: os.stat_result) -> None:
        if (status.st_dev, status.st_ino) != (operation.device, operation.inode):
            raise Mismatch("identity: another file has the name")

    def _open_own(
        self, operation: OpenOp, directory: int, name: bytes, is_fifo: bool
    ) -> tuple[int, os.stat_result]:
        """Open the file of the expected identity, and no other: opening another one may block for
        ever (a fifo) or set off a device, and tasks of the container can exchange names."""
        path_flags = os.O_PATH | os.O_NOFOLLOW
        self._step = "openat2"
        if operation.flags & os.O_PATH:
            return self._with_status(_linux.openat2(directory, name, operation.flags, INSIDE))
        path_fd = _linux.openat2(directory, name, path_flags, INSIDE)
        helper = -1
        try:
            self._step = "fstat"
            status = os.fstat(path_fd)
            self._check_identity(operation, status)
            if operation.flags & os.O_NOFOLLOW:
                # Its flag would refuse the magic link, so it has to be opened by its name.
                return self._with_status(self._open_regular_by_name(operation, directory, name))
            own = b"%d" % path_fd
            if is_fifo:
                # A reader waits for a writer, a writer without a reader is refused: be both.
                self._step = "openat"
                helper = os.open(own, os.O_RDWR | os.O_NONBLOCK, dir_fd=self._own_fds)
            self._step = "openat"
            return os.open(own, operation.flags, dir_fd=self._own_fds), status
        finally:
            os.close(path_fd)
            if helper >= 0:
                os.close(helper)

    def _open_regular_by_name(self, operation: OpenOp, directory: int, name: bytes) -> int:
        flags = operation.flags | os.O_NONBLOCK
        self._step = "openat2"
        fd = _linux.openat2(directory, name, flags, INSIDE)
        if not operation.flags & os.O_NONBLOCK:
            try:
                self._step = "fcntl"
                os.set_blocking(fd, True)
            except OSError:
                os.close(fd)
                raise
        return fd

    def _with_status(self, fd: int) -> tuple[int, os.stat_result]:
        try:
            self._step = "fstat"
            return fd, os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
