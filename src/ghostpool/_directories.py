"""Directories inside mounts, for a worker: found by the kernel, made and removed one by one.

Every path is resolved by openat2 from the mount's own root, inside that mount and through no link,
so whoever renames or mounts in the container can not steer it out. Descriptors are cached.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any

from ghostpool import _linux
from ghostpool._failed import Work
from ghostpool._linux import INSIDE
from ghostpool._protocol import Look

_CACHE = 128
_PARENT_MODE = 0o755


class Directories(Work):
    """The directories of one worker; `mounts` are its mount roots, by handle."""

    def __init__(self, mounts: Mapping[int, int]) -> None:
        self._mounts = mounts
        self._open: dict[tuple[int, bytes], int] = {}

    def open(self, mount: int, path: bytes) -> int:
        """A cached O_PATH descriptor of an existing directory inside a mount."""
        if not path:
            return self._mounts[mount]
        key = (mount, path)
        fd = self._open.get(key)
        if fd is None:
            if len(self._open) >= _CACHE:
                os.close(self._open.pop(next(iter(self._open))))
            self._step = "openat2"
            fd = _linux.openat2(self._mounts[mount], path, os.O_PATH | os.O_DIRECTORY, INSIDE)
            self._open[key] = fd
        return fd

    def make(self, mount: int, path: bytes) -> list[bytes]:
        """Make what is missing of `path`; the paths that were made, outermost first."""
        try:
            self.open(mount, path)
            return []
        except FileNotFoundError:
            pass
        made: list[bytes] = []
        at = b""
        try:
            for component in path.split(b"/"):
                below = at + b"/" + component if at else component
                try:
                    self.open(mount, below)
                except FileNotFoundError:
                    above = self.open(mount, at)
                    self._step = "mkdirat"
                    os.mkdir(component, _PARENT_MODE, dir_fd=above)
                    made.append(below)
                    self.open(mount, below)
                at = below
        except BaseException:
            self.remove(mount, made)
            raise
        return made

    def remove(self, mount: int, paths: list[bytes]) -> list[bytes]:
        """Remove directories that we made, innermost first; those that somebody else uses stay,
        and are returned."""
        try:
            for number, path in enumerate(reversed(paths)):
                above, _, name = path.rpartition(b"/")
                try:
                    directory = self.open(mount, above)
                    self._step = "rmdir"
                    os.rmdir(name, dir_fd=directory)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                        raise
                    return list(paths[: len(paths) - number])
            return []
        finally:
            if paths:
                # Descriptors of what is gone; other mounts may know it by other paths.
                self.forget()

    def do_look(
        self, _: list[int], places: list[tuple[int, bytes, tuple[bytes, ...]]]
    ) -> list[Any]:
        """What stands at old names: how much of the directory exists, and which are taken."""
        return [tuple(self._look(*place)) for place in places]

    def _look(self, mount: int, path: bytes, names: tuple[bytes, ...]) -> Look:
        components = path.split(b"/") if path else []
        existing = len(components)
        try:
            while True:
                try:
                    fd = self.open(mount, b"/".join(components[:existing]))
                    break
                except FileNotFoundError:
                    existing -= 1
            self._step = "fstat"
            status = os.fstat(fd)
        except OSError as error:
            return Look(existing, 0, 0, (), error.errno or errno.EIO, ())
        whole = existing == len(components)
        taken = tuple(whole and self._exists(fd, name) for name in names)
        alternative = tuple(
            is_taken and self._exists(fd, name + b".cr_link")
            for name, is_taken in zip(names, taken, strict=True)
        )
        return Look(existing, status.st_dev, status.st_ino, taken, 0, alternative)

    def _exists(self, directory: int, name: bytes) -> bool:
        try:
            self._step = "fstatat"
            os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            # A name that can not exist (too long) is not taken; linking will say why it fails.
            return error.errno != errno.ENAMETOOLONG
        return True

    def do_forget_directories(self, _: list[int]) -> None:
        """Drop cached directories, on request."""
        self.forget()

    def forget(self) -> None:
        """Drop cached directories: between planning and acting they may have been replaced."""
        _linux.close_all(self._open.values())
        self._open.clear()
