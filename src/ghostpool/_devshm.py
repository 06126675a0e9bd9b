"""devshm-checkpoint.tar: what was in a container's /dev/shm, of which link remaps are wanted.

Container runtimes save that directory beside the images, since it is theirs and in no image; with
it the hidden names that `criu dump` made there. Headers are read, at offsets, and contents only
located: nothing is extracted, and what is no regular file called link_remap.N is passed over.
POSIX.1-1988 (ustar) and -2001 (pax), and GNU tar's long names and large numbers: tar(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from ghostpool._errors import ImageError
from ghostpool._imagesource import OpenImage
from ghostpool._limits import Tally
from ghostpool._model import ShmFile

_BLOCK: Final = 512
_MEMBERS: Final = 1 << 17
"""Most members of any kind."""
_EXTENDED: Final = 1 << 16
"""Longest extended header, in bytes: names are shorter than PATH_MAX."""
_HIDDEN: Final = re.compile(rb"link_remap\.[0-9]{1,10}")
_S_IFREG: Final = 0o100000
_REGULAR: Final = (b"0", b"\0", b"7")
_NUMBER: Final = re.compile(rb"-?[0-9]{1,20}(?:\.[0-9]{0,20})?")


class _Member(NamedTuple):
    kind: bytes
    path: bytes
    link: bytes
    mode: int
    uid: int
    gid: int
    mtime: int
    """Microseconds since 1970."""
    size: int
    position: int


def read_devshm(name: str, tar: OpenImage, tally: Tally) -> Iterator[ShmFile]:
    """The link remaps in `tar`, which `name` names in messages. ImageError: it is no such archive.

    A hard link is the file that it leads to: they have one position.
    """
    regular: dict[bytes, _Member] = {}
    hidden: set[bytes] = set()
    for member in _members(name, tar):
        path = _inside(member.path)
        if member.kind in _REGULAR:
            regular[path] = member
        file = regular.get(_inside(member.link) if member.kind == b"1" else path)
        if file is not None and member.kind in (*_REGULAR, b"1") and _HIDDEN.fullmatch(path):
            if path in hidden:
                raise ImageError(name, None, f"{path.decode()} is in it twice")
            hidden.add(path)
            tally.count(name, None, "ghost-file")
            tally.size(name, file.size)
            tally.content(name, 0, file.size)
            mode = _S_IFREG | (file.mode & 0o7777)
            yield ShmFile(path, mode, file.uid, file.gid, file.mtime, file.size, file.position)


def _inside(path: bytes) -> bytes:
    """The path relative to /dev/shm: archives may begin with that, or with a part of it."""
    components = [one for one in path.split(b"/") if one not in (b"", b".")]
    for above in ([b"dev", b"shm"], [b"shm"]):
        if components[: len(above)] == above:
            del components[: len(above)]
            break
    return b"/".join(components)


def _members(name: str, tar: OpenImage) -> Iterator[_Member]:
    at = 0
    extended: dict[bytes, bytes] = {}
    for number in range(_MEMBERS):
        block = tar.read(at, _BLOCK)
        if len(block) < _BLOCK or not block.strip(b"\0"):
            if at == 0 and len(block) < _BLOCK:
                raise ImageError(name, None, "is no tar archive")
            return
        member = _header(name, number, block, at + _BLOCK)
        if member.kind in (b"x", b"L", b"K"):
            if member.size > _EXTENDED:
                raise ImageError(name, number, f"an extended header of {member.size} bytes")
            data = tar.read(member.position, member.size)
            if member.kind == b"x":
                extended |= _records(name, number, data)
            else:
                extended[b"path" if member.kind == b"L" else b"linkpath"] = data.rstrip(b"\0")
        elif member.kind != b"g":
            member = _extended(name, number, member, extended)
            extended = {}
            if member.position + member.size > tar.size:
                raise ImageError(name, number, f"{member.path!r} is cut")
            yield member
        at = member.position + -(-member.size // _BLOCK) * _BLOCK
    raise ImageError(name, None, f"more than {_MEMBERS:,} members")


def _header(name: str, number: int, block: bytes, position: int) -> _Member:
    try:
        told = _number(block[148:156])
        if told != sum(block[:148]) + 8 * 32 + sum(block[156:]):
            raise ValueError("the sum of a header is wrong")
        path = block[:100].partition(b"\0")[0]
        if block[257:263] == b"ustar\0":
            above = block[345:500].partition(b"\0")[0]
            path = above + b"/" + path if above else path
        kind = block[156:157]
        # A link has no content, whatever size some archives give it.
        size = 0 if kind in b"123456" else _number(block[124:136])
        return _Member(
            kind,
            path,
            block[157:257].partition(b"\0")[0],
            _number(block[100:108]),
            _number(block[108:116]),
            _number(block[116:124]),
            _number(block[136:148]) * 1_000_000,
            size,
            position,
        )
    except ValueError as error:
        raise ImageError(name, number, f"is no tar archive, or damaged: {error}") from None


def _number(field: bytes) -> int:
    """Octal, or with the high bit set base 256. ValueError."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise ValueError("a negative number")
        number = int.from_bytes(field[1:], "big")
    else:
        text = field.strip(b" \0")
        if not all(byte in b"01234567" for byte in text):
            raise ValueError("a number that is none")
        number = int(text or b"0", 8)
    if number >> 63:
        raise ValueError("a number beyond all files")
    return number


def _records(name: str, number: int, data: bytes) -> dict[bytes, bytes]:
    """Of a pax header: "%d %s=%s\\n", the length first."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        length, _, _ = data[at : at + 7].partition(b" ")
        if not re.fullmatch(rb"[0-9]{1,6}", length):
            raise ImageError(name, number, "an extended header that is none")
        end = at + int(length)
        key, equals, value = data[at + len(length) + 1 : end].partition(b"=")
        if end > len(data) or not equals or not value.endswith(b"\n"):
            raise ImageError(name, number, "an extended header that is none")
        found[key] = value[:-1]
        at = end
    return found


def _extended(name: str, number: int, member: _Member, records: dict[bytes, bytes]) -> _Member:
    if any(key.startswith(b"GNU.sparse") for key in records) or member.kind == b"S":
        # Its content is a map and pieces: taken as it lies it would be another file.
        return member._replace(kind=b"S")
    changes: dict[str, int | bytes] = {}
    for key, value in records.items():
        if key in (b"path", b"linkpath"):
            changes["path" if key == b"path" else "link"] = value
        elif key in (b"size", b"uid", b"gid", b"mtime"):
            if not _NUMBER.fullmatch(value):
                raise ImageError(name, number, f"{key!r} is {value[:40]!r}")
            whole, _, fraction = value.partition(b".")
            changes[key.decode()] = int(whole)
            if key == b"mtime":
                micros = int(fraction[:6].ljust(6, b"0"))
                changes["mtime"] = int(whole) * 1_000_000 + (micros if value[:1] != b"-" else 0)
    if member.kind not in _REGULAR:
        changes.pop("size", None)
    found = member._replace(**changes)  # type: ignore[arg-type]
    if not 0 <= found.size < 1 << 62 or min(found.uid, found.gid) < 0:
        raise ImageError(name, number, "a number beyond all files")
    return found


__all__ = ["read_devshm"]
