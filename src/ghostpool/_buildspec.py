"""What the builder of mount namespaces is told: namespaces, their mounts, the files on them.

The one vocabulary of all who want namespaces rebuilt: the command, the demo, tests, benchmarks.
Named tuples of plain values: they cross the fork server's socket by marshal, and a lean child
imports nothing for them. Pure values; `_build` acts on them, `_sandbox` derives them from images.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

SHARED_BY_KERNEL = frozenset(
    (
        "sysfs",
        "mqueue",
        "devtmpfs",
        "cgroup2",
        "securityfs",
        "debugfs",
        "tracefs",
        "fusectl",
        "pstore",
        "binfmt_misc",
    )
)
"""File systems of which a new mount is no new superblock, but the one the caller's machine uses."""


class Node(NamedTuple):
    """One file to be made on a mount; times in nanoseconds, `path` from the namespace's root."""

    path: bytes
    mode: int
    """Full st_mode."""
    uid: int = 0
    """Owner."""
    gid: int = 0
    """Group."""
    data: bytes = b""
    """Content of a regular file."""
    target: bytes | None = None
    """What a symbolic link points to."""
    rdev: int = 0
    """Device number of a device, as os.makedev gives it."""
    mtime_ns: int | None = None
    """Modification and access time in nanoseconds since 1970; None: now."""
    hard_link_of: bytes | None = None
    """Path of an earlier node of the same mount; only a further name is made then."""


class MountSpec(NamedTuple):
    """One mount to be made."""

    id: int
    """Unique over the whole build."""
    parent: int
    """Id of the mount it is attached to; of no mount of the namespace for its root."""
    mountpoint: bytes
    superblock: int
    """Equal numbers: one superblock."""
    fstype: str = "tmpfs"
    source: str = "none"
    options: str = ""
    """As mount(8) takes them; those of the first mount of a superblock are used."""
    root: bytes = b"/"
    """What is mounted, inside the superblock, or below the path of `external`."""
    attributes: int = 0
    """Exactly these MOUNT_ATTR_* in the end, atime mode included."""
    read_only_superblock: bool = False
    shared_group: int = 0
    """Peer group of a shared mount, by a number of your own; 0: none."""
    master_group: int = 0
    """Peer group whose slave it is to be, or 0."""
    unbindable: bool = False
    external: bytes | None = None
    """Path of the caller's that supplies the superblock instead of fstype and options."""
    is_file: bool = False
    """`root` is no directory; matters only where it has to be made first."""
    nodes: tuple[Node, ...] = ()


class NamespaceSpec(NamedTuple):
    """One mount namespace; its root first, parents before children."""

    id: int
    """By which it is called from then on; unique over the whole build."""
    mounts: tuple[MountSpec, ...]


class BuildError(OSError):
    """A step of the build failed; plain fields, fit to be sent over a socket."""

    def __init__(self, errno: int, syscall: str, path: str, mount_id: int) -> None:
        super().__init__(errno, os.strerror(errno))
        self.syscall = syscall
        self.path = path
        self.mount_id = mount_id
        """Id of the MountSpec that was being made, or -1."""

    def __str__(self) -> str:
        name = _errno.errorcode.get(self.errno or 0, str(self.errno))
        return f"{self.path} (mount {self.mount_id}): {self.syscall}: {name} ({self.strerror})"

    def __reduce__(self) -> tuple[type[BuildError], tuple[int, str, str, int]]:
        return BuildError, (self.errno or 0, self.syscall, self.path, self.mount_id)


def marshal(namespaces: Sequence[NamespaceSpec]) -> tuple[Any, ...]:
    """Plain tuples for `unmarshal`: the marshal module refuses subclasses of tuple and int."""
    return tuple(
        (
            ns.id,
            tuple(
                (
                    *mount._replace(attributes=int(mount.attributes))[:-1],
                    tuple(map(tuple, mount.nodes)),
                )
                for mount in ns.mounts
            ),
        )
        for ns in namespaces
    )


def unmarshal(plain: Sequence[Any]) -> tuple[NamespaceSpec, ...]:
    """What `marshal` was given."""
    return tuple(
        NamespaceSpec(
            number,
            tuple(
                MountSpec._make((*mount[:-1], tuple(map(Node._make, mount[-1]))))
                for mount in mounts
            ),
        )
        for number, mounts in plain
    )
