"""Reaching a mount that others hide: through a private copy of its namespace, for a worker.

In the copy, which nobody else sees and nothing propagates from, the covering mounts are taken off.
What is found below is another mount of the same superblock and root: files made on it are on the
hidden one. The copy goes when the worker enters another namespace; its mounts stay for whoever has
their descriptors.
"""

from __future__ import annotations

import errno
import os

from ghostpool import _linux
from ghostpool._failed import Failed, Work
from ghostpool._linux import Attr
from ghostpool._mountinfo import LiveMount, parse_line
from ghostpool._protocol import MountFacts

_UMOUNT_NOFOLLOW = 8
Facts = tuple[bytes, bytes, int, str, str]
"""Mount point, root, device, type and source: what a mount has in common with its copy."""


def facts_of(mount: LiveMount) -> Facts:
    """What tells a mount, with those above it, in a copy of its namespace."""
    return mount.mountpoint, mount.root, mount.device, mount.fstype, mount.source


class UncoverWork(Work):
    """The request about hidden mounts; `mounts` are the worker's mount roots, by handle."""

    def __init__(self, mounts: dict[int, int], own_fds: int) -> None:
        self._mounts = mounts
        self._own_fds = own_fds

    def do_uncover(
        self, out: list[int], live: int, service: int, chain: list[Facts]
    ) -> tuple[int, ...]:
        """Leave for a copy of this namespace and find a mount there that is hidden here.

        `chain` is the mount, its parent and so on, up to the root. The mount of the copy and a
        writable clone of it go back. EINVAL of umount2: the covers are locked; ENOTUNIQ: several
        mounts are alike; ENOENT: no path leads there.
        """
        mountpoint = chain[0][0]
        try:
            self._step = "unshare"
            _linux.unshare(_linux.CLONE_NEWNS)
            self._step = "mount"
            _linux.mount(None, b"/", None, _linux.MS_REC | _linux.MS_PRIVATE)
            root = self._reach(chain)
            try:
                self._step = "open_tree"
                clone = _linux.open_tree(root, b"", _linux.OPEN_TREE_CLONE)
                try:
                    self._step = "mount_setattr"
                    _linux.mount_setattr(clone, attr_clr=Attr.RDONLY)
                    self._step = "statx"
                    identity = _linux.mount_identity(root)
                    self._step = "fstatvfs"
                    fsid = os.fstatvfs(root).f_fsid
                    self._step = "dup"
                    out.append(os.dup(root))
                    out.append(os.dup(clone))
                except OSError:
                    os.close(clone)
                    raise
            except OSError:
                os.close(root)
                raise
        except OSError as error:
            code = error.errno or errno.EIO
            raise Failed(0, code, self._step, mountpoint, live) from error
        self._take(live, root)
        self._take(service, clone)
        return tuple(MountFacts(identity.mnt_id, identity.unique_id, fsid))

    def do_adopt(self, handle: int, given: int) -> tuple[int, ...]:
        """Take this descriptor for that of a mount: somebody else's has led to it."""
        try:
            self._step = "statx"
            identity = _linux.mount_identity(given)
            self._step = "fstatvfs"
            fsid = os.fstatvfs(given).f_fsid
            self._step = "dup"
            self._take(handle, os.dup(given))
        except OSError as error:
            raise Failed(0, error.errno or errno.EIO, self._step, b"", handle) from error
        return tuple(MountFacts(identity.mnt_id, identity.unique_id, fsid))

    def _take(self, handle: int, fd: int) -> None:
        if handle in self._mounts:
            os.close(self._mounts[handle])
        self._mounts[handle] = fd

    def _table(self) -> dict[int, LiveMount]:
        self._step = "openat"
        fd = os.open("../mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._own_fds)
        self._step = "read"
        with open(fd, "rb") as file:
            return {m.mnt_id: m for m in map(parse_line, file.read().splitlines())}

    def _reach(self, chain: list[Facts]) -> int:
        """The root of the mount `chain` begins with, once what covers it is off."""
        table = self._table()
        wanted = _only(chain, table)
        mountpoint = chain[0][0]
        while True:
            fd = self._deepest(mountpoint)
            try:
                self._step = "statx"
                mnt_id = _linux.mount_identity(fd).mnt_id
                if mnt_id == wanted[0]:
                    self._step = "dup"
                    return os.dup(fd)
            finally:
                os.close(fd)
            self._step = "umount2"
            if mnt_id in wanted or mnt_id not in table:
                # Nothing covers it: what it is mounted on has another name, or none.
                raise OSError(errno.ENOENT, "no path leads to the mount")
            # Taken off only once: whatever the paths of the container lead to, this has an end.
            _linux.umount2(table.pop(mnt_id).mountpoint, _linux.MNT_DETACH | _UMOUNT_NOFOLLOW)

    def _deepest(self, path: bytes) -> int:
        """As much of the path as there is, which is as far as some cover lets us look."""
        while True:
            try:
                self._step = "openat2"
                flags = os.O_PATH | os.O_NOFOLLOW
                return _linux.openat2(
                    _linux.AT_FDCWD, path, flags, _linux.FROM_ROOT & ~_linux.Resolve.IN_ROOT
                )
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) or path == b"/":
                    raise
            path = path.rpartition(b"/")[0] or b"/"


def _only(chain: list[Facts], table: dict[int, LiveMount]) -> list[int]:
    """The numbers of the only mount with such a chain, and of those above it. ENOTUNIQ, ENOENT."""
    wanted = [tuple(facts) for facts in chain]
    found: list[list[int]] = []
    for mount in table.values():
        if facts_of(mount) != wanted[0]:
            continue
        above = [mount]
        while above[-1].parent in table and above[-1].parent != above[-1].mnt_id:
            above.append(table[above[-1].parent])
        if [facts_of(one) for one in above] == wanted:
            found.append([one.mnt_id for one in above])
    if len(found) != 1:
        raise OSError(errno.ENOTUNIQ if found else errno.ENOENT, "the mount in the copy")
    return found[0]
