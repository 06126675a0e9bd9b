"""All of a mount namespace that a run could have touched, in a form that can be compared."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ghostpool import _linux
from ghostpool._mountinfo import parse_line


class Entry(NamedTuple):
    """One file of a snapshot."""

    mode: int
    """Full st_mode."""
    owner: tuple[int, int]
    """User and group."""
    inode: int
    """Its number, unique within its file system."""
    links: int
    """How many names it has."""
    rdev: int
    """Device number of a device, as os.makedev gives it."""
    size: int
    """In bytes."""
    times: tuple[int, int]
    """Modification and change, in nanoseconds: a name made and removed again shows in these."""
    content: str
    """SHA-256 of a regular file, target of a symbolic link."""


@dataclass(frozen=True)
class Snapshot:
    """Mount table and files of a namespace."""

    mountinfo: bytes
    files: dict[str, Entry]
    """By line in the mount table and path, "3:/data/file": several mounts may be at one point."""

    @classmethod
    def made(cls, mountinfo: bytes, files: Mapping[str, tuple[Any, ...]]) -> Snapshot:
        """From what `walk_all` has found."""
        return cls(mountinfo, {path: Entry(*entry) for path, entry in files.items()})

    def names(self) -> set[tuple[str, int, str]]:
        """Path, inode and content of every file."""
        return {(path, entry.inode, entry.content) for path, entry in self.files.items()}

    def without_directory_times(self) -> Snapshot:
        """What must be equal after a restore, done or undone: it has worked in the directories."""
        return Snapshot(
            self.mountinfo,
            {
                path: entry._replace(times=(0, 0)) if stat.S_ISDIR(entry.mode) else entry
                for path, entry in self.files.items()
            },
        )


def walk_all(proc: int, below: bytes) -> dict[str, tuple[Any, ...]]:
    """Every file of every tmpfs at or below a path; for a child in the namespace.

    It works in a copy of the namespace, and takes that apart from the top: unmounting from the
    last line to the first shows what other mounts hide. `proc`: a descriptor of the host's /proc.
    """
    _linux.unshare(_linux.CLONE_NEWNS)
    _linux.mount(None, b"/", None, _linux.MS_REC | _linux.MS_PRIVATE)
    table = os.open("self/mountinfo", os.O_RDONLY, dir_fd=proc)
    with open(table, "rb") as file:
        lines = file.read().splitlines()
    found: dict[str, tuple[Any, ...]] = {}
    for number, mount in reversed(list(enumerate(map(parse_line, lines)))):
        wanted = f"{os.fsdecode(mount.mountpoint)}/".startswith(f"{os.fsdecode(below)}/")
        if mount.fstype == "tmpfs" and (wanted or below == b"/"):
            walk(found, f"{number}:{os.fsdecode(mount.mountpoint)}", mount.mountpoint)
        if mount.mountpoint != b"/":
            try:
                _linux.umount2(mount.mountpoint, _linux.MNT_DETACH)
            except OSError:
                pass  # locked, in the namespace of another user namespace: nothing is below it
    return found


def walk(found: dict[str, tuple[Any, ...]], label: str, path: bytes) -> None:
    """Every file at `path` and below it on the same file system, by `label` and names."""
    status = os.lstat(path)
    content = ""
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            content = hashlib.sha256(file.read()).hexdigest()
    elif stat.S_ISLNK(status.st_mode):
        content = os.fsdecode(os.readlink(path))
    found[label] = (
        status.st_mode,
        (status.st_uid, status.st_gid),
        status.st_ino,
        status.st_nlink,
        status.st_rdev,
        status.st_size,
        (status.st_mtime_ns, status.st_ctime_ns),
        content,
    )
    if stat.S_ISDIR(status.st_mode):
        for name in sorted(os.listdir(path)):
            below = os.path.join(path, name)
            if os.lstat(below).st_dev == status.st_dev:
                walk(found, f"{label}/{os.fsdecode(name)}", below)
