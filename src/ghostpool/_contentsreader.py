"""The reader of one tmpfs image: a process that may do nothing but unpack it and tell its members.

It is given the image, a gzip'ed tar archive as `criu dump` has tar write it, gives up everything
else (see _confine), and tells of each member what the archive says, the contents of files included.
A name leads nowhere here. Owners, modes, times and links are checked by who listens.
Sources: CRIU 4.2, criu/filesystems.c (tmpfs_dump); tar(5).
"""

from __future__ import annotations

import binascii
import os
import re
import signal
from typing import Any, Final, NoReturn

from ghostpool import _confine
from ghostpool._model import Step
from ghostpool._said import Said
from ghostpool._tar import Member, members
from ghostpool._unpack import FileStream, Stream, Unreadable, load, unpack

_PIECE: Final = 1 << 20
"""Bytes of content in one frame."""
_TIME: Final = re.compile(rb"(-?[0-9]{1,11})(?:\.([0-9]{0,20}))?")
_KINDS: Final = {
    b"\0": "file",
    b"0": "file",
    b"7": "file",
    b"1": "hard link",
    b"2": "link",
    b"3": "char device",
    b"4": "block device",
    b"5": "directory",
    b"6": "fifo",
}


def read(said: Said) -> None:
    """Tell all members of one image."""
    (most,), (fd,) = said.hear()
    size = os.fstat(fd).st_size
    load()
    _confine.confine(None, _confine.unpacking_s(size))
    stream = unpack(FileStream(fd, 0, size), [Step("gzip", 0)], said.go_on)
    for member in members(stream):
        said.go_on()
        kind = "sparse" if member.kind == "sparse" else _KINDS.get(member.header[156:157])
        if kind in (None, "sparse"):
            said.say("left", [member.name.decode("latin-1"), kind or "unknown"])
        elif member.size > most:
            said.say("left", [member.name.decode("latin-1"), "large"])
        else:
            said.say("node", _told(member, kind))
            if kind == "file":
                most -= member.size
                _tell_content(said, stream, member.size)
    said.say("end", [])


def _told(member: Member, kind: str | None) -> list[Any]:
    header, fields = member.header, member.fields
    link = fields.get(b"linkpath", header[157:257].partition(b"\0")[0])
    return [
        member.name.decode("latin-1"),
        kind,
        _number(header[100:108]),
        _field(fields, b"uid", header[108:116]),
        _field(fields, b"gid", header[116:124]),
        _time(fields, header[136:148]),
        link.decode("latin-1"),
        _number(header[329:337]),
        _number(header[337:345]),
    ]


def _tell_content(said: Said, stream: Stream, left: int) -> None:
    while left:
        piece = stream.read(min(left, _PIECE))
        if not piece:
            raise Unreadable("it is cut")
        left -= len(piece)
        said.say("data", [binascii.b2a_base64(piece, newline=False).decode()])


def _field(fields: Any, name: bytes, field: bytes) -> int:
    digits = fields.get(name)
    if digits is None:
        return _number(field)
    if not digits.isdigit() or len(digits) > 19:
        raise Unreadable(f"{digits[:20]!r} is no {name.decode()}")
    return int(digits)


def _time(fields: Any, field: bytes) -> int:
    """In nanoseconds."""
    if b"mtime" not in fields:
        return _number(field) * 1_000_000_000
    match = _TIME.fullmatch(fields[b"mtime"])
    if match is None:
        raise Unreadable(f"{fields[b'mtime'][:20]!r} is no time")
    part = int((match[2] or b"")[:9].ljust(9, b"0"))
    return int(match[1]) * 1_000_000_000 + (-part if match[1].startswith(b"-") else part)


def _number(field: bytes) -> int:
    """Octal digits, or with the highest bit set a binary number (GNU), which may be negative."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    digits = field.partition(b"\0")[0].strip(b" ")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise Unreadable(f"{digits!r} is no number")
    return int(digits or b"0", 8)


def main(fd: int) -> NoReturn:
    """Serve the socket `fd`, and end."""
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    said = Said(fd)
    try:
        read(said)
    except (EOFError, ConnectionError):
        pass  # nobody listens any more
    except Unreadable as error:
        said.say("error", [str(error)])
    except MemoryError:
        said.say("error", ["it needs too much memory"])
    os._exit(0)


__all__ = ["main"]
