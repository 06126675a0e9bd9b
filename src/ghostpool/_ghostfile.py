"""One ghost image: the entry, and where in the image the content of the file lies.

Content is never read here, only located: the scan looks at the headers of the chunks and steps
over what lies between them, in bounded memory. Every claim of a header is held against the size
of the image and of the ghost, since a payload shorter than its header says makes CRIU 4.2 spin
forever, and a worker that trusts an offset would write where it should not.
"""

from __future__ import annotations

import stat
from typing import Any, Final

from ghostpool._errors import ImageError
from ghostpool._imagefile import ImageDirectory, Window
from ghostpool._limits import Tally, beyond
from ghostpool._model import GHOST_KINDS, TARGET_MAX, Extent, Ghost, GhostId, maker
from ghostpool._schema import message_class

_ENTRY: Final = message_class("ghost_file_entry")
_CHUNK: Final = message_class("ghost_chunk_entry")
_make_ghost: Final = maker(Ghost)
_make_extent: Final = maker(Extent)
_MAX_OFFSET: Final = (1 << 63) - 1
_WINDOW: Final = 8192  # head, entry and first chunk header of any real ghost: one system call


def read_ghost(source: ImageDirectory, ghost: GhostId, name: str, *, referrer: int) -> Ghost:
    """Read the image `name` of `ghost`, which the record `referrer` of remap-fpath.img needs.

    ImageError: missing, malformed, or its content contradicts its entry.
    """
    tally = source.tally
    found = source.first(name, "ghost-file", _ENTRY, _WINDOW)
    if found is not None and not found[0].chunks:
        entry, length, at, size = found
        tally.record(name, 0, "ghost-file", length)
        return _ghost(name, ghost, entry, at, size, None, tally)
    window = source.window(name, "ghost-file", _WINDOW)
    if window is None:
        raise ImageError(name, None, f"is missing, but remap-fpath.img, record {referrer} needs it")
    with window as image:
        entry, at = _entry(source, image)
        return _ghost(name, ghost, entry, at, image.size, image, tally)


def _entry(source: ImageDirectory, image: Window) -> tuple[Any, int]:
    """The ghost_file_entry, and where the content begins."""
    start = source.check_head(image.name, "ghost-file", image.read(0, 8))
    if start == image.size:
        raise ImageError(image.name, None, "holds no record: is it cut?")
    return image.record(_ENTRY, 0, start)


def _ghost(
    name: str, ghost: GhostId, entry: Any, at: int, end: int, image: Window | None, tally: Tally
) -> Ghost:
    """The ghost, with what lies from `at` to the `end` of its image; only chunks are looked at."""
    mode = entry.mode
    kind = mode & 0o170000
    if kind not in GHOST_KINDS or mode > 0o177777:
        raise ImageError(name, 0, f"mode {mode:#o} is not that of a file that can be a ghost")
    extents: tuple[Extent, ...] = ()
    size = 0
    rdev = target = None
    if kind == stat.S_IFREG:
        if image is not None and entry.chunks:
            size = _logical_size(name, entry)
            tally.size(name, size)
            extents = _chunks(image, at, size, tally)
        elif end > at:
            size = end - at
            tally.size(name, size)
            tally.content(name, 0, size)
            extents = (_make_extent((0, size, at)),)
    elif end > at or entry.chunks:
        raise ImageError(name, 0, f"content follows a file of mode {mode:#o}, which has none")
    elif kind == stat.S_IFLNK:
        target = _target(name, entry)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        rdev = _rdev(name, entry)
    atime = _microseconds(name, entry, "atim")
    mtime = _microseconds(name, entry, "mtim")
    owner = entry.uid, entry.gid
    return _make_ghost((ghost, mode, *owner, atime, mtime, size, extents, rdev, target))


def _logical_size(name: str, entry: Any) -> int:
    if not entry.HasField("size"):
        raise ImageError(name, 0, "is in chunks, but has no size")
    size: int = entry.size
    if size > _MAX_OFFSET:
        raise ImageError(name, 0, f"size {size} is beyond what a file can have")
    return size


def _chunks(image: Window, at: int, size: int, tally: Tally) -> tuple[Extent, ...]:
    extents: list[Extent] = []
    covered = 0
    number = 1
    while at < image.size:
        if number > tally.limits.chunks:
            raise beyond(
                image.name,
                number,
                f"{number:,} chunks",
                f"{tally.limits.chunks:,}",
                "copy the file without its holes before the dump",
            )
        chunk, at = image.record(_CHUNK, number, at, "chunks")
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
            tally.content(image.name, number, length)
            extents.append(Extent(offset, length, at))
        at += length
        number += 1
    return tuple(extents)


def _microseconds(name: str, entry: Any, field: str) -> int | None:
    """Times before 1970 are 64-bit two's complement in an unsigned field."""
    time = getattr(entry, field)
    seconds: int = time.tv_sec
    micros: int = time.tv_usec
    if not seconds and not micros and not entry.HasField(field):
        return None
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
    if not target or len(target) > TARGET_MAX or b"\0" in target:
        raise ImageError(name, 0, f"is a symbolic link, but {target[:40]!r} is no target for one")
    return target


__all__ = ["read_ghost"]
