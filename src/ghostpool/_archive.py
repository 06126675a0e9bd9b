"""The images in a checkpoint archive, found by what they are, without unpacking it to disk.

Podman, CRI-O and the kubelet write a tar archive with the images below checkpoint/, packed or not;
containerd and OCI layouts put such an archive, with the images anywhere in it, into a blob of
another one. Names of files say nothing: the images are where inventory.img is, in whatever member
that is an archive.

Where nothing is packed, an image is a run of bytes of the file and is read there. Where something
is, the archive is gone through once and the images are kept in memory, but for the contents of
ghosts and of memory, which nobody asks for: of a ghost only what tells where its content lies.
"""

from __future__ import annotations

import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Final, Literal

from ghostpool._errors import ImageError
from ghostpool._imagefile import KINDS
from ghostpool._imagesource import OpenImage
from ghostpool._limits import RECORD_LIMIT, Limits, size_text
from ghostpool._model import Step
from ghostpool._schema import attempt, message_class
from ghostpool._tar import Member, is_tar, members
from ghostpool._unpack import (
    PIECE,
    UNPACKED,
    FileStream,
    PartStream,
    Stream,
    UnpackedStream,
    Unreadable,
    packed_as,
)

KEPT_MAX: Final = 96 << 20
"""Bytes of packed images that are kept in memory."""
_EACH: Final = 600
"""What it takes to keep one, besides its bytes."""
_MARK: Final = "inventory.img"
_DEVSHM: Final = "devshm-checkpoint.tar"
_GHOST: Final = re.compile(r"ghost-file-[0-9a-f]+\.img")
_KEPT: Final = re.compile(rf"(?:{'|'.join(sorted(KINDS))})(?:-[0-9]+)?\.img")
_BLOB: Final = re.compile(rb"(?:\./)?blobs/[a-z0-9]+/[0-9a-f]+")
_ENTRY: Final = message_class("ghost_file_entry")
_CHUNK: Final = message_class("ghost_chunk_entry")
_COMMON_MAGIC: Final = 0x54564319
_GHOST_MAGIC: Final = 0x52583605
_MAX_CHUNKS: Final = 1 << 18
_REMEDY: Final = "name a directory of images, or a checkpoint archive"


