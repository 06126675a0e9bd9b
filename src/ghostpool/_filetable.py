"""Every open file of the dump, by what the other images refer to it with.

A reference is a type and an id, and leads to a reg file directly or, for fifos and terminals,
through the satellite that they were opened by. Sockets, pipes and the rest are only counted as
present, so that an image that was cut between two records is noticed by those who refer to it.

They are in files.img; in reg-files.img, fifo.img and so on, one for each type, before CRIU 3.4,
where an id was of one type only. As CRIU does, the lists are read if files.img has no record.
Source: CRIU 4.2, images/fdinfo.proto, regfile.proto, fifo.proto, tty.proto, sk-unix.proto.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Final

from ghostpool._errors import ImageError
from ghostpool._imagefile import ImageDirectory
from ghostpool._limits import NAME_LIMIT, TEXT_LIMIT, YEAR_US
from ghostpool._model import FifoData, RegFile, RegId, Socket, maker
from ghostpool._paths import is_image_path

# enum fd_types, and the field of file_entry that holds the details.
FD_TYPE_REG: Final = 1
FD_TYPE_FIFO: Final = 3
_UNIXSK: Final = 5
_TTY: Final = 11
_DETAILS: Final = {FD_TYPE_REG: "reg", FD_TYPE_FIFO: "fifo", _UNIXSK: "usk", _TTY: "tty"}
# The lists of CRIU before 3.4.
_LISTS: Final = {
    FD_TYPE_REG: "reg-files",
    2: "pipes",
    FD_TYPE_FIFO: "fifo",
    4: "inetsk",
    _UNIXSK: "unixsk",
    6: "eventfd",
    7: "eventpoll",
    8: "inotify",
    9: "signalfd",
    10: "packetsk",
    _TTY: "tty",
    12: "fanotify",
    13: "netlinksk",
    14: "ns-files",
    15: "tunfile",
    16: "ext-files",
    17: "timerfd",
}

_U32: Final = (1 << 32) - 1
_make_reg: Final = maker(RegFile)
_NO_SEEK: Final = (1 << 64) - 1
_NO_MOUNT: Final = -1


@dataclass(slots=True)
class FileTable:
    """All open files, by what the other images refer to them with."""

    listed: bool = False
    """They are in one list for each type."""
    regs: dict[RegId, RegFile] = field(default_factory=dict)
    records: dict[RegId, int] = field(default_factory=dict)
    others: dict[tuple[int, int], RegId | None] = field(default_factory=dict)
    """(type, id) of every other file, and the reg file behind it, if any."""
    pipes: dict[int, RegId] = field(default_factory=dict)
    """Reg file of the first fifo in the image with a pipe_id."""
    sockets: dict[RegId, Socket] = field(default_factory=dict)
    """Bound UNIX sockets whose names are gone."""

    def image(self, kind: int = FD_TYPE_REG) -> str:
        """The image that files of a kind are in, or would be."""
        return f"{_LISTS.get(kind, 'files')}.img" if self.listed else "files.img"


def read_files(source: ImageDirectory, flags_of: Callable[[int], int] | None = None) -> FileTable:
    """Read all open files. `flags_of` makes flags for open(2) of theirs, if they are no such."""
    name = "files.img"
    files = FileTable()
    satellites: list[tuple[int, int, Any]] = []
    sockets: list[tuple[int, Any]] = []
    regs, others = files.regs, files.others
    for number, entry in enumerate(source.records(name, "files")):
        kind, ident = entry.type, entry.id
        # By type and id: before CRIU 3.6 a fifo and its reg file have the same id.
        if ident in regs if kind == FD_TYPE_REG else (kind, ident) in others:
            raise ImageError(name, number, f"repeats file id {ident} of type {kind}")
        details = _DETAILS.get(kind)
        if details is None:
            others[kind, ident] = None
            continue
        inner = getattr(entry, details)
        if inner.id != ident or not ident:
            if not entry.HasField(details):
                raise ImageError(name, number, f"a file of type {kind} without its {details} entry")
            if inner.id != ident:
                raise ImageError(name, number, f"file id {ident} holds an entry of id {inner.id}")
        if kind == FD_TYPE_REG:
            regs[ident] = _reg(name, number, inner, flags_of)
            files.records[ident] = number
            continue
        others[kind, ident] = None
        if kind != _UNIXSK:
            satellites.append((number, kind, inner))
        elif inner.deleted:
            sockets.append((number, inner))
    if not regs and not others:
        satellites = _read_lists(source, files, sockets, flags_of)
    if not regs and not others:
        state = "holds no file" if name in source.names else "is missing"
        raise ImageError(name, None, f"{state}, but every task has files")
    for number, kind, inner in satellites:
        _follow(number, kind, inner, files)
    _number_sockets(sockets, files, flags_of)
    return files


def _number_sockets(
    sockets: list[tuple[int, Any]], files: FileTable, flags_of: Callable[[int], int] | None
) -> None:
    """Note the sockets, each by a number that is no reg file's."""
    free = itertools.count(_U32, -1)
    taken = files.regs.keys() | {inner.id for _, inner in sockets} if sockets else ()
    for number, inner in sockets:
        own = inner.id
        if own in files.regs:
            own = next(other for other in free if other not in taken)
        socket = _socket(files.image(_UNIXSK), number, RegId(own), inner, flags_of)
        files.sockets[socket.id] = socket
        files.others[_UNIXSK, inner.id] = socket.id


