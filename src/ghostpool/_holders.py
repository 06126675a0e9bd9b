"""Who keeps a mount busy: processes that can write through it, by descriptor or by mapping.

Setting a mount read-only fails with EBUSY while a regular file is open for writing through it, or
mapped from such an open, also after the descriptor was closed (mount_setattr(2)). fdinfo tells the
mount of a descriptor and its access mode (proc_pid_fdinfo(5)); a mapping's file is reached through
map_files. Looks at every process that this one may look at, so it is for the one moment in which
somebody has to be told.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

import psutil

from ghostpool import _linux


class Holder(NamedTuple):
    """One way in which a process keeps a mount busy."""

    pid: int
    command: str
    key: str
    """`fd N`, or `map START-END` as in /proc/PID/maps."""
    path: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command}), {self.key}: {self.path}"


def holders(mnt_id: int) -> list[Holder]:
    """Everybody who holds the mount with this mnt_id busy; empty if it is free by now."""
    found: list[Holder] = []
    for process in psutil.process_iter(["name"]):
        name = process.info["name"] or "?"
        for key, path in (*_descriptors(process.pid, mnt_id), *_mappings(process.pid, mnt_id)):
            found.append(Holder(process.pid, name, key, path))
    return found


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []  # it has ended, or is not ours to look at


def _descriptors(pid: int, mnt_id: int) -> Iterator[tuple[str, str]]:
    for number in _entries(f"/proc/{pid}/fdinfo"):
        try:
            with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii", errors="replace") as file:
                fields = dict(line.split(":", 1) for line in file if ":" in line)
            if int(fields["mnt_id"]) != mnt_id:
                continue
            flags = int(fields["flags"], 8)
            link = f"/proc/{pid}/fd/{number}"
            # Fifos, sockets and devices that are open for writing keep no mount busy.
            if flags & os.O_ACCMODE == os.O_RDONLY or flags & os.O_PATH:
                continue
            if stat.S_ISREG(os.stat(link).st_mode):
                yield f"fd {number}", os.readlink(link)
        except (OSError, KeyError, ValueError):
            continue


def _mappings(pid: int, mnt_id: int) -> Iterator[tuple[str, str]]:
    for name in _entries(f"/proc/{pid}/map_files"):
        link = f"/proc/{pid}/map_files/{name}"
        try:
            # The link's own mode says how the file was opened: proc_pid_map_files(5).
            if not os.lstat(link).st_mode & stat.S_IWUSR:
                continue
            fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
            try:
                if _linux.mount_identity(fd).mnt_id == mnt_id:
                    yield f"map {name}", os.readlink(link)
            finally:
                os.close(fd)
        except OSError:
            continue
