"""One line of mountinfo: a mount as the kernel tells of it.

proc_pid_mountinfo(5). Pure: bytes in, values out. The whole table is _mounttable's.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from ghostpool._linux import Attr

# As plain numbers: flags of enum take thirty times as long to join and to test.
_RDONLY, _NOATIME, _STRICTATIME = map(int, (Attr.RDONLY, Attr.NOATIME, Attr.STRICTATIME))
_OPTIONS = {
    b"ro": _RDONLY,
    b"nosuid": int(Attr.NOSUID),
    b"nodev": int(Attr.NODEV),
    b"noexec": int(Attr.NOEXEC),
    b"noatime": _NOATIME,
    b"nodiratime": int(Attr.NODIRATIME),
    b"nosymfollow": int(Attr.NOSYMFOLLOW),
}


def unescape(field: bytes) -> bytes:
    """A path as it is; the kernel writes space, tab, newline and backslash in octal."""
    if b"\\" not in field:
        return field
    head, *pieces = field.split(b"\\")
    return head + b"".join(bytes([int(piece[:3], 8)]) + piece[3:] for piece in pieces)


def escape(path: bytes) -> bytes:
    """A path as the kernel writes it."""
    for character in b"\\ \t\n":
        path = path.replace(b"%c" % character, b"\\%03o" % character)
    return path


def option_names(attributes: int) -> list[str]:
    """MOUNT_ATTR_* bits as mount(8) spells them; ro or rw first, the atime mode always named."""
    names = ["ro" if attributes & _RDONLY else "rw"]
    plain = ("nosuid", "nodev", "noexec", "nodiratime", "nosymfollow")
    names += [name for name in plain if attributes & _OPTIONS[name.encode()]]
    if attributes & _NOATIME:
        return [*names, "noatime"]
    return [*names, "strictatime" if attributes & _STRICTATIME else "relatime"]


class LiveMount(NamedTuple):
    """One line of mountinfo: a mount as it was when its table was read."""

    mnt_id: int
    """Recycled after an unmount; the lease identifies the mount by its unique id."""
    parent: int
    """mnt_id of the mount that it is mounted on."""
    device: int
    """Device number of its superblock, as os.makedev gives it."""
    root: bytes
    """What of the file system is mounted: an absolute path inside it."""
    mountpoint: bytes
    """Absolute, below the root of the process whose table it is."""
    attributes: int
    """MOUNT_ATTR_* bits; an atime mode is a value inside ATIME_MASK."""
    shared_group: int
    """Peer group that it shares mounts and unmounts with, or 0."""
    master_group: int
    """Peer group whose slave it is, or 0."""
    fstype: str
    source: str
    superblock_read_only: bool
    idmapped: bool = False
    """It shows other ids than its file system has: mount_setattr(2)."""

    @property
    def read_only(self) -> bool:
        """The mount's own flag, whatever the superblock says."""
        return bool(self.attributes & _RDONLY)

    def options(self) -> list[str]:
        """The per-mount options as mount(8) spells them: ro or rw first, the atime mode last."""
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
    relatime = idmapped = False
    for option in fields[5].split(b","):
        attributes |= _OPTIONS.get(option, 0)
        relatime |= option == b"relatime"
        idmapped |= option == b"idmapped"
    if not relatime and not attributes & _NOATIME:
        attributes |= _STRICTATIME
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
        idmapped=idmapped,
    )
