"""Looking for what failed restores have left, in one mount: names alone tell, and nothing is
changed.

Every directory is opened by openat2 from the mount's own root, inside that mount and through no
link. What can not be looked at is counted and told. There are bounds on how much is looked at,
found and kept in mind, since whoever fills the file system chooses how much there is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any

from ghostpool import _linux
from ghostpool._linux import INSIDE
from ghostpool._protocol import Remnant

MOST_ENTRIES = 5_000_000
MOST_FOUND = 10_000
_MOST_PENDING = 64 << 20
"""Bytes of the paths of directories that are still to be looked at."""
_HEX = frozenset(b"0123456789abcdef")
_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK


def leftover_kind(name: bytes) -> str | None:
    """Which kind of leftover has such a name; None: it is somebody's file."""
    if name.startswith(b".ghostpool-"):
        token, _, ghost = name[len(b".ghostpool-") :].partition(b"-")
        return "ghostpool" if len(token) == 12 and _is_hex(token) and _is_hex(ghost) else None
    if name.endswith(b".ghost"):
        stem, _, ghost = name[: -len(b".ghost")].rpartition(b".cr.")
        return "criu_ghost" if stem and _is_hex(ghost) else None
    if name.endswith(b".cr_link"):
        return "cr_link" if len(name) > len(b".cr_link") else None
    if name.startswith(b"link_remap."):
        number = name[len(b"link_remap.") :]
        return "link_remap" if number.isdigit() and number[:1] != b"0" else None
    return None


def _is_hex(word: bytes) -> bool:
    return 0 < len(word) <= 12 and _HEX.issuperset(word)


class SweepWork:
    """The request that looks for leftovers; `mounts` are the worker's mount roots, by handle."""

    def __init__(self, mounts: Mapping[int, int]) -> None:
        self._mounts = mounts

    def do_sweep(self, _: list[int], handle: int) -> Any:
        """What has a leftover's name; how many directories could not be looked at, and one of them
        with its errno; and whether there was more than the bounds allow."""
        root = self._mounts[handle]
        found: list[Any] = []
        unread = 0
        example: list[tuple[bytes, int]] = []
        entries = 0
        stopped = False
        pending = [b""]
        waiting = 0
        while pending and not stopped:
            path = pending.pop()
            waiting -= len(path)
            try:
                directory = _open(root, path)
                try:
                    with os.scandir(directory) as listed:
                        for entry in listed:
                            entries += 1
                            name = os.fsencode(entry.name)
                            kind = leftover_kind(name)
                            if kind is not None:
                                found += _facts(directory, path, name, kind)
                            if entry.is_dir(follow_symlinks=False):
                                below = path + b"/" + name if path else name
                                pending.append(below)
                                waiting += len(below)
                            if (
                                entries > MOST_ENTRIES
                                or len(found) > MOST_FOUND
                                or waiting > _MOST_PENDING
                            ):
                                stopped = True
                                break
                finally:
                    os.close(directory)
            except OSError as error:
                # EXDEV: another mount, which is looked at by itself; the others: it was exchanged.
                if error.errno not in (errno.EXDEV, errno.ELOOP, errno.ENOENT, errno.ENOTDIR):
                    unread += 1
                    if not example:
                        example = [(path, error.errno or errno.EIO)]
        return found, unread, example, stopped


def _open(root: int, path: bytes) -> int:
    """A directory to be read, without leaving a trace of that in its times if possible."""
    try:
        return _linux.openat2(root, path or b".", _READ | os.O_NOATIME, INSIDE)
    except PermissionError:
        return _linux.openat2(root, path or b".", _READ, INSIDE)


def _facts(directory: int, path: bytes, name: bytes, kind: str) -> list[tuple[Any, ...]]:
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return []
    above = os.fstat(directory)
    return [
        tuple(
            Remnant(
                path,
                name,
                kind,
                status.st_dev,
                status.st_ino,
                above.st_ino,
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_size,
                int(status.st_mtime),
            )
        )
    ]
