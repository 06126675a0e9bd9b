"""Framing of CRIU images: which files a directory holds, and the records inside one of them.

An image is one or two magic words, then records: a 32-bit length and so many bytes of protobuf.
Nothing in a file is believed before it is checked: a length may not exceed what is left of the
file, so an image of ten bytes can not make us allocate gigabytes, and an end anywhere but
between two records is an error that names file and record.
Source: CRIU images/README and criu/include/magic.h, CRIU 4.2; little endian only.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from ghostpool._errors import ImageError, UnsupportedError
from ghostpool._schema import decode, message_class

RECORD_LIMIT: Final = 16 << 20
"""Longest record that is accepted, in bytes; CRIU knows no limit, real ones stay far below."""

_COMMON_MAGIC: Final = 0x54564319
_WORD: Final = struct.Struct("<I")
_REMEDY: Final = "is this the directory given to criu dump -D?"

# Magic word and message of each kind of image.
_KINDS: Final = {
    "inventory": (0x58313116, "inventory_entry"),
    "pstree": (0x50273030, "pstree_entry"),
    "core": (0x55053847, "core_entry"),
    "ids": (0x54432030, "task_kobj_ids_entry"),
    "mm": (0x57492820, "mm_entry"),
    "fs": (0x51403912, "fs_entry"),
    "fdinfo": (0x56213732, "fdinfo_entry"),
    "files": (0x56303138, "file_entry"),
    "remap-fpath": (0x59133954, "remap_file_path_entry"),
    "ghost-file": (0x52583605, "ghost_file_entry"),
    "mountpoints": (0x55563928, "mnt_entry"),
    "fifo-data": (0x59333054, "pipe_data_entry"),
}
_HEADS: Final = (
    {kind: _WORD.pack(magic) for kind, (magic, _) in _KINDS.items()},
    {kind: _WORD.pack(_COMMON_MAGIC) + _WORD.pack(magic) for kind, (magic, _) in _KINDS.items()},
)


class ImageDirectory:
    """An open image directory; `fd` is only borrowed when the caller brought it."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        try:
            self.names = frozenset(os.listdir(fd))
        except OSError as error:
            raise ImageError(path, None, f"can not be listed: {error.strerror}") from error
        if "inventory.img" not in self.names:
            raise ImageError("inventory.img", None, f"is missing in {path}: {_REMEDY}")
        self._two_magics = False  # inventory.img itself never has the common magic
        self.inventory = self.one("inventory.img", "inventory")
        version = self.inventory.img_version
        if version not in (1, 2):
            raise UnsupportedError(
                f"inventory.img: image format version {version} is unknown; "
                "ghostpool reads 1 and 2 (CRIU up to 4.2)"
            )
        self._two_magics = version == 2

    def head(self, kind: str) -> bytes:
        """The bytes that an image of `kind` begins with in this directory."""
        return _HEADS[self._two_magics][kind]

    def open(self, name: str) -> tuple[int, int] | None:
        """Descriptor and size in bytes of the image `name`; None if there is none.

        `name` is a single component, so O_NOFOLLOW alone keeps it inside the directory, and
        O_NONBLOCK keeps a fifo in the place of an image from blocking us: open(2).
        """
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, dir_fd=self.fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ImageError(name, None, "is a symbolic link, not an image") from None
            raise ImageError(name, None, f"can not be opened: {error.strerror}") from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise ImageError(name, None, "is not a regular file")
        return fd, status.st_size

    def check_head(self, name: str, kind: str, data: bytes) -> int:
        """Check that `data` begins as an image of `kind` does; returns the length of the head."""
        head = self.head(kind)
        if data.startswith(head):
            return len(head)
        if len(data) < len(head) and head.startswith(data):
            raise ImageError(name, None, "is cut inside its magic" if data else "is empty")
        if data[:4] == head[:4][::-1]:
            raise UnsupportedError(f"{name}: big-endian images (s390x) are not supported")
        raise ImageError(
            name, None, f"begins with {data[: len(head)].hex()}, a {kind} image with {head.hex()}"
        )

    def records(
        self, name: str, kind: str, *, payload: Callable[[Any], int] | None = None
    ) -> Iterator[Any]:
        """The records of a list image in file order; nothing if the file is absent.

        `payload` says how many raw bytes follow a record; they are checked to be there and
        skipped. Absent and without a record mean the same to CRIU.
        """
        opened = self.open(name)
        if opened is None:
            return
        fd, size = opened
        parse = message_class(_KINDS[kind][1])
        try:
            with open(fd, "rb", buffering=1 << 16) as file:
                at = self.check_head(name, kind, file.read(8 if self._two_magics else 4))
                number = 0
                while at < size:
                    length = record_length(name, number, file.read(4), size - at)
                    data = file.read(length)
                    if len(data) < length:
                        raise ImageError(name, number, "the file shrank while it was read")
                    at += 4 + length
                    message = decode(parse, data, name, number)
                    if payload is not None:
                        skip = payload(message)
                        if skip > size - at:
                            raise ImageError(
                                name, number, f"{skip} bytes of data should follow, {size - at} do"
                            )
                        file.seek(skip, os.SEEK_CUR)
                        at += skip
                    yield message
                    number += 1
        except OSError as error:
            raise ImageError(name, None, f"can not be read: {error.strerror}") from error

    def one(self, name: str, kind: str, *, absent: str | None = None) -> Any:
        """The only record of a single-record image.

        `absent` is what to say if the file is not there at all.
        """
        messages = list(self.records(name, kind))
        if len(messages) == 1:
            return messages[0]
        if messages:
            raise ImageError(name, 1, f"a {kind} image holds one record only")
        if name in self.names:
            raise ImageError(name, None, "holds no record: is it cut?")
        raise ImageError(name, None, absent or "is missing")


def record_length(name: str, number: int, word: bytes, left: int) -> int:
    """Length in bytes of a record's payload, from its length `word` (`left` counts that too)."""
    if len(word) < 4:
        raise ImageError(name, number, "is cut inside the length of the record")
    length: int = _WORD.unpack(word)[0]
    if length > left - 4:
        raise ImageError(
            name, number, f"the record should have {length} bytes, the file has {left - 4} more"
        )
    if length > RECORD_LIMIT:
        raise ImageError(
            name, number, f"a record of {length} bytes is beyond the limit of {RECORD_LIMIT}"
        )
    return length


@contextmanager
def open_directory(path: str, fd: int | None) -> Iterator[ImageDirectory]:
    """Open the image directory at `path`, or use `fd`, which stays open."""
    if fd is not None:
        yield ImageDirectory(path, fd)
        return
    try:
        own = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(
            path, None, f"can not be opened as a directory ({error.strerror}): {_REMEDY}"
        ) from error
    try:
        yield ImageDirectory(path, own)
    finally:
        os.close(own)


__all__ = ["RECORD_LIMIT", "ImageDirectory", "open_directory", "record_length"]