class Kept:
    """What was kept of a packed image: runs of its bytes."""

    __slots__ = ("_data", "_ends", "_starts", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._data = bytearray()
        self._starts = array("Q")
        self._ends = array("Q")
        """Where each run ends in the data."""

    def keep(self, at: int, data: bytes) -> None:
        """Add a run; one that goes on where the last one ends makes it longer."""
        run = len(self._starts) - 1
        begin = self._ends[run - 1] if run > 0 else 0
        if run >= 0 and self._starts[run] + self._ends[run] - begin == at:
            self._ends[run] += len(data)
        else:
            self._starts.append(at)
            self._ends.append(len(self._data) + len(data))
        self._data += data

    def read(self, at: int, length: int) -> bytes:
        run = bisect_right(self._starts, at) - 1
        if run < 0:
            return b""
        begin = (self._ends[run - 1] if run else 0) + at - self._starts[run]
        return bytes(self._data[begin : min(begin + length, self._ends[run])])

    def close(self) -> None:
        pass


class _Lying:
    """An image that is a run of bytes of a file."""

    __slots__ = ("_at", "_fd", "size")

    def __init__(self, fd: int, at: int, size: int) -> None:
        self._fd = fd
        self._at = at
        self.size = size

    def read(self, at: int, length: int) -> bytes:
        return os.pread(self._fd, max(0, min(length, self.size - at)), self._at + at)

    def close(self) -> None:
        pass


Found = dict[str, tuple[Member, Kept | None]]


class ArchiveSource:
    """The images of one dump in an archive, as an ImageSource."""

    def __init__(
        self,
        path: str,
        fd: int,
        steps: tuple[Step, ...],
        found: Found,
        devshm: Member | None = None,
    ) -> None:
        self._devshm = devshm
        self.steps = steps
        """What has to be unpacked until the positions of `place` are those of the bytes."""
        self._path = path
        self._fd = fd
        self._found = found

    def names(self) -> Iterator[str]:
        yield from self._found

    def open(self, name: str) -> OpenImage | None:
        if name not in self._found:
            return None
        member, kept = self._found[name]
        if member.kind != "file":
            what = {"link": "a link", "sparse": "a sparse file"}.get(member.kind, "no file")
            raise ImageError(name, None, f"is {what} in {self._path}, not an image")
        if not self.steps:
            return _Lying(self._fd, member.at, member.size)
        if kept is None:
            raise ImageError(
                name,
                None,
                f"is too large for an image that is read from a packed archive, {self._path}: "
                "unpack it (zstd -d, gunzip)",
            )
        return kept

    def first(self, name: str, length: int) -> tuple[bytes, int] | None:
        member, kept = self._found.get(name, (None, None))
        if member is None or member.kind != "file":
            return None
        if not self.steps:
            return os.pread(self._fd, min(length, member.size), member.at), member.size
        return None if kept is None else (kept.read(0, length), kept.size)

    def expect(self, names: list[str]) -> None:
        pass

    def devshm(self) -> tuple[OpenImage | None, int]:
        """The archive of /dev/shm beside the images, and where it lies; of what is packed none."""
        if self._devshm is None or self.steps:
            return None, 0
        return _Lying(self._fd, self._devshm.at, self._devshm.size), self._devshm.at

    def place(self, name: str) -> int:
        """Position of the image `name` in what is unpacked."""
        return self._found[name][0].at


def open_archive(
    path: str, fd: int, limits: Limits, going_on: Callable[[], object]
) -> ArchiveSource:
    """Find the images in the archive `fd`, which `path` names in messages.

    `going_on` is called again and again. ImageError: there are none, or it can not be read.
    """
    scan = _Scan(path, fd, limits, going_on)
    try:
        scan.look(FileStream(fd, 0, os.fstat(fd).st_size), ())
    except Unreadable as error:
        raise ImageError(path, None, f"can not be read as a checkpoint archive: {error}") from error
    except OSError as error:
        raise ImageError(path, None, f"can not be read: {error.strerror}") from error
    return scan.source()


class _Scan:
    def __init__(self, path: str, fd: int, limits: Limits, going_on: Callable[[], object]) -> None:
        self._path = path
        self._fd = fd
        self._limits = limits
        self._going_on = going_on
        self._found: dict[tuple[tuple[Step, ...], str, str], Found] = {}
        """By the archive that they are in, its name and the directory in it."""
        self._shm: dict[tuple[tuple[Step, ...], str, str], Member] = {}
        """Archives of /dev/shm, likewise."""
        self._names = 0
        self._kept = 0

    def source(self) -> ArchiveSource:
        """The images, when everything has been looked at."""
        dumps = [place for place, found in self._found.items() if _MARK in found]
        if not dumps:
            raise ImageError(_MARK, None, f"is missing in {self._path}: {_REMEDY}")
        if len(dumps) > 1:
            where = " and ".join("/".join(filter(None, place[1:])) or "/" for place in dumps[:2])
            raise ImageError(
                self._path, None, f"holds the images of {len(dumps)} dumps, in {where}"
            )
        (dump,) = dumps
        steps, _, directory = dump
        above = directory.rpartition("/")[0]
        devshm = next((s for d in (directory, above) if (s := self._shm.get((*dump[:2], d)))), None)
        return ArchiveSource(self._path, self._fd, steps, self._found[dump], devshm)

    def look(self, stream: Stream, steps: tuple[Step, ...], inside: str | None = None) -> None:
        """Look through the archive that the stream is; `inside`: the blob that it is in."""
        head = stream.peek(512)
        kind = packed_as(head)
        if kind in UNPACKED:
            steps = (*steps, Step(kind, stream.at))
            stream = UnpackedStream(stream, kind, self._going_on)
            head = stream.peek(512)
        if not is_tar(head):
            if inside is not None:
                return  # a manifest, or what else there is
            if kind is not None and kind not in UNPACKED:
                raise Unreadable(f"it is packed by {kind}, which is not read; unpack it first")
            raise Unreadable(f"it is no tar archive, packed or not; {_REMEDY}")
        self._members(stream, steps, inside)
        while kind in UNPACKED and stream.read(PIECE):
            pass  # a checksum comes last

    def _members(self, stream: Stream, steps: tuple[Step, ...], inside: str | None) -> None:
        for member in members(stream):
            self._going_on()
            self._names += 1
            if self._names > self._limits.names:
                raise Unreadable(f"it has more than {self._limits.names:,} members")
            if inside is None and member.kind == "file" and _BLOB.fullmatch(member.name):
                name = member.name.decode()
                self.look(PartStream(stream, member.size), steps, name)
            else:
                self._enter(stream, steps, inside or "", member)

    def _enter(self, stream: Stream, steps: tuple[Step, ...], inside: str, member: Member) -> None:
        """Note a member that may be an image."""
        *above, name = [p for p in os.fsdecode(member.name).split("/") if p not in ("", ".")] or [
            ""
        ]
        place = steps, inside, "/".join(above)
        if name == _DEVSHM and member.kind == "file":
            if place in self._shm:
                raise Unreadable(f"{os.fsdecode(member.name)!a} is in it twice")
            self._shm[place] = member
        if not name.endswith(".img") or ".." in above:
            return
        found = self._found.setdefault(place, {})
        if name in found:
            raise Unreadable(f"{os.fsdecode(member.name)!a} is in it twice")
        kept = None
        if steps and member.kind == "file":
            kept = self._keep(stream, name, member.size)
        found[name] = member, kept

    def _keep(self, stream: Stream, name: str, size: int) -> Kept | None:
        kept = Kept(size)
        left = KEPT_MAX - self._kept - _EACH
        part = PartStream(stream, size)
        if _GHOST.fullmatch(name):
            taken = _keep_records(part, kept, left)
        elif _KEPT.fullmatch(name) and size <= left:
            taken = _keep_all(part, kept)
        else:
            return None
        self._kept += taken + _EACH
        if self._kept > KEPT_MAX:
            raise Unreadable(
                f"its images take more than {size_text(KEPT_MAX)} of memory, since it is packed: "
                "unpack it (zstd -d, gunzip)"
            )
        return kept


def _keep_all(part: Stream, kept: Kept) -> int:
    at = 0
    while data := part.read(PIECE):
        kept.keep(at, data)
        at += len(data)
    return at


def _keep_records(part: Stream, kept: Kept, most: int) -> int:
    """Keep the head of a ghost image and its records, and step over the content between them.

    What makes no sense ends it: whoever reads the image comes to the same place, and says so.
    """
    begin = part.at
    head = part.peek(8)
    order = _byte_order(head)
    taken = 0

    def take(length: int) -> bytes:
        nonlocal taken
        at, data = part.at - begin, b""
        while len(data) < length and (piece := part.read(length - len(data))):
            data += piece
        kept.keep(at, data)
        taken += len(data)
        return data

    take(8 if int.from_bytes(head[:4], order) == _COMMON_MAGIC else 4)
    parse = _ENTRY
    for _ in range(_MAX_CHUNKS + 1):
        word = take(4)
        length = int.from_bytes(word, order)
        if len(word) < 4 or length > RECORD_LIMIT:
            break
        if taken + length > most:
            return most + 1
        record = attempt(parse, take(length))
        if record is None or (parse is _ENTRY and not record.chunks):
            break
        if parse is _CHUNK and not part.skip(record.len):
            break
        parse = _CHUNK
    return taken


def _byte_order(head: bytes) -> Literal["little", "big"]:
    return "big" if int.from_bytes(head[:4], "big") in (_COMMON_MAGIC, _GHOST_MAGIC) else "little"


__all__ = ["ArchiveSource", "Kept", "open_archive"]
