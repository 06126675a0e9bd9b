"""The members of a tar archive, in their order: name, kind, and where the content lies.

Nothing is extracted, ever: a member is a name and a run of bytes, and what links, devices, owners
and modes in an archive mean is left to who asks for the header. All dialects in use are read:
ustar, GNU (long names, large sizes) and pax. A member whose content is not a plain run of bytes
(sparse) is told as such.
Sources: tar(5), POSIX.1-2017 pax, "Interchange formats"; GNU tar, src/tar.h.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from ghostpool._unpack import Stream, Unreadable

BLOCK: Final = 512
NAME_MAX: Final = 4096
_EXTENSION_MAX: Final = 1 << 20
"""Bytes of a pax header or a long name."""
_SIZE_MAX: Final = 1 << 62
_ZEROS: Final = bytes(BLOCK)

Kind = Literal["file", "link", "sparse", "other"]
_KINDS: Final[dict[bytes, Kind]] = {
    b"\0": "file",
    b"0": "file",
    b"7": "file",  # contiguous, which nobody cares about
    b"1": "link",
    b"2": "link",
    b"S": "sparse",
}


class Member(NamedTuple):
    """One member; the stream is at its content when it is told."""

    name: bytes
    kind: Kind
    at: int
    """Position of the content in the stream."""
    size: int
    header: bytes = b""
    """The last of its headers, as it is."""
    fields: Mapping[bytes, bytes] = MappingProxyType({})
    """What the headers before that one say instead: by the names of pax."""


def is_tar(head: bytes) -> bool:
    """Whether a stream that begins so is an archive, or an archive of nothing."""
    return len(head) >= BLOCK and (head[:BLOCK] == _ZEROS or _checksum_is_right(head[:BLOCK]))


def members(stream: Stream) -> Iterator[Member]:
    """All members; what is not read of a member's content is skipped.

    Unreadable: it is no archive, or is cut. An archive ends with a block of zeros, or it was cut
    between two members.
    """
    last = b""
    while True:
        header = exactly(stream, BLOCK, last, "end")
        if header == _ZEROS:
            return
        if not _checksum_is_right(header):
            raise Unreadable(f"what follows {_after(last)} is no member of a tar archive")
        member = _member(stream, header, last)
        last = member.name
        yield member
        if not stream.skip(member.at - stream.at + -(-member.size // BLOCK) * BLOCK):
            raise Unreadable(f"it is cut inside the member {_shown(last)}")


def exactly(stream: Stream, length: int, after: bytes, what: str) -> bytes:
    """So many bytes. Unreadable: there are not as many, as it is cut before `what`."""
    data = b""
    while len(data) < length:
        piece = stream.read(length - len(data))
        if not piece:
            raise Unreadable(f"it is cut before its {what}, after {_after(after)}")
        data += piece
    return data


def _member(stream: Stream, header: bytes, last: bytes) -> Member:
    """The member that begins with this header, and the headers that only add to it."""
    name = None
    size = None
    sparse = False
    said: dict[bytes, bytes] = {}
    for _ in range(8):
        kind = header[156:157]
        length = _number(header[124:136])
        if kind not in (b"x", b"g", b"L", b"K"):
            break
        if length > _EXTENSION_MAX:
            raise Unreadable(f"a header of {length:,} bytes follows {_after(last)}")
        content = exactly(stream, -(-length // BLOCK) * BLOCK, last, "header")[:length]
        if kind == b"L":
            name = content.rstrip(b"\0")
        elif kind == b"K":
            said[b"linkpath"] = content.rstrip(b"\0")
        elif kind == b"x":
            fields = _pax(content, last)
            said |= fields
            name = fields.get(b"path", name)
            sparse = any(key.startswith(b"GNU.sparse.") for key in fields)
            if b"size" in fields:
                size = _decimal(fields[b"size"], last)
        header = exactly(stream, BLOCK, last, "header")
        if not _checksum_is_right(header):
            raise Unreadable(f"what follows {_after(last)} is no member of a tar archive")
    else:
        raise Unreadable(f"too many headers follow {_after(last)}")
    if name is None:
        name = header[:100].split(b"\0", 1)[0]
        prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
        name = prefix + b"/" + name if prefix else name
    if len(name) > NAME_MAX or b"\0" in name:
        raise Unreadable(f"no file can have the name of the member after {_after(last)}")
    found = _KINDS.get(kind, "other")
    if sparse:
        found = "sparse"
    if size is None:
        size = length
    # These have no content, whatever is said about its size; Go and GNU tar read them so too.
    if found == "link" or kind in (b"3", b"4", b"5", b"6"):
        size = 0
    if kind == b"S":
        more = header[482]
        while more:  # its map goes on in further headers
            more = exactly(stream, BLOCK, name, "header")[504]
    return Member(name, found, stream.at, size, header, said)


def _pax(content: bytes, last: bytes) -> dict[bytes, bytes]:
    """The records of a pax header: "length key=value\\n", the length in decimal, of all of it."""
    fields = {}
    at = 0
    while at < len(content):
        digits, space, _ = content[at : at + 20].partition(b" ")
        end = at + (_decimal(digits, last) if space else 0)
        key, equals, value = content[at + len(digits) + 1 : end].partition(b"=")
        if not equals or end > len(content) or not value.endswith(b"\n"):
            raise Unreadable(f"the pax header after {_after(last)} is malformed")
        fields[key] = value[:-1]
        at = end
    return fields


def _decimal(digits: bytes, last: bytes) -> int:
    if not digits.isdigit() or len(digits) > 19 or int(digits) > _SIZE_MAX:
        raise Unreadable(f"the pax header after {_after(last)} has {digits[:20]!r} for a number")
    return int(digits)


def _number(field: bytes) -> int:
    """Octal digits, or with the highest bit set a binary number (GNU)."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    else:
        digits = field.strip(b" \0")
        try:
            value = int(digits, 8) if digits else 0
        except ValueError:
            value = -1
    if not 0 <= value <= _SIZE_MAX:
        raise Unreadable(f"{field!r} is no size of a member")
    return value


def _checksum_is_right(header: bytes) -> bool:
    """The sum of all bytes, with the field itself taken for blanks."""
    digits = header[148:156].strip(b" \0")
    if not digits or not digits.isdigit():
        return False
    try:
        return int(digits, 8) == sum(header[:148]) + 8 * 32 + sum(header[156:])
    except ValueError:
        return False


def _shown(name: bytes) -> str:
    return ascii(name[:200].decode("utf-8", "replace"))


def _after(last: bytes) -> str:
    return f"the member {_shown(last)}" if last else "its beginning"


__all__ = ["BLOCK", "NAME_MAX", "Member", "exactly", "is_tar", "members"]
