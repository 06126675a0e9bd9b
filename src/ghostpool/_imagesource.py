"""Where images come from: names, and the bytes behind a name.

The readers ask for nothing else, so that they read a directory, an archive or memory alike. A
source says what is there and hands out pieces of it; what the bytes mean is none of its business.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from operator import attrgetter
from typing import Final, Protocol

from ghostpool._errors import ImageError

OPEN_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
"""A name is a single component, so O_NOFOLLOW alone keeps an open of it inside the directory, and
O_NONBLOCK keeps a fifo in the place of an image from blocking us: open(2)."""


class OpenImage(Protocol):
    """One image that is open."""

    size: int

    def read(self, at: int, length: int) -> bytes:
        """`length` bytes at `at`; fewer only at the end. OSError: it can not be read."""

    def close(self) -> None:
        """Let go of it."""


class ImageSource(Protocol):
    """A set of images."""

    def names(self) -> Iterator[str]:
        """All names, in any order. OSError: they can not be listed."""

    def open(self, name: str) -> OpenImage | None:
        """The image `name`; None if there is none. ImageError: it is no regular file."""

    def first(self, name: str, length: int) -> tuple[bytes, int] | None:
        """The first `length` bytes of the image `name`, and its size, at the least cost.

        None where there is any difficulty: `open` says which.
        """

    def expect(self, names: list[str]) -> None:
        """Hint: these will be opened, in this order."""


class OpenFile:
    """An image in a file; the descriptor goes with it."""

    __slots__ = ("_fd", "size")

    def __init__(self, name: str, fd: int) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise ImageError(name, None, "is not a regular file")
        self._fd = fd
        self.size = status.st_size

    def read(self, at: int, length: int) -> bytes:
        return os.pread(self._fd, length, at)

    def close(self) -> None:
        os.close(self._fd)


class DirectorySource:
    """The images of a directory; its descriptor is only borrowed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def names(self) -> Iterator[str]:
        with os.scandir(self._fd) as entries:
            yield from map(attrgetter("name"), entries)

    def open(self, name: str) -> OpenImage | None:
        try:
            return OpenFile(name, os.open(name, OPEN_FLAGS, dir_fd=self._fd))
        except OSError as error:
            return self.failed(name, error.errno or errno.EIO)

    def first(self, name: str, length: int) -> tuple[bytes, int] | None:
        try:
            fd = os.open(name, OPEN_FLAGS, dir_fd=self._fd)
        except OSError:
            return None
        try:
            data = os.pread(fd, length, 0)
            status = os.fstat(fd)
        except OSError:
            return None
        finally:
            os.close(fd)
        return (data, status.st_size) if stat.S_ISREG(status.st_mode) else None

    def failed(self, name: str, code: int) -> OpenImage | None:
        """What an open that failed with errno `code` comes to."""
        if code == errno.ENOENT:
            return None
        if code == errno.ELOOP:
            raise ImageError(name, None, "is a symbolic link, not an image")
        raise ImageError(name, None, f"can not be opened: {os.strerror(code)}")

    def expect(self, names: list[str]) -> None:
        pass


__all__ = ["OPEN_FLAGS", "DirectorySource", "ImageSource", "OpenFile", "OpenImage"]
