"""Framing of CRIU images: which files a directory holds, and the records inside one of them.

An image is one or two magic words, then records: a 32-bit length and so many bytes of protobuf.
Nothing in a file is believed before it is checked: a length may not exceed what is left of the
file, so an image of ten bytes can not make us allocate gigabytes, and an end anywhere but
between two records is an error that names file and record.
Words are in the byte order of the machine that dumped, which the magic of the inventory shows.
Source: CRIU images/README, criu/include/magic.h and criu/image-desc.c, CRIU 4.2.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final, Self

from ghostpool._errors import ImageError, UnsupportedError
from ghostpool._imagesource import DirectorySource, ImageSource, OpenImage
from ghostpool._limits import Limits, Tally
from ghostpool._schema import attempt, decode, decode_all, message_class

_COMMON_MAGIC: Final = 0x54564319
_ORDERS: Final = {False: struct.Struct("<I"), True: struct.Struct(">I")}
"""The word of images that are big-endian, or not."""
_WINDOW: Final = 1 << 16
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
    # The lists of CRIU before 3.4, which had one for each type of file.
    "reg-files": (0x50363636, "reg_file_entry"),
    "pipes": (0x56513555, "any_file_entry"),
    "fifo": (0x58364939, "fifo_entry"),
    "inetsk": (0x56443851, "any_file_entry"),
    "unixsk": (0x54373943, "unix_sk_entry"),
    "eventfd": (0x44523722, "any_file_entry"),
    "eventpoll": (0x45023858, "any_file_entry"),
    "inotify": (0x48424431, "any_file_entry"),
    "signalfd": (0x57323820, "any_file_entry"),
    "packetsk": (0x60454618, "any_file_entry"),
    "tty": (0x59433025, "tty_file_entry"),
    "fanotify": (0x55096122, "any_file_entry"),
    "netlinksk": (0x58005614, "any_file_entry"),
    "ns-files": (0x61394011, "any_file_entry"),
    "tunfile": (0x57143751, "any_file_entry"),
    "ext-files": (0x59255641, "any_file_entry"),
    "timerfd": (0x50493712, "any_file_entry"),
}

KINDS: Final = frozenset(_KINDS)
"""What an image that anybody asks for is called, before its number."""


class ImageDirectory:
    """The images of one dump, and what they have asked for so far."""

    def __init__(self, path: str, source: ImageSource, limits: Limits) -> None:
        self.path = path
        self.tally = Tally(limits)
        self._source = source
        self.place: Callable[[str], int] | None = getattr(source, "place", None)
        """Where an image begins in the archive; None: they are files of a directory."""
        try:
            names = list(islice(self._source.names(), limits.names + 1))
        except OSError as error:
            raise ImageError(path, None, f"can not be listed: {error.strerror}") from error
        self.tally.count(path, None, "names", len(names))
        self.names = frozenset(names)
        if "inventory.img" not in self.names:
            raise ImageError("inventory.img", None, f"is missing in {path}: {_REMEDY}")
        self._heads: dict[str, bytes] = {}
        self._two_magics = False  # inventory.img itself never has the common magic
        self.big_endian = self._is_big_endian()
        self._word = _ORDERS[self.big_endian]
        self.inventory = self.one("inventory.img", "inventory")
        version = self.inventory.img_version
        if version not in (1, 2):
            raise UnsupportedError(
                f"inventory.img: image format version {version} is unknown; "
                "ghostpool reads 1 and 2 (CRIU up to 4.2)"
            )
        self._two_magics = version == 2
        self._heads.clear()

    def expect(self, names: list[str]) -> None:
        """Hint: these images will be read, in this order."""
        self._source.expect(names)

    def _is_big_endian(self) -> bool:
        opened = self._source.open("inventory.img")
        if opened is None:
            return False
        with Window("inventory.img", "inventory", opened, 4, self.tally) as image:
            return image.read(0, 4) == _ORDERS[True].pack(_KINDS["inventory"][0])

    def head(self, kind: str) -> bytes:
        """The bytes that an image of `kind` begins with in this directory."""
        head = self._heads.get(kind)
        if head is None:
            words = (_COMMON_MAGIC, _KINDS[kind][0])[not self._two_magics :]
            head = self._heads[kind] = b"".join(map(self._word.pack, words))
        return head

    def window(self, name: str, kind: str, size: int) -> Window | None:
        """The image `name` through a window of `size` bytes; None if there is none."""
        opened = self._source.open(name)
        if opened is None:
            return None
        return Window(name, kind, opened, size, self.tally, self._word)

    def first(
        self, name: str, kind: str, parse: Any, most: int
    ) -> tuple[Any, int, int, int] | None:
        """The first record of `name`, its length, where it ends, and the size of the image.

        It is not counted yet. None for what the first `most` bytes do not tell, and for whatever is
        wrong: what is seen through a window tells.
        """
        found = self._source.first(name, most)
        if found is None:
            return None
        data, size = found
        head = self.head(kind)
        at = len(head)
        if len(data) < at + 4 or not data.startswith(head):
            return None
        (length,) = self._word.unpack_from(data, at)
        end = at + 4 + length
        if end > len(data):
            return None
        message = attempt(parse, data[at + 4 : end])
        return None if message is None else (message, length, end, size)

    def check_head(self, name: str, kind: str, data: bytes) -> int:
        """Check that `data` begins as an image of `kind` does; returns the length of the head."""
        head = self.head(kind)
        if data.startswith(head):
            return len(head)
        if len(data) < len(head) and head.startswith(data):
            raise ImageError(name, None, "is cut inside its magic" if data else "is empty")
        if len(data) >= 4 and data[:4] == head[:4][::-1]:
            raise ImageError(name, None, "is in another byte order than inventory.img")
        raise ImageError(
            name, None, f"begins with {data[: len(head)].hex()}, a {kind} image with {head.hex()}"
        )

    def records(self, name: str, kind: str, *, counted: str | None = None) -> Iterator[Any]:
        """The records of a list image in file order; nothing if the file is absent.

        `counted` is the kind whose limits hold, if it is another one. Absent and without a record
        mean the same to CRIU.
        """
        parse = message_class(_KINDS[kind][1])
        window = self.window(name, counted or kind, _WINDOW)
        if window is None:
            return
        with window as image:
            size = image.size
            at = self.check_head(name, kind, image.read(0, 8 if self._two_magics else 4))
            number = 0
            while at < size:
                pieces, after = image.records(at)
                if pieces:
                    yield from decode_all(parse, pieces, name, number)
                    number += len(pieces)
                    at = after
                    continue
                message, at = image.record(parse, number, at)
                yield message
                number += 1

    def followed(
        self, name: str, kind: str, payload: Callable[[Any], int]
    ) -> Iterator[tuple[Any, int]]:
        """The same of an image whose records raw bytes follow, and where these are.

        `payload` says how many; they are checked to be there and stepped over.
        """
        parse = message_class(_KINDS[kind][1])
        window = self.window(name, kind, _WINDOW)
        if window is None:
            return
        with window as image:
            at = self.check_head(name, kind, image.read(0, 8 if self._two_magics else 4))
            number = 0
            while at < image.size:
                message, at = image.record(parse, number, at)
                length, left = payload(message), image.size - at
                if length > left:
                    raise ImageError(
                        name, number, f"{length} bytes of data should follow, {left} do"
                    )
                yield message, at
                at += length
                number += 1

    def one(self, name: str, kind: str, *, absent: str | None = None) -> Any:
        """The only record of a single-record image.

        `absent` is what to say if the file is not there at all.
        """
        messages = list(islice(self.records(name, kind), 2))  # no more of what is one too many
        if len(messages) == 1:
            return messages[0]
        if messages:
            raise ImageError(name, 1, f"a {kind} image holds one record only")
        if name in self.names:
            raise ImageError(name, None, "holds no record: is it cut?")
        raise ImageError(name, None, absent or "is missing")


class Window:
    """Positioned reads of one image through a window on it, and the records at a position.

    A context manager that closes the image, and makes an ImageError of what it could not read.
    """

    __slots__ = (
        "_content",
        "_image",
        "_kind",
        "_singly",
        "_size",
        "_start",
        "_tally",
        "_word",
        "name",
        "size",
    )

    def __init__(
        self,
        name: str,
        kind: str,
        image: OpenImage,
        size: int,
        tally: Tally,
        word: struct.Struct = _ORDERS[False],
    ) -> None:
        self.name = name
        self.size = image.size
        self._kind = kind
        self._image = image
        self._size = size
        self._tally = tally
        self._word = word
        self._singly = False
        self._start = 0
        self._content = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._image.close()
        if isinstance(error, OSError):
            raise ImageError(self.name, None, f"can not be read: {error.strerror}") from error

    def read(self, at: int, length: int) -> bytes:
        """`length` bytes at `at`; fewer only at the end of the file."""
        offset = at - self._start
        if offset >= 0 and offset + length <= len(self._content):
            return self._content[offset : offset + length]
        if length > self._size:
            return self._image.read(at, length)
        self._load(at)
        return self._content[:length]

    def _load(self, at: int) -> None:
        self._content = self._image.read(at, self._size)
        self._start = at

    def records(self, at: int) -> tuple[list[bytes], int]:
        """The records at `at` that the window holds whole, and where they end.

        None for what has to be looked at singly, by `record`: one that is longer than the window or
        than what is left of the file, and all of them where the images near what they may ask for.
        """
        if self._singly:
            return [], at
        if not self._start <= at <= self._start + len(self._content) - 4:
            self._load(at)
        pieces, after = self._whole(at)
        if not pieces and at != self._start:
            self._load(at)
            pieces, after = self._whole(at)
        self._singly = not self._tally.records(self._kind, len(pieces), after - at)
        return ([], at) if self._singly else (pieces, after)

    def _whole(self, at: int) -> tuple[list[bytes], int]:
        content, word = self._content, self._word.unpack_from
        pieces = []
        begin = at - self._start
        last = min(len(content), self.size - self._start)
        while begin + 4 <= last:
            end = begin + 4 + word(content, begin)[0]
            if end > last:
                break
            pieces.append(content[begin + 4 : end])
            begin = end
        return pieces, self._start + begin

    def record(self, parse: Any, number: int, at: int, kind: str | None = None) -> tuple[Any, int]:
        """The record at `at`, and where it ends."""
        offset = at - self._start
        if not 0 <= offset <= len(self._content) - 4:
            if len(self.read(at, 4)) < 4:
                raise ImageError(self.name, number, "is cut inside the length of the record")
            offset = 0  # the window begins here now
        length: int = self._word.unpack_from(self._content, offset)[0]
        at += 4
        if length > self.size - at:
            raise ImageError(
                self.name,
                number,
                f"the record should have {length} bytes, the file has {self.size - at} more",
            )
        self._tally.record(self.name, number, kind or self._kind, length)
        data = self._content[offset + 4 : offset + 4 + length]
        if len(data) < length:
            data = self.read(at, length)
            if len(data) < length:
                raise ImageError(self.name, number, "the file shrank while it was read")
        return decode(parse, data, self.name, number), at + length


@contextmanager
def open_directory(path: str, fd: int | None) -> Iterator[ImageSource]:
    """Open the image directory at `path`, or use `fd`, which stays open."""
    if fd is not None:
        yield DirectorySource(fd)
        return
    try:
        own = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(
            path, None, f"can not be opened as a directory ({error.strerror}): {_REMEDY}"
        ) from error
    try:
        yield DirectorySource(own)
    finally:
        os.close(own)


__all__ = ["ImageDirectory", "Window", "open_directory"]
