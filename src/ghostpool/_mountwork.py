"""What a worker does with mounts: open, identify, clone, and change their read-only bit.

It acts on descriptors of mount roots, in the mount namespace that the worker has entered.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from ghostpool import _linux
from ghostpool._failed import Failed, Work
from ghostpool._linux import Attr
from ghostpool._mountinfo import parse_line
from ghostpool._protocol import MountFacts, Room

GONE = (errno.EINVAL, errno.ENOENT)
"""What making a mount read-only fails with when it was taken off: nothing is left to put back."""


class MountWork(Work):
    """Requests about mounts; `mounts` are the worker's mount roots, by handle."""

    def __init__(self, mounts: dict[int, int], own_fds: int, mount_setattr: bool) -> None:
        self._mounts = mounts
        self._own_fds = own_fds
        self._mount_setattr = mount_setattr

    def do_mountinfo(self, out: list[int]) -> None:
        """A descriptor of this namespace's mount table: it stays that of the time of its open."""
        self._step = "openat"
        out.append(os.open("../mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._own_fds))

    def do_open_mounts(self, out: list[int], points: list[tuple[int, bytes]]) -> list[Any]:
        """Open the visible top of each mount point; the descriptors go back in order.

        A mount point is looked up by the kernel, so what is found is what a task would see
        there: compared with the table, that decides "overmounted".
        """
        facts: list[Any] = []
        for index, (handle, mountpoint) in enumerate(points):
            try:
                self._step = "openat2"
                root = self._mounts[handle] = _linux.openat2(
                    _linux.AT_FDCWD,
                    mountpoint,
                    os.O_PATH | os.O_NOFOLLOW,
                    _linux.FROM_ROOT & ~_linux.Resolve.IN_ROOT,
                )
                self._step = "statx"
                identity = _linux.mount_identity(root)
                self._step = "fstatvfs"
                fsid = os.fstatvfs(root).f_fsid
                facts.append(tuple(MountFacts(identity.mnt_id, identity.unique_id, fsid)))
                self._step = "dup"
                out.append(os.dup(root))
            except OSError as error:
                code = error.errno or errno.EIO
                raise Failed(index, code, self._step, mountpoint, handle, facts) from error
        return facts

    def _state(self, fd: int, identity: _linux.MountIdentity) -> tuple[int, bool]:
        """Attributes of the mount at `fd` as they are now, and whether its superblock is ro."""
        if identity.unique_id:
            try:
                self._step = "statmount"
                state = _linux.statmount(identity.unique_id)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EPERM):
                    raise
            else:
                return state.attr, state.superblock_read_only
        return self._state_of_mountinfo(identity.mnt_id)

    def _state_of_mountinfo(self, mnt_id: int) -> tuple[int, bool]:
        self._step = "openat"
        fd = os.open("../mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._own_fds)
        self._step = "read"
        with open(fd, "rb") as file:
            for line in file:
                if line.startswith(b"%d " % mnt_id):
                    mount = parse_line(line.rstrip(b"\n"))
                    return mount.attributes, mount.superblock_read_only
        raise OSError(errno.ENOENT, "the mount is gone")

    def do_room(self, out: list[int], handles: list[int]) -> list[Any]:
        """How much room there is behind each mount; None where the file system does not tell."""
        found: list[Any] = []
        for handle in handles:
            try:
                self._step = "fstatvfs"
                said = os.fstatvfs(self._mounts[handle])
            except OSError:
                found.append(None)
                continue
            block = said.f_frsize or said.f_bsize or 1
            room = Room(block, said.f_blocks, said.f_bavail, said.f_files, said.f_favail)
            found.append(tuple(room))
        return found

    def do_clone(self, out: list[int], handles: list[tuple[int, int]]) -> list[Any]:
        """A detached, private, writable clone of each mount: service writability.

        It vanishes with its last descriptor, so it never needs a revert, and nobody who is not
        given the descriptor ever sees a writable mount. Per mount None, and its descriptor goes
        back; or errno and system call of a failure.
        """
        results: list[Any] = []
        for live, service in handles:
            try:
                clone = self._writable_clone(self._mounts[live])
                try:
                    self._step = "dup"
                    self._mounts[service] = os.dup(clone)
                except OSError:
                    os.close(clone)
                    raise
            except OSError as error:
                results.append((error.errno or errno.EIO, self._step))
            else:
                out.append(clone)
                results.append(None)
        return results

    def _writable_clone(self, fd: int) -> int:
        self._step = "open_tree"
        clone = _linux.open_tree(fd, b"", _linux.OPEN_TREE_CLONE)
        try:
            if not self._mount_setattr:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            self._step = "mount_setattr"
            _linux.mount_setattr(clone, attr_clr=Attr.RDONLY)
        except OSError:
            os.close(clone)
            raise
        return clone

    def do_open_part(self, out: list[int], mountpoint: bytes, below: bytes, root: int) -> None:
        """Open a directory below a mount point that is the root of another mount, at `root`.

        It goes back. EXDEV: something else is there, or the way there leads through another mount.
        """
        self._step = "openat2"
        flags = os.O_PATH | os.O_DIRECTORY
        whole = _linux.openat2(
            _linux.AT_FDCWD, mountpoint, flags, _linux.FROM_ROOT & ~_linux.Resolve.IN_ROOT
        )
        try:
            self._step = "openat2"
            part = _linux.openat2(whole, below or b".", flags, _linux.INSIDE)
        finally:
            os.close(whole)
        out.append(part)
        self._step = "fstat"
        found, wanted = os.fstat(part), os.fstat(root)
        if not os.path.samestat(found, wanted):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def do_clone_part(self, out: list[int], directory: int) -> None:
        """A detached, private, writable clone of what is at a directory; it goes back."""
        out.append(self._writable_clone(directory))

    def do_make_writable(self, out: list[int], handles: list[tuple[int, int]]) -> list[Any]:
        """Clear the read-only bit; per mount whether that changed it and what its attributes
        are now, or errno and system call of a failure.

        Each comes with the unique id (or mnt_id) it had when it was found: the descriptor can
        not have moved to another mount, but the mount may have been taken off since.
        """
        results: list[Any] = []
        for index, (handle, expected) in enumerate(handles):
            changing = False
            try:
                fd = self._mounts[handle]
                self._step = "statx"
                identity = _linux.mount_identity(fd)
                if expected not in (identity.unique_id, identity.mnt_id):
                    results.append((None, errno.ESTALE, "statx"))
                    continue
                attributes, superblock_read_only = self._state(fd, identity)
                if superblock_read_only:
                    results.append((None, errno.EROFS, "statmount"))
                elif attributes & Attr.RDONLY:
                    self._set_read_only(fd, attributes, False)
                    changing = True
                    results.append((True, self._state(fd, identity)[0]))
                else:
                    results.append((False, attributes))
            except OSError as error:
                code = error.errno or errno.EIO
                if changing:
                    # Writable by now: "this one is as it was" would be wrong, so nothing is said
                    # of any of them, and all will be put back.
                    raise Failed(index, code, self._step, b"", handle) from error
                results.append((None, code, self._step))
        return results

    def do_make_read_only(self, out: list[int], handles: list[int]) -> list[Any]:
        """Set the read-only bit; per mount None, or a failure (EBUSY: somebody writes)."""
        results: list[Any] = []
        for handle in handles:
            failure = self._make_read_only(handle)
            if failure is not None and failure[0] != errno.EBUSY:
                # A signal or a shortage of memory passes, and no mount may stay writable for it.
                failure = self._make_read_only(handle)
            results.append(failure)
        return results

    def _make_read_only(self, handle: int) -> tuple[int, str] | None:
        try:
            fd = self._mounts[handle]
            attributes = 0
            if not self._mount_setattr:
                self._step = "statx"
                attributes, _ = self._state(fd, _linux.mount_identity(fd))
            self._set_read_only(fd, attributes, True)
        except OSError as error:
            return error.errno or errno.EIO, self._step
        return None

    def _set_read_only(self, fd: int, attributes: int, read_only: bool) -> None:
        if self._mount_setattr:
            bit = int(Attr.RDONLY)
            try:
                self._step = "mount_setattr"
                _linux.mount_setattr(fd, attr_set=bit * read_only, attr_clr=bit * (not read_only))
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                self._mount_setattr = False
                self._step = "statx"
                attributes, _ = self._state(fd, _linux.mount_identity(fd))
            else:
                return
        # mount(2) knows only paths. The magic link of our own descriptor leads to exactly this
        # mount; it is reached from the descriptor of the host's /proc, not by the container's.
        wanted = attributes | Attr.RDONLY if read_only else attributes & ~Attr.RDONLY
        flags = _linux.MS_REMOUNT | _linux.MS_BIND | _linux.mount_flags_of(wanted)
        self._step = "openat"
        here = os.open(".", os.O_PATH | os.O_DIRECTORY)
        try:
            self._step = "fchdir"
            os.fchdir(self._own_fds)
            self._step = "mount"
            _linux.mount(None, b"%d" % fd, None, flags)
        finally:
            try:
                self._undo_step = "fchdir"
                os.fchdir(here)
                os.close(here)
            except OSError as error:
                # Not a failure of the change, which may be made: let this worker be taken for
                # dead, and its work for unknown.
                raise RuntimeError("the working directory is lost") from error
