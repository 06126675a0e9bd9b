"""Finding files that have a name: those that link remaps lead to. Nothing is opened or changed."""

from __future__ import annotations

import errno
import os
from typing import Any

from ghostpool._directories import Directories
from ghostpool._failed import Work
from ghostpool._protocol import Found


class FindWork(Work):
    """Requests that ask what has a name."""

    def __init__(self, directories: Directories) -> None:
        self._directories = directories

    def do_find(self, _: list[int], places: list[tuple[int, bytes, bytes]]) -> list[Any]:
        """What each name in a directory of a mount leads to; one that fails says why."""
        return [tuple(self._find(*place)) for place in places]

    def _find(self, mount: int, path: bytes, name: bytes) -> Found:
        try:
            self._step = "openat2"
            directory = self._directories.open(mount, path)
            self._step = "fstat"
            above = os.fstat(directory)
            self._step = "fstatat"
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            return Found(error.errno or errno.EIO, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        return Found(
            0,
            status.st_dev,
            status.st_ino,
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_size,
            status.st_nlink,
            above.st_dev,
            above.st_ino,
        )
