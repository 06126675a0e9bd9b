"""The mount table of a live namespace: mountinfo, read and split in one piece.

proc_pid_mountinfo(5). The table is indexed by mount point and a line is parsed only when it is
asked for: a plan needs a handful of the mounts, and one system call per mount (statmount) costs
more than reading all of them this way (docs/design.md, D-004).
Pure: bytes in, values out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from ghostpool._linux import Attr

_OPTIONS = {
    b"ro": Attr.RDONLY,
    b"nosuid": Attr.NOSUID,
    b"nodev": Attr.NODEV,
    b"noexec": Attr.NOEXEC,
    b"noatime": Attr.NOATIME,
    b"nodiratime": Attr.NODIRATIME,
    b"nosymfollow": Attr.NOSYMFOLLOW,
}


def unescape(field: bytes) -> bytes:
    """A path as it is; the kernel writes space, tab, newline and backslash in octal."""
    if b"\\" not in field:
        return field
    head, *pieces = field.split(b"\\")
    return head + b"".join(bytes([int(piece[:3], 8)]) + piece[3:] for piece in pieces)


def option_names(attributes: int) -> list[str]:
    """MOUNT_ATTR_* bits as mount(8) spells them; ro or rw first, the atime mode always named."""
    names = ["ro" if attributes & Attr.RDONLY else "rw"]
    plain = ("nosuid", "nodev", "noexec", "nodiratime", "nosymfollow")
    names += [name for name in plain if attributes & _OPTIONS[name.encode()]]
    if attributes & Attr.NOATIME:
        return [*names, "noatime"]
    return [*names, "strictatime" if attributes & Attr.STRICTATIME else "relatime"]


class LiveMount(NamedTuple):
    """One line of mountinfo."""

    mnt_id: int
    """Recycled after an unmount; the lease identifies the mount by its unique id."""
    parent: int
    device: int
    root: bytes
    mountpoint: bytes
    attributes: int
    """MOUNT_ATTR_* bits; an atime mode is a value inside ATIME_MASK."""
    shared_group: int
    master_group: int
    fstype: str
    source: str
    superblock_read_only: bool

    @property
    def read_only(self) -> bool:
        """The mount's own flag, whatever the superblock says."""
        return bool(self.attributes & Attr.RDONLY)

    def options(self) -> list[str]:
        """The per-mount options; see `option_names`."""
        return option_names(self.attributes)


def parse_line(line: bytes) -> LiveMount:
    """One line of mountinfo. ValueError if it is none."""
    head, separator, tail = line.partition(b" - ")
    fields = head.split(b" ")
    filesystem = tail.split(b" ")
    if not separator or len(fields) < 6 or len(filesystem) < 3:
        raise ValueError(f"not a line of mountinfo: {line!r}")
    major, _, minor = fields[2].partition(b":")
    attributes = 0
    relatime = False
    for option in fields[5].split(b","):
        attributes |= _OPTIONS.get(option, 0)
        relatime |= option == b"relatime"
    if not relatime and not attributes & Attr.NOATIME:
        attributes |= Attr.STRICTATIME
    groups = {b"shared": 0, b"master": 0}
    for tag in fields[6:]:
        key, _, value = tag.partition(b":")
        if key in groups:
            groups[key] = int(value)
    return LiveMount(
        mnt_id=int(fields[0]),
        parent=int(fields[1]),
        device=os.makedev(int(major), int(minor)),
        root=unescape(fields[3]),
        mountpoint=unescape(fields[4]),
        attributes=attributes,
        shared_group=groups[b"shared"],
        master_group=groups[b"master"],
        fstype=filesystem[0].decode(errors="surrogateescape"),
        source=unescape(filesystem[1]).decode(errors="surrogateescape"),
        superblock_read_only=filesystem[2].split(b",", 1)[0] == b"ro",
    )


class MountTable:
    """The mounts of one namespace, found by mount point.

    `raw` is the content of /proc/PID/mountinfo of a process whose root is the root of the
    namespace: the kernel leaves out what lies outside the reader's root.
    """

    def __init__(self, raw: bytes) -> None:
        self._lines: dict[bytes, list[bytes]] = {}
        for line in raw.split(b"\n"):
            if line:
                self._lines.setdefault(line.split(b" ", 5)[4], []).append(line)
        # Escapes are rare: rewrite only the keys that hold one.
        for key in [key for key in self._lines if b"\\" in key]:
            self._lines.setdefault(unescape(key), []).extend(self._lines.pop(key))

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[LiveMount]:
        for lines in self._lines.values():
            yield from map(parse_line, lines)

    def with_id(self, mnt_id: int) -> LiveMount | None:
        """The mount with this number; no other line is parsed."""
        start = b"%d " % mnt_id
        lines = (line for lines in self._lines.values() for line in lines)
        return next((parse_line(line) for line in lines if line.startswith(start)), None)

    def stack(self, mountpoint: bytes) -> list[LiveMount]:
        """The mounts on `mountpoint`, bottom first.

        The order is that of the parents (each covers the one it is mounted on), not that of
        the lines: moves and MOVE_MOUNT_BENEATH leave the lines in the order of creation.
        """
        mounts = [parse_line(line) for line in self._lines.get(mountpoint, ())]
        if len(mounts) < 2:
            return mounts
        by_parent: dict[int, list[LiveMount]] = {}
        ids = {mount.mnt_id for mount in mounts}
        for mount in mounts:
            by_parent.setdefault(mount.parent, []).append(mount)
        ordered: list[LiveMount] = []
        pending = [m for m in mounts if m.parent not in ids or m.parent == m.mnt_id]
        while pending:
            mount = pending.pop(0)
            ordered.append(mount)
            pending.extend(m for m in by_parent.get(mount.mnt_id, ()) if m is not mount)
        return ordered

    def containing(self, path: bytes) -> LiveMount | None:
        """The topmost mount with the longest mount point that is a prefix of `path`."""
        while True:
            stack = self.stack(path or b"/")
            if stack:
                return stack[-1]
            if not path or path == b"/":
                return None
            path = path.rpartition(b"/")[0]
