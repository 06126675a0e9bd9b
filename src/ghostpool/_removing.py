"""Taking names away, if they still are what was made there."""

from __future__ import annotations

import errno
import os
import stat
import time
from typing import Any

from ghostpool import _linux
from ghostpool._directories import Directories
from ghostpool._failed import Work
from ghostpool._linux import INSIDE
from ghostpool._protocol import NOTHING, OTHER, REMOVED, Removed, RemoveOp

_AGAIN_S = 0.005
_TRIES = 200
"""For all names of a request together: a second."""


class RemoveWork(Work):
    """Requests that remove names."""

    def __init__(self, directories: Directories) -> None:
        self._directories = directories

    def do_remove(self, _: list[int], operations: list[tuple[Any, ...]]) -> list[Any]:
        """Take names away; one that resists does not stop the others.

        A directory that a link or a mount stands in for is waited for a moment: whoever exchanges
        it and back must not make us leave something there.
        """
        done: list[Any] = []
        waited = 0
        for fields in operations:
            operation = RemoveOp(*fields)
            removed = self._remove(operation)
            while removed.errno in (errno.ELOOP, errno.EXDEV) and waited < _TRIES:
                waited += 1
                time.sleep(_AGAIN_S)
                self._directories.forget()
                removed = self._remove(operation)
            done.append(tuple(removed))
        return done

    def _remove(self, operation: RemoveOp) -> Removed:
        left: list[bytes] = []
        found = NOTHING
        try:
            try:
                self._step = "openat2"
                directory = self._directories.open(operation.mount, operation.directory)
                self._step = "fstatat"
                status = os.stat(operation.name, dir_fd=directory, follow_symlinks=False)
                own = (status.st_dev, status.st_ino) == (operation.device, operation.inode)
                found = REMOVED if own or not operation.inode else OTHER
                if found == REMOVED:
                    if stat.S_ISDIR(status.st_mode):
                        self._remove_directory(operation)
                    else:
                        self._step = "unlinkat"
                        os.unlink(operation.name, dir_fd=directory)
            except FileNotFoundError:
                found = NOTHING
            if operation.parents:
                self._step = "rmdir"
                left = self._directories.remove(operation.mount, self._parent_paths(operation))
        except OSError as error:
            return Removed(error.errno or errno.EIO, self._step, (), found)
        return Removed(0, "", tuple(left), found)

    def _parent_paths(self, operation: RemoveOp) -> list[bytes]:
        components = operation.directory.split(b"/")
        outer = len(components) - len(operation.parents)
        return [b"/".join(components[: n + 1]) for n in range(outer, len(components))]

    def _rename(self, directory: int, old: bytes, new: bytes) -> None:
        self._step = "renameat2"
        _linux.renameat2(directory, old, directory, new, _linux.RENAME_NOREPLACE)

    def _remove_directory(self, operation: RemoveOp) -> None:
        self._directories.forget()
        self._step = "openat2"
        directory = self._directories.open(operation.mount, operation.directory)
        if operation.times is not None:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            fd = _linux.openat2(directory, operation.name, flags, INSIDE)
            try:
                self._step = "fstat"
                status = os.fstat(fd)
                if (status.st_dev, status.st_ino) == (operation.device, operation.inode):
                    self._step = "utimensat"
                    _linux.utimens_fd(fd, *operation.times)
            finally:
                os.close(fd)
        name = operation.name
        for wanted in operation.wanted:
            try:
                self._rename(directory, name, wanted)
            except OSError:
                continue  # taken, or a file system that can not: it goes by the name that it has
            name = wanted
            self._step = "fstatat"
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if (status.st_dev, status.st_ino) != (operation.device, operation.inode):
                self._rename(directory, name, operation.name)
                raise OSError(errno.ESTALE, "another directory has the name")
            break
        self._step = "rmdir"
        os.rmdir(name, dir_fd=directory)
