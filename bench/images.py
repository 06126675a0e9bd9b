"""Image directories of any size, in CRIU's format: what a dump of many ghosts would have written.

Framing of img_version 2 (inventory.img with one magic word, all others with two, records with a
32-bit length in front) and protobuf messages put together by hand: what a hundred thousand
records have in common is encoded once, and the little that differs is joined to it.
Ghosts are spread evenly: neighbours by number are in different namespaces, then on different
mounts, then in different directories and at last in different tasks.
Source of the format: CRIU 4.2, images/*.proto; criu/files-ghost.c for where content goes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_COMMON_MAGIC = 0x54564319
_MAGICS = {
    "inventory": 0x58313116,
    "pstree": 0x50273030,
    "core": 0x55053847,
    "ids": 0x54432030,
    "mm": 0x57492820,
    "fs": 0x51403912,
    "fdinfo": 0x56213732,
    "files": 0x56303138,
    "remap-fpath": 0x59133954,
    "ghost-file": 0x52583605,
    "mountpoints": 0x55563928,
}
_CHUNKED_FROM = 12288  # bytes: criu writes smaller ghosts as they are, larger ones in chunks
_TMPFS = 5
_RELATIME = 0x200000
_RDONLY = 0x1
_REG = 1
_ALIVE = 1
_O_RDONLY = 0o100000  # as fdinfo shows it: O_LARGEFILE is always there
_FIRST_FD = 3
_FIRST_NAMESPACE = 10  # 1 is the namespace that criu itself ran in
_FIRST_MOUNT = 500
_OWNER = 1000
_MODE = 0o100644
_ATIME_S = 1_600_000_000
_MTIME_S = 1_500_000_000
_PIECE = 1 << 20
_PIECES = 512  # that are written at once: half of what writev(2) takes


class Place(NamedTuple):
    """Where one ghost is, every part counted from 0."""

    namespace: int
    mount: int
    directory: int
    task: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What an image directory holds."""

    ghosts: int
    """In all; each is open once."""
    namespaces: int = 1
    mounts: int = 10
    """Read-only tmpfs mounts with ghosts, per namespace."""
    size: int = 4096
    """Bytes of each ghost."""
    tasks: int = 1
    """Per namespace."""
    directories: int = 0
    """Per mount; 0: the ghosts were in the root directory of the mount."""
    further_mounts: int = 0
    """Writable binds of a directory of the root file system, per namespace."""
    base: bytes = b""
    """Directory that all mount points but the root's are below; absolute, or b"" for "/"."""
    extents: int = 0
    """Pieces of data in each ghost, evenly apart, with holes between them; 0: it has no holes."""
    extent: int = 4096
    """Bytes of each of them."""

    @property
    def mounts_in_all(self) -> int:
        """Mounts of one namespace, its root included."""
        return 1 + self.mounts + self.further_mounts

    @property
    def data(self) -> list[tuple[int, int]]:
        """Offset and length of what is not a hole in a ghost."""
        if not self.extents:
            return [(0, self.size)]
        apart = self.size // self.extents
        return [(number * apart, self.extent) for number in range(self.extents)]

    def namespace_id(self, namespace: int) -> int:
        """The number that the images give to a mount namespace."""
        return _FIRST_NAMESPACE + namespace

    def mountpoint(self, mount: int) -> bytes:
        """Of a read-only mount."""
        return b"%s/m%05d" % (self.base, mount)

    def further_mountpoint(self, mount: int) -> bytes:
        """Of a further mount."""
        return b"%s/further/%06d" % (self.base, mount)

    @property
    def shared_directory(self) -> bytes:
        """What the further mounts show."""
        return self.base + b"/shared"

    def directory(self, directory: int) -> bytes:
        """A directory of a mount as a suffix of its mount point."""
        return b"/d%05d" % directory if self.directories else b""

    def place(self, ghost: int) -> Place:
        """Where the ghost of a number was."""
        rest, namespace = divmod(ghost, self.namespaces)
        rest, mount = divmod(rest, self.mounts)
        rest, directory = divmod(rest, max(1, self.directories))
        return Place(namespace, mount, directory, rest % self.tasks)


def name_of(ghost: int) -> bytes:
    """The name that a ghost had in its directory."""
    return b"f%07d" % ghost


