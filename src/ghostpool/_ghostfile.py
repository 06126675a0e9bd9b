"""One ghost image: the entry, and where in the image the content of the file lies.

Content is never read here, only located: the scan looks at the headers of the chunks and steps
over what lies between them, in bounded memory. Every claim of a header is held against the size
of the image and of the ghost, since a payload shorter than its header says makes CRIU 4.2 spin
forever, and a worker that trusts an offset would write where it should not.
"""

from __future__ import annotations

import os
import stat
from typing import Any, Final

from ghostpool._errors import ImageError
from ghostpool._imagefile import ImageDirectory, record_length
from ghostpool._model import Extent, Ghost, GhostId
from ghostpool._schema import decode, message_class

_ENTRY: Final = message_class("ghost_file_entry")
_CHUNK: Final = message_class("ghost_chunk_entry")
_MAX_OFFSET: Final = (1 << 63) - 1
_WINDOW: Final = 8192  # head, entry and first chunk header of any real ghost: one system call
_KINDS: Final = frozenset(
    (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK)
)
_TARGET_MAX: Final = 4095


def ghost_file_name(ghost: int) -> str:
    """Ghost ids are hexadecimal in file names, without padding."""
    return f"ghost-file-{ghost:x}.img"


def read_ghost(source: ImageDirectory, ghost: GhostId, *, referrer: int) -> Ghost:
    """Read the image of `ghost`; `referrer` is the record of remap-fpath.img that needs it.

    ImageError: missing, malformed, or its content contradicts its entry.
    """
    name = ghost_file_name(ghost)
    opened = source.open(name)
    if opened is None:
        raise ImageError(name, None, f"is missing, but remap-fpath.img, record {referrer} needs it")
    fd, size = opened
    try:
        image = _Image(name, fd, size)
        entry, at = _entry(source, image)
        return _ghost(image, ghost, entry, at)
    except OSError as error:
        raise ImageError(name, None, f"can not be read: {error.strerror}") from error
    finally:
        os.close(fd)


class _Image:
    """Positioned reads of one image through a small window."""

    __slots__ = ("_fd", "_start", "name", "size", "window")

    def __init__(self, name: str, fd: int, size: int) -> None:
        self.name = name
        self.size = size
        self._fd = fd
        self._start = 0
        self.window = os.pread(fd, _WINDOW, 0)

    def read(self, at: int, length: int) -> bytes:
        """`length` bytes at `at`; fewer only at the end of the file."""
        offset = at - self._start
        if offset >= 0 and offset + length <= len(self.window):
            return self.window[offset : offset + length]
        self.window = os.pread(self._fd, max(length, _WINDOW), at)
        self._start = at
        return self.window[:length]

    def record(self, kind: Any, number: int, at: int) -> tuple[Any, int]:
        """The record at `at`, and where it ends."""
        length = record_length(self.name, number, self.read(at, 4), self.size - at)
        data = self.read(at + 4, length)
        if len(data) < length:
            raise ImageError(self.name, number, "the file shrank while it was read")
        return decode(kind, data, self.name, number), at + 4 + length


def _entry(source: ImageDirectory, image: _Image) -> tuple[Any, int]:
    """The ghost_file_entry, and where the content begins."""
    start = source.check_head(image.name, "ghost-file", image.window)
    if start == image.size:
        raise ImageError(image.name, None, "holds no record: is it cut?")
    return image.record(_ENTRY, 0, start)


def _ghost(image: _Image, ghost: GhostId, entry: Any, at: int) -> Ghost:
    name = image.name
    mode = entry.mode
    kind = mode & 0o170000
    if kind not in _KINDS or mode > 0o177777:
        raise ImageError(name, 0, f"mode {mode:#o} is not that of a file that can be a ghost")
    extents: tuple[Extent, ...] = ()
    size = 0
    rdev = target = None
    if kind == stat.S_IFREG:
        if entry.chunks:
            size = _logical_size(name, entry)
            extents = _chunks(image, at, size)
        elif image.size > at:
            size = image.size - at
            extents = (Extent(0, size, at),)
    elif image.size > at or entry.chunks:
        raise ImageError(name, 0, f"content follows a file of mode {mode:#o}, which has none")
    elif kind == stat.S_IFLNK:
        target = _target(name, entry)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        rdev = _rdev(name, entry)
    atime = _microseconds(name, entry.atim) if entry.HasField("atim") else None
    mtime = _microseconds(name, entry.mtim) if entry.HasField("mtim") else None
    return Ghost(ghost, name, mode, entry.uid, entry.gid, atime, mtime, size, extents, rdev, target)


def _logical_size(name: str, entry: Any) -> int:
    if not entry.HasField("size"):
        raise ImageError(name, 0, "is in chunks, but has no size")
    size: int = entry.size
    if size > _MAX_OFFSET:
        raise ImageError(name, 0, f"size {size} is beyond what a file can have")
    return size


def _chunks(image: _Image, at: int, size: int) -> tuple[Extent, ...]:
    extents: list[Extent] = []
    covered = 0
    number = 1
    while at < image.size:
        chunk, at = image.record(_CHUNK, number, at)
        offset, length = chunk.off, chunk.len
        if offset + length > size:
            raise ImageError(
                image.name,
                number,
                f"{length} bytes at {offset} lie beyond the end of the ghost at {size}",
            )
        if offset < covered:
            raise ImageError(
                image.name, number, f"begins at {offset}, the chunk before ends at {covered}"
            )
        if length > image.size - at:
            raise ImageError(
                image.name,
                number,
                f"{length} bytes of content should follow, {image.size - at} do",
            )
        covered = offset + length
        if length:
            extents.append(Extent(offset, length, at))
        at += length
        number += 1
    return tuple(extents)


def _microseconds(name: str, time: Any) -> int:
    """Times before 1970 are 64-bit two's complement in an unsigned field."""
    seconds: int = time.tv_sec
    micros: int = time.tv_usec
    if micros > 999_999:
        raise ImageError(name, 0, f"{micros} microseconds are no fraction of a second")
    if seconds >> 63:
        seconds -= 1 << 64
    return seconds * 1_000_000 + micros


def _rdev(name: str, entry: Any) -> int:
    # The low half of glibc's dev_t, which os.makedev also returns: 1:3 is 0x103 in both.
    if not entry.HasField("rdev"):
        raise ImageError(name, 0, "is a device, but has no rdev")
    rdev: int = entry.rdev
    return rdev


def _target(name: str, entry: Any) -> bytes:
    target: bytes = entry.symlnk_target
    if not target or len(target) > _TARGET_MAX or b"\0" in target:
        raise ImageError(name, 0, f"is a symbolic link, but {target[:40]!r} is no target for one")
    return target


__all__ = ["ghost_file_name", "read_ghost"]