def _read_lists(
    source: ImageDirectory,
    files: FileTable,
    sockets: list[tuple[int, Any]],
    flags_of: Callable[[int], int] | None,
) -> list[tuple[int, int, Any]]:
    """Read the lists of CRIU before 3.4; satellites and sockets are followed later, as above."""
    satellites = []
    files.listed = "reg-files.img" in source.names
    for kind, listed in _LISTS.items() if files.listed else ():
        name = files.image(kind)
        for number, inner in enumerate(source.records(name, listed, counted="files")):
            ident = inner.id
            if ident in files.regs if kind == FD_TYPE_REG else (kind, ident) in files.others:
                raise ImageError(name, number, f"repeats file id {ident}")
            if kind == FD_TYPE_REG:
                files.regs[ident] = _reg(name, number, inner, flags_of)
                files.records[ident] = number
                continue
            files.others[kind, ident] = None
            if kind in (FD_TYPE_FIFO, _TTY):
                satellites.append((number, kind, inner))
            elif kind == _UNIXSK and inner.deleted:
                sockets.append((number, inner))
    return satellites


def _follow(number: int, kind: int, inner: Any, files: FileTable) -> None:
    """Note the reg file that a fifo or a terminal was opened through."""
    named = inner.HasField("regf_id")
    reg = RegId(inner.regf_id if named else inner.id)
    if reg not in files.regs:
        if kind == _TTY and not named:
            return  # a terminal without a path of its own
        raise ImageError(
            files.image(kind),
            number,
            f"file id {inner.id} was opened through id {reg}, which is not there",
        )
    files.others[kind, inner.id] = reg
    if kind == FD_TYPE_FIFO:
        # A pipe_id is an inode number, which two file systems can have both. CRIU dumps the data
        # of an id once, with the first fifo that has it: dump_one_pipe_data() in criu/pipes.c.
        files.pipes.setdefault(inner.pipe_id, reg)


def _reg(name: str, number: int, entry: Any, flags_of: Callable[[int], int] | None) -> RegFile:
    path = entry.name
    external = entry.ext
    if not external and not is_image_path(path):
        raise ImageError(name, number, f"{path[:80]!r} is no absolute, normal path of a file")
    if external and (len(path) > TEXT_LIMIT or b"\0" in path):
        raise ImageError(name, number, f"{path[:80]!r} is no name of an external file")
    position, mnt_id, size, mode = entry.pos, entry.mnt_id, entry.size, entry.mode
    return _make_reg(
        (
            entry.id,
            entry.flags if flags_of is None else flags_of(entry.flags),
            position if position != _NO_SEEK else None,
            path,
            mnt_id if mnt_id != _NO_MOUNT else None,
            size if size or entry.HasField("size") else None,
            mode if mode or entry.HasField("mode") else None,
            external,
        )
    )


def _socket(
    file: str, record: int, ident: RegId, entry: Any, flags_of: Callable[[int], int] | None
) -> Socket:
    name: bytes = entry.name.rstrip(b"\0")
    if not name or b"\0" in name or len(name) > NAME_LIMIT or len(entry.name_dir) > TEXT_LIMIT:
        raise ImageError(file, record, f"{name[:80]!r} is no name that a socket was bound to")
    perms, opts = entry.file_perms, entry.opts
    flags = entry.flags if flags_of is None else flags_of(entry.flags)
    return Socket(
        *(ident, entry.type, entry.state, flags, entry.uflags, entry.backlog, entry.peer),
        shutdown=entry.shutdown & 3,
        name=name,
        directory=entry.name_dir.rstrip(b"\0"),
        owner=(perms.mode, perms.uid, perms.gid) if entry.HasField("file_perms") else None,
        options=(
            opts.so_sndbuf,
            opts.so_rcvbuf,
            _microseconds(opts.so_snd_tmo_sec, opts.so_snd_tmo_usec),
            _microseconds(opts.so_rcv_tmo_sec, opts.so_rcv_tmo_usec),
            opts.so_passcred,
            opts.so_passsec,
        ),
    )


def _microseconds(seconds: int, micros: int) -> int:
    """A time limit; one that no kernel would take is a year."""
    return min(seconds * 1_000_000 + micros, YEAR_US)


def read_fifo_data(source: ImageDirectory, files: FileTable) -> dict[RegId, FifoData]:
    """What each fifo held at the dump, by the first reg file it was opened through."""
    name = "fifo-data.img"
    pending: dict[RegId, FifoData] = {}
    begin = source.place(name) if source.place is not None and name in source.names else 0
    entries = source.followed(name, "fifo-data", attrgetter("bytes"))
    for number, (entry, position) in enumerate(entries):
        pipe = entry.pipe_id
        if pipe not in files.pipes:
            raise ImageError(
                name, number, f"pipe id {pipe} is that of no fifo in {files.image(FD_TYPE_FIFO)}"
            )
        if files.pipes[pipe] in pending:
            raise ImageError(name, number, f"repeats pipe id {pipe}")
        size = entry.size if entry.HasField("size") else None
        if size is not None and entry.bytes > size:
            raise ImageError(
                name, number, f"{entry.bytes} bytes waited in a pipe whose size is {size}"
            )
        pending[files.pipes[pipe]] = FifoData(begin + position, entry.bytes, size)
    return pending


__all__ = ["FD_TYPE_FIFO", "FD_TYPE_REG", "FileTable", "read_fifo_data", "read_files"]
