"""Making ghosts under temporary names, and moving directories to their old ones."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from ghostpool import _linux
from ghostpool._directories import Directories
from ghostpool._failed import Failed, Mismatch, Work
from ghostpool._linux import INSIDE
from ghostpool._protocol import STREAMED, Created, CreateOp, Placed, PlaceOp

_COPY_CHUNK = 1 << 20
_NEW_NS = 10 * 10**9


class CreateWork(Work):
    """Requests that make ghosts. `own_fds` is the worker's /proc/self/fd, the host's."""

    def __init__(self, directories: Directories, own_fds: int) -> None:
        self._directories = directories
        self._own_fds = own_fds
        self._images = -1
        self.owner = os.geteuid()
        """Whose new files are."""

    def do_create(
        self, out: list[int], operations: list[tuple[Any, ...]], images: int
    ) -> list[Any]:
        """Make ghosts under temporary names; contents are in `images`, a directory or a file."""
        self._images = images
        done: list[Any] = []
        for index, fields in enumerate(operations):
            operation = CreateOp(*fields)
            try:
                self._step = "openat2"
                done.append(tuple(self._create(operation)))
            except Mismatch as error:
                raise Failed(
                    index, 0, str(error), operation.image, operation.mount, done
                ) from error
            except OSError as error:
                path = operation.directory + b"/" + operation.name
                code = error.errno or errno.EIO
                raise Failed(index, code, self._step, path, operation.mount, done) from error
        return done

    def _create(self, operation: CreateOp) -> Created:
        directory = self._directories.open(operation.mount, operation.directory)
        kind = stat.S_IFMT(operation.mode)
        if kind == stat.S_IFREG:
            return self._create_regular(operation, directory)
        name = operation.name
        if kind == stat.S_IFDIR:
            self._step = "mkdirat"
            os.mkdir(name, 0o700, dir_fd=directory)
        elif kind == stat.S_IFLNK:
            self._step = "symlinkat"
            os.symlink(operation.target, name, dir_fd=directory)
        else:
            self._step = "mknodat"
            os.mknod(name, kind | 0o600, operation.rdev, dir_fd=directory)
        try:
            self._step = "openat2"
            flags = os.O_NOFOLLOW
            flags |= os.O_RDONLY | os.O_DIRECTORY if kind == stat.S_IFDIR else os.O_PATH
            fd = _linux.openat2(directory, name, flags, INSIDE)
            try:
                self._step = "fstat"
                status = os.fstat(fd)
                if not self._is_new(status, kind, operation.rdev, os.fstat(directory)):
                    raise Mismatch("identity of the new file")
                self._step = "fchownat"
                _linux.lchown_fd(fd, operation.uid, operation.gid)
                if kind != stat.S_IFLNK:
                    # A default ACL has changed the mode, or chown the setuid and setgid bits.
                    self._step = "fchmodat"
                    os.chmod(b"%d" % fd, stat.S_IMODE(operation.mode), dir_fd=self._own_fds)
                if operation.times is not None:
                    self._step = "utimensat"
                    _linux.utimens_fd(fd, *operation.times)
            finally:
                os.close(fd)
            return Created(status.st_dev, status.st_ino)
        except BaseException:
            try:
                if kind == stat.S_IFDIR:
                    self._undo_step = "rmdir"
                    os.rmdir(name, dir_fd=directory)
                else:
                    self._undo_step = "unlinkat"
                    os.unlink(name, dir_fd=directory)
            except OSError:
                pass
            raise

    def _is_new(
        self, status: os.stat_result, kind: int, rdev: int, directory: os.stat_result
    ) -> bool:
        """Whether this can be what was just made in the directory.

        No call makes such a file and opens it; a task of the container sees the name and may have
        moved something else there, of root perhaps, whose owner would be changed. What it has not
        made itself it can give no other mode or time: so it must be closed to others and as young
        as the directory's latest change, by the file system's own clock.
        """
        open_to_others = kind != stat.S_IFLNK and status.st_mode & 0o5077
        return (
            stat.S_IFMT(status.st_mode) == kind
            and status.st_rdev == rdev
            and status.st_uid == self.owner
            and not open_to_others
            and abs(status.st_mtime_ns - directory.st_mtime_ns) < _NEW_NS
        )

    def _create_regular(self, operation: CreateOp, directory: int) -> Created:
        name = operation.name
        self._step = "openat"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=directory)
        try:
            try:
                self._fill(fd, operation)
                # chown clears the setuid and setgid bits, so chmod follows; times come last.
                self._step = "fchown"
                os.fchown(fd, operation.uid, operation.gid)
                self._step = "fchmod"
                os.fchmod(fd, stat.S_IMODE(operation.mode))
                if operation.times is not None:
                    self._step = "utimensat"
                    os.utime(fd, ns=operation.times)
                self._step = "fstat"
                status = os.fstat(fd)
                return Created(status.st_dev, status.st_ino)
            finally:
                os.close(fd)
        except BaseException:
            try:
                self._undo_step = "unlinkat"
                os.unlink(name, dir_fd=directory)
            except OSError:
                pass
            raise

    def _fill(self, fd: int, operation: CreateOp) -> None:
        end = 0
        if operation.extents:
            self._step = "open of the image"
            image = self._images
            if operation.image:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                image = os.open(operation.image, flags, dir_fd=self._images)
            try:
                for offset, length, position in operation.extents:
                    self._copy(image, position, fd, offset, length)
                    end = offset + length
            finally:
                if operation.image:
                    os.close(image)
        if end != operation.size:
            # The file ends in a hole (or is one): no content reaches its last byte.
            self._step = "ftruncate"
            os.ftruncate(fd, operation.size)

    def _copy(self, image: int, position: int, fd: int, offset: int, length: int) -> None:
        # Read and write: copy_file_range says EXDEV between file systems and is slower from
        # an offset that is no multiple of a block, which content in an image never has.
        streamed = position == STREAMED
        while length:
            self._step = "read of the image"
            most = min(length, _COPY_CHUNK)
            data = os.read(image, most) if streamed else os.pread(image, most, position)
            if not data:
                raise Mismatch("length of the image: it was cut since the plan")
            self._step = "pwrite"
            _linux.write_all(fd, data, offset)
            position += len(data)
            offset += len(data)
            length -= len(data)

    def do_place(self, out: list[int], operations: list[tuple[Any, ...]]) -> list[Any]:
        """Move directory ghosts to their old names."""
        done: list[Any] = []
        for index, fields in enumerate(operations):
            operation = PlaceOp(*fields)
            try:
                self._step = "mkdirat"
                done.append(tuple(self._place(operation)))
            except (Mismatch, OSError) as error:
                path = b"/".join([operation.directory, *operation.parents, operation.final[0]])
                if isinstance(error, Mismatch):
                    raise Failed(index, 0, str(error), path, operation.mount, done) from error
                code = error.errno or errno.EIO
                raise Failed(index, code, self._step, path, operation.mount, done) from error
        return done

    def _place(self, operation: PlaceOp) -> Placed:
        above = [operation.directory] if operation.directory else []
        place = b"/".join([*above, *operation.parents])
        made = self._directories.make(operation.mount, place)
        try:
            self._step = "openat2"
            source = self._directories.open(operation.mount, operation.directory)
            to = self._directories.open(operation.mount, place)
            last = len(operation.final) - 1
            for number, name in enumerate(operation.final):
                if (name, place) == (operation.name, operation.directory):
                    break
                try:
                    self._step = "renameat2"
                    _linux.renameat2(source, operation.name, to, name, _linux.RENAME_NOREPLACE)
                except FileExistsError:
                    if number == last:
                        raise
                else:
                    break
            self._step = "fstatat"
            status = os.stat(name, dir_fd=to, follow_symlinks=False)
            if (status.st_dev, status.st_ino) != (operation.device, operation.inode):
                # What somebody has put under the temporary name is his, and goes back there.
                self._step = "renameat2"
                _linux.renameat2(to, name, source, operation.name, _linux.RENAME_NOREPLACE)
                raise Mismatch("identity: another file has the temporary name")
            return Placed(number, len(made))
        except BaseException:
            self._directories.remove(operation.mount, made)
            raise