def content_of(shape: Shape) -> bytes:
    """What a piece of data in a ghost begins with, a mebibyte at most; larger ones repeat it."""
    largest = max(length for _, length in shape.data)
    return bytes(range(251)) * (min(largest, _PIECE) // 251 + 1)


def write_images(directory: Path, shape: Shape) -> None:
    """Write the image directory of `shape`; `directory` is made and must not exist yet.

    ValueError: counts that no dump could have.
    """
    if min(shape.namespaces, shape.mounts, shape.tasks) < 1 or shape.size < 0:
        raise ValueError("at least one namespace, mount and task, and no negative size")
    if shape.namespaces * shape.mounts_in_all >= 1 << 20:
        raise ValueError("a device number has 20 bits for its minor")
    if shape.extents and not (
        shape.size >= _CHUNKED_FROM and 0 < shape.extent <= shape.size // shape.extents
    ):
        raise ValueError("holes need a ghost in chunks, and pieces of data that fit into it")
    directory.mkdir()
    _Writer(directory, shape).write()


# Encoding.


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(*fields: tuple[int, int | bytes]) -> bytes:
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            out += _varint(number << 3 | 2) + _varint(len(value)) + value
    return bytes(out)


def _record(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


def _head(kind: str) -> bytes:
    words = [_MAGICS[kind]] if kind == "inventory" else [_COMMON_MAGIC, _MAGICS[kind]]
    return struct.pack(f"<{len(words)}I", *words)


class _Writer:
    def __init__(self, directory: Path, shape: Shape) -> None:
        self._directory = directory
        self._shape = shape

    def write(self) -> None:
        self._save("inventory", "inventory.img", [_message(*self._inventory())])
        for namespace in range(self._shape.namespaces):
            mounts = self._mounts(namespace)
            name = f"mountpoints-{self._shape.namespace_id(namespace)}.img"
            self._save("mountpoints", name, mounts[::-1])  # criu lists children first
        files = bytearray(_head("files"))
        self._tasks(files)
        self._opens(files)
        (self._directory / "files.img").write_bytes(files)
        self._ghosts()

    def _save(self, kind: str, name: str, payloads: list[bytes]) -> None:
        data = _head(kind) + b"".join(map(_record, payloads))
        (self._directory / name).write_bytes(data)

    def _inventory(self) -> list[tuple[int, int | bytes]]:
        criu_itself = _message((1, 1), (2, 1), (3, 1), (4, 1), (9, 1), (10, 1))
        return [(1, 2), (2, 1), (3, criu_itself), (4, 1)]

    # Mounts.

    def _mount_id(self, namespace: int, number: int = 0) -> int:
        """Id of the root, or of the mount after it with that number from 1 on."""
        return _FIRST_MOUNT + namespace * self._shape.mounts_in_all + number

    def _mounts(self, namespace: int) -> list[bytes]:
        shape = self._shape
        root = self._mount_id(namespace)
        mounts = [self._mount(root, 1, root, _RELATIME, b"/", b"/")]
        for number in range(shape.mounts):
            own = self._mount_id(namespace, 1 + number)
            point = shape.mountpoint(number)
            mounts.append(self._mount(own, root, own, _RELATIME | _RDONLY, b"/", point))
        for number in range(shape.further_mounts):
            own = self._mount_id(namespace, 1 + shape.mounts + number)
            point = shape.further_mountpoint(number)
            mounts.append(self._mount(own, root, root, _RELATIME, shape.shared_directory, point))
        return mounts

    def _mount(
        self, own: int, parent: int, device: int, flags: int, root: bytes, point: bytes
    ) -> bytes:
        return _message(
            (1, _TMPFS),
            (2, own),
            (3, device),  # major 0; the id serves as a minor that no other tmpfs has
            (4, parent),
            (5, flags),
            (6, root),
            (7, point),
            (8, b"tmpfs"),
            (9, b"mode=755"),
            (17, 0),
        )

    # Tasks and what they have open.

    def _pid(self, place: Place) -> int:
        return 1 + place.namespace * self._shape.tasks + place.task

    def _tasks(self, files: bytearray) -> None:
        pstree: list[bytes] = []
        for number in range(self._shape.namespaces * self._shape.tasks):
            pid = 1 + number
            namespace = number // self._shape.tasks
            root, exe = self._file_id(2 * number), self._file_id(2 * number + 1)
            mount = self._mount_id(namespace)
            files += _record(_file(root, b"/", mount, 0, 0o040755, None))
            files += _record(_file(exe, b"/bin/task", mount, 0, 0o100755, 4096))
            parent = 1 if number else 0
            pstree.append(_message((1, pid), (2, parent), (3, 1), (4, 1), (5, pid)))
            state = _message((1, _ALIVE), (2, 0), (6, b"task"))
            self._save("core", f"core-{pid}.img", [_message((1, 1), (3, state))])
            ids = [(n, pid) for n in (1, 2, 3, 4)]
            ids += [(9, self._shape.namespace_id(namespace)), (10, 1)]
            self._save("ids", f"ids-{pid}.img", [_message(*ids)])
            self._save("fs", f"fs-{pid}.img", [_message((1, root), (2, root), (3, 0o22))])
            self._save("mm", f"mm-{pid}.img", [_message((1, 0), (12, exe))])
        self._save("pstree", "pstree.img", pstree)

    def _file_id(self, number: int) -> int:
        """Ghosts have the ids from 1 on, as reg files and as ghosts; the rest follows."""
        return 1 + self._shape.ghosts + number

    def _opens(self, files: bytearray) -> None:
        shape = self._shape
        prefixes = [
            [shape.mountpoint(m) + shape.directory(d) + b"/" for d in range(shape.directories or 1)]
            for m in range(shape.mounts)
        ]
        tables = [bytearray(_head("fdinfo")) for _ in range(shape.namespaces * shape.tasks)]
        next_fd = [_FIRST_FD] * len(tables)
        remaps = bytearray(_head("remap-fpath"))
        owner = _message((1, 0), (2, 0), (3, 0), (4, 0), (5, 0))
        middle = _message((2, _O_RDONLY), (3, 0), (5, owner))
        end = _message((8, shape.size), (10, _MODE))
        tails = [
            [
                _message((7, self._mount_id(n, 1 + m) << 1)) + end  # zigzag of a positive number
                for m in range(shape.mounts)
            ]
            for n in range(shape.namespaces)
        ]
        pack = struct.Struct("<I").pack
        for ghost in range(shape.ghosts):
            place = shape.place(ghost)
            own = _varint(1 + ghost)
            name = prefixes[place.mount][place.directory] + name_of(ghost)
            tail = tails[place.namespace][place.mount]
            inner = b"\x08%b%b\x32%b%b%b" % (own, middle, _varint(len(name)), name, tail)
            outer = b"\x08\x01\x10%b\x1a%b%b" % (own, _varint(len(inner)), inner)
            files += pack(len(outer))
            files += outer
            remap = b"\x08%b\x10%b\x18\x01" % (own, own)
            remaps += pack(len(remap))
            remaps += remap
            task = self._pid(place) - 1
            row = b"\x08%b\x10\x00\x18\x01\x20%b" % (own, _varint(next_fd[task]))
            next_fd[task] += 1
            tables[task] += pack(len(row))
            tables[task] += row
        if shape.ghosts:
            (self._directory / "remap-fpath.img").write_bytes(remaps)
        for task, table in enumerate(tables):
            if next_fd[task] > _FIRST_FD:
                (self._directory / f"fdinfo-{1 + task}.img").write_bytes(table)

    # Ghosts.

    def _ghosts(self) -> None:
        shape = self._shape
        atime = _message((1, _ATIME_S), (2, 1))
        mtime = _message((1, _MTIME_S), (2, 2))
        chunked = shape.size >= _CHUNKED_FROM
        after = _message((7, atime), (8, mtime))
        if chunked:
            after += _message((9, 1), (10, shape.size))
        body = list(_body(shape, chunked))
        devices = [
            [
                _message((1, _OWNER), (2, _OWNER), (3, _MODE), (4, self._mount_id(n, 1 + m)))
                for m in range(shape.mounts)
            ]
            for n in range(shape.namespaces)
        ]
        head = _head("ghost-file")
        pack = struct.Struct("<I").pack
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        directory = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for ghost in range(shape.ghosts):
                place = shape.place(ghost)
                before = devices[place.namespace][place.mount]
                entry = b"%b\x28%b%b" % (before, _varint(1000 + ghost), after)
                start = b"%b%b%b" % (head, pack(len(entry)), entry)
                fd = os.open(b"ghost-file-%x.img" % (1 + ghost), flags, 0o644, dir_fd=directory)
                try:
                    os.writev(fd, (start, *body[:_PIECES]))
                    for at in range(_PIECES, len(body), _PIECES):
                        os.writev(fd, body[at : at + _PIECES])
                finally:
                    os.close(fd)
        finally:
            os.close(directory)


def _body(shape: Shape, chunked: bool) -> Iterator[bytes]:
    """What follows the entry of a ghost, in pieces."""
    content = content_of(shape)
    for offset, length in shape.data:
        if chunked:
            yield _record(_message((1, length), (2, offset)))
        whole, rest = divmod(length, _PIECE)
        yield from [content[:_PIECE]] * whole
        yield content[:rest]


def _file(own: int, name: bytes, mount: int, flags: int, mode: int, size: int | None) -> bytes:
    owner = _message((1, 0), (2, 0), (3, 0), (4, 0), (5, 0))
    fields: list[tuple[int, int | bytes]] = [
        (1, own),
        (2, flags),
        (3, 0),
        (5, owner),
        (6, name),
        (7, mount << 1),  # zigzag of a positive number
    ]
    if size is not None:
        fields.append((8, size))
    inner = _message(*fields, (10, mode))
    return _message((1, _REG), (2, own), (3, inner))
