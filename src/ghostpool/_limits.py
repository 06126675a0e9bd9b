"""What a set of images may ask for, checked before it is done.

Images come from somebody else. A length, a count or a size in one of them is a claim, and a claim
that no dump of a real container makes is refused when it is read, before anything of that length,
number or size exists. Every refusal names the image, the record, the number and the limit.
The limits are far above what dumps need: 100,000 ghosts pass. Only the size of a ghost can be
raised (`--max-size`), since a sparse file may well be larger than any disk; the others bound the
memory of reading to 256 MiB, and an image beyond them is not of a container.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple, NoReturn

from ghostpool._errors import ImageError

RECORD_LIMIT: Final = 1 << 20
"""Longest record that is accepted, in bytes; CRIU knows no limit, real ones stay far below."""
LONG_RECORD_LIMIT: Final = 16 << 20
_LONG: Final = frozenset(("core", "mm", "files"))
"""Kinds with long records: waiting signals, mappings, what an epoll or an inotify watches."""
TEXT_LIMIT: Final = 65535
"""Longest root, source or option string of a mount, in bytes; PATH_MAX and a page in the kernel."""

NAME_LIMIT: Final = 108
"""Longest name of a UNIX socket, in bytes: sun_path of unix(7)."""
YEAR_US: Final = 366 * 24 * 3600 * 1_000_000
"""Longest time limit of a socket, in microseconds."""

_DUMP_LESS: Final = "dump fewer tasks at once"
_SIZE: Final = re.compile(r"([0-9]+)([KMGTP]?)(?:i?B)?", re.IGNORECASE)


def record_limit(kind: str) -> int:
    """Longest record of an image of `kind`, in bytes."""
    return LONG_RECORD_LIMIT if kind in _LONG else RECORD_LIMIT


def parse_size(value: str) -> int:
    """Bytes from a number with a suffix K, M, G, T or P (powers of 1024). ValueError: no size."""
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is no size: a number of bytes, or of K, M, G, T or P")
    size = int(match[1]) << 10 * " KMGTP".index(match[2].upper() or " ")
    if not 0 < size < 1 << 63:
        raise ValueError(f"{value!r} is no size that a file can have")
    return size


def size_text(size: int) -> str:
    """A size for people, exact."""
    for power, unit in ((50, "P"), (40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size >> power and not size & (1 << power) - 1:
            return f"{size >> power}{unit}"
    return str(size)


class Limits(NamedTuple):
    """How much of each thing the images of one dump may hold."""

    size: int = 1 << 40
    """Apparent size of one ghost, in bytes; all together may have sixteen times as much, and
    four times as much content."""
    names: int = 1 << 19
    """Names in the image directory."""
    tasks: int = 1 << 16
    threads: int = 1 << 18
    mounts: int = 1 << 17
    files: int = 1 << 18
    descriptors: int = 1 << 19
    """Rows of all descriptor tables."""
    remaps: int = 1 << 17
    ghosts: int = 1 << 17
    mappings: int = 1 << 19
    """Of one task."""
    chunks: int = 1 << 18
    """Of one ghost."""
    all_chunks: int = 1 << 19
    memory: int = 220 << 20
    """What the values take while they are joined, in bytes, by the costs below."""


class _Counted(NamedTuple):
    what: str
    limit: str
    """Field of Limits."""
    cost: int
    """Memory of what a record becomes and of its place in tables, in bytes (CPython, 64 bits);
    the text in it comes on top."""


_COUNTED: Final = {
    "names": _Counted("names", "names", 150),
    "pstree": _Counted("tasks", "tasks", 1200),
    "threads": _Counted("threads", "threads", 100),
    "mountpoints": _Counted("mounts", "mounts", 700),
    "files": _Counted("open files", "files", 520),
    "fifo-data": _Counted("open files", "files", 0),
    "fdinfo": _Counted("descriptors", "descriptors", 220),
    "remap-fpath": _Counted("remaps", "remaps", 230),
    "ghost-file": _Counted("ghosts", "ghosts", 620),
    "chunks": _Counted("chunks", "all_chunks", 140),
}
_TRANSIENT: Final = 4
"""What parsing one record takes for a moment, as a multiple of its length."""


class Tally:
    """What the images of one directory have asked for so far."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._counts = dict.fromkeys(_COUNTED, 0)
        self._most = {kind: getattr(limits, counted.limit) for kind, counted in _COUNTED.items()}
        self._memory = 0
        self._size = 0
        self._content = 0

    def count(self, file: str, record: int | None, kind: str, number: int = 1) -> None:
        """Enter `number` more of a kind."""
        total = self._counts[kind] + number
        if total > self._most[kind]:
            what = f"{total:,} {_COUNTED[kind].what}"
            raise beyond(file, record, what, f"{self._most[kind]:,}", _DUMP_LESS)
        self._counts[kind] = total
        self._memory += _COUNTED[kind].cost * number
        if self._memory > self.limits.memory:
            self._too_much(file, record, self._memory)

    def record(self, file: str, record: int, kind: str, length: int) -> None:
        """Enter a record of `length` bytes, before it is read."""
        if length > RECORD_LIMIT and length > record_limit(kind):
            what = f"a record of {length:,} bytes"
            raise beyond(file, record, what, f"{record_limit(kind):,}", _DUMP_LESS)
        if kind in _COUNTED:
            self.count(file, record, kind)
            self._memory += length
        if self._memory + _TRANSIENT * length > self.limits.memory:
            self._too_much(file, record, self._memory + _TRANSIENT * length)

    def records(self, kind: str, number: int, length: int) -> bool:
        """Enter so many records, short ones of `length` bytes together, before they are parsed.

        False: they may be too much, and nothing is entered; `record` says which of them is.
        """
        memory = self._memory
        total = 0
        if kind in _COUNTED:
            total = self._counts[kind] + number
            memory += _COUNTED[kind].cost * number + length
            if total > self._most[kind]:
                return False
        if memory + _TRANSIENT * length > self.limits.memory:
            return False
        if kind in _COUNTED:
            self._counts[kind] = total
            self._memory = memory
        return True

    def size(self, file: str, size: int) -> None:
        """Enter the apparent size of a ghost."""
        one = self.limits.size
        if size > one:
            raise beyond(file, 0, f"a ghost of {size:,} bytes", size_text(one), _raise(size))
        self._size += size
        if self._size > 16 * one:
            together = f"ghosts of {self._size:,} bytes together"
            raise beyond(file, 0, together, size_text(16 * one), _raise(self._size // 16 + 1))

    def content(self, file: str, record: int, length: int) -> None:
        """Enter content that would be written."""
        self._content += length
        most = 4 * self.limits.size
        if self._content > most:
            together = f"{self._content:,} bytes of content together"
            raise beyond(file, record, together, size_text(most), _raise(self._content // 4 + 1))

    def _too_much(self, file: str, record: int | None, memory: int) -> NoReturn:
        needed, most = f"{memory:,} bytes of memory", size_text(self.limits.memory)
        raise beyond(file, record, needed, most, _DUMP_LESS)


def beyond(file: str, record: int | None, what: str, limit: str, remedy: str) -> ImageError:
    """The refusal."""
    return ImageError(file, record, f"{what}: the limit is {limit}; {remedy}")


def _raise(size: int) -> str:
    return f"if that is meant, allow it: --max-size {size_text(-(-size >> 20) << 20)}"


__all__ = [
    "LONG_RECORD_LIMIT",
    "NAME_LIMIT",
    "RECORD_LIMIT",
    "TEXT_LIMIT",
    "YEAR_US",
    "Limits",
    "Tally",
    "beyond",
    "parse_size",
    "record_limit",
    "size_text",
]
