"""Rebuilds mount namespaces from lists of mounts, in fresh private ones (child side).

As CRIU's mount-v2 engine does: every superblock, and one owner of every peer group, is made once
in a *yard*, a private tmpfs; a mount of a target is a clone of the yard's, attached to its parent
by descriptor. So order, stacking and hidden places need no path to be visible. A mount is private
and writable while things are made on it; group and attributes come last, so nothing propagates.
Linux 5.15 and later (MOVE_MOUNT_SET_GROUP). Runs in a disposable child with one thread.
"""

from __future__ import annotations

import errno as _errno
import os
import stat
from collections.abc import Sequence

from ghostpool import _linux
from ghostpool._buildfiles import call, make_nodes, reach, refuse, relative
from ghostpool._buildspec import (
    SHARED_BY_KERNEL,
    BuildError,
    MountSpec,
    NamespaceSpec,
    Node,
    marshal,
    unmarshal,
)
from ghostpool._linux import ATIME_MASK, Attr

__all__ = ["BuildError", "MountSpec", "NamespaceSpec", "Node", "build", "marshal", "unmarshal"]

_ROOT = b"/root"
"""Where in its copy of the yard the root of a target stands until it becomes the root."""

_CLEARABLE = (
    Attr.RDONLY
    | Attr.NOSUID
    | Attr.NODEV
    | Attr.NOEXEC
    | ATIME_MASK
    | Attr.NODIRATIME
    | Attr.NOSYMFOLLOW
)
# What may be added to a mount whose other attributes are locked.
_ADDABLE = Attr.RDONLY | Attr.NOSUID | Attr.NODEV | Attr.NOEXEC | Attr.NOSYMFOLLOW


def build(namespaces: Sequence[NamespaceSpec]) -> list[int]:
    """One open mount-namespace descriptor for each of `namespaces`, in order.

    The calling process is left in a private namespace that holds only the yard: call it in a
    disposable child with one thread. Needs CAP_SYS_ADMIN in the user namespace. Namespaces and
    superblocks live as long as the descriptors. Nothing is written below an `external` path, and
    no superblock that the rest of the machine uses is reconfigured: where such a one is to be
    read-only, its mounts are.
    Raises BuildError.
    """
    builder = _Builder(namespaces)
    umask = os.umask(0)
    try:
        return builder.run()
    except OSError as error:
        raise BuildError(
            error.errno or _errno.EINVAL,
            getattr(error, "syscall", "open"),
            os.fsdecode(builder.path),
            builder.mount_id,
        ) from error
    finally:
        os.umask(umask)


class _Builder:
    """One build; `path` and `mount_id` tell how far it is, for errors."""

    def __init__(self, namespaces: Sequence[NamespaceSpec]) -> None:
        self.path = b"/"
        self.mount_id = -1
        self._namespaces = namespaces
        self._first: dict[int, MountSpec] = {}
        """The mount that says how a superblock is made."""
        self._read_only: dict[int, list[int]] = {}
        """Index of a namespace -> superblocks to be made read-only that no later one writes to."""
        self._master: dict[tuple[int, int], int] = {}
        """(superblock, peer group) -> the group it is a slave of, or 0. Only groups with members:
        of another one, nothing is left to receive from."""
        self._borrowed: dict[str, bytes] = {}
        """File system -> place in the yard of a clone of the caller's own mount."""
        self._recursive: set[int] = set()
        """Superblocks whose mounts have locked children, so that only the whole tree is cloned."""
        self._lent: set[int] = set()
        """Superblocks that come from the caller."""
        self._yard: set[bytes] = set()
        """What the yard of the current namespace holds."""
        self._proc = self._service = -1

        users: dict[tuple[int, int], set[int]] = {}
        last: dict[int, int] = {}
        read_only: set[int] = set()
        for index, namespace in enumerate(namespaces):
            for mount in namespace.mounts:
                self._first.setdefault(mount.superblock, mount)
                last[mount.superblock] = index
                if mount.read_only_superblock:
                    read_only.add(mount.superblock)
                for group in {0, mount.shared_group, mount.master_group}:
                    users.setdefault((mount.superblock, group), set()).add(index)
                if mount.shared_group:
                    key = (mount.superblock, mount.shared_group)
                    self._master.setdefault(key, mount.master_group)
        for number in read_only:
            self._read_only.setdefault(last[number], []).append(number)
        self._common = [key for key, indexes in users.items() if len(indexes) > 1]
        """What several namespaces need is made before they are: a copy of the namespace, yard
        included, keeps superblocks and peer groups. The rest is made where it is needed, so that
        the copies stay small."""

    def run(self) -> list[int]:
        self._proc = call("open", os.open, b"/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._leave()
        done: list[int] = []
        try:
            for index, namespace in enumerate(self._namespaces):
                done.append(self._namespace(namespace, index))
        except BaseException:
            _linux.close_all(done)
            raise
        finally:
            _linux.close_all((self._proc, self._service))
        return done

    # The service namespace: nothing but the yard.

    def _leave(self) -> None:
        _linux.unshare(_linux.CLONE_NEWNS)
        _linux.mount(None, b"/", None, _linux.MS_REC | _linux.MS_PRIVATE)
        taken: list[tuple[int, int, bool]] = []
        for number, spec in self._first.items():
            if spec.external is not None:
                self._at(spec, spec.external)
                taken.append((number, *self._take(spec.external)))
        own = self._own_mounts()
        context = _linux.fsopen(b"tmpfs")
        _linux.fsconfig(context, _linux.FSCONFIG_SET_STRING, b"mode", b"700")
        _linux.fsconfig(context, _linux.FSCONFIG_CMD_CREATE)
        yard = _linux.fsmount(context)
        _linux.move_mount(yard, _linux.AT_FDCWD, b"/")
        self._become_root(yard)
        _linux.close_all((context, yard))
        self._service = self._this_namespace()
        call("mkdir", os.mkdir, _ROOT, 0o755)
        for number, fd, recursive in taken:
            self._lent.add(number)
            if recursive:
                self._recursive.add(number)
            self._attach(b"/%d" % number, fd)
        for fstype, fd in own:
            self._borrowed[fstype] = b"/" + fstype.encode()
            self._attach(self._borrowed[fstype], fd)
        for superblock, group in self._common:
            self._at(self._first[superblock], self._first[superblock].mountpoint)
            self._peers(superblock, group)

    def _take(self, path: bytes) -> tuple[int, bool]:
        """A clone of the caller's mount at `path`, and whether its children had to come along."""
        try:
            return _linux.open_tree(_linux.AT_FDCWD, path, _linux.OPEN_TREE_CLONE), False
        except OSError as error:
            if error.errno != _errno.EINVAL:
                raise
        # A less privileged namespace may not look behind the mounts it inherited: they are locked
        # to their parent, and cloning the parent alone is refused.
        flags = _linux.OPEN_TREE_CLONE | _linux.AT_RECURSIVE
        return _linux.open_tree(_linux.AT_FDCWD, path, flags), True

    def _own_mounts(self) -> list[tuple[str, int]]:
        """Clones of the caller's mounts of the file systems that are the kernel's own.

        A bind of what is there has no side effects, while a new mount of cgroup2 or debugfs may
        reset the options of the one superblock. A proc is new wherever that is allowed.
        """
        wanted = {spec.fstype for spec in self._first.values() if spec.external is None}
        wanted &= SHARED_BY_KERNEL | {"proc"}
        got: list[tuple[str, int]] = []
        if not wanted:
            return got
        flags = os.O_RDONLY | os.O_CLOEXEC
        with open(call("open", os.open, b"self/mountinfo", flags, dir_fd=self._proc), "rb") as file:
            lines = [line.split(b" ") for line in file]
        for fields in lines:
            fstype = os.fsdecode(fields[fields.index(b"-") + 1])
            # A mount point with an escaped character is none of the usual ones.
            if fstype not in wanted or fields[3] != b"/" or b"\\" in fields[4]:
                continue
            try:
                fd, _ = self._take(fields[4])
            except OSError:
                continue
            st_dev = os.fstat(fd).st_dev
            if b"%d:%d" % (os.major(st_dev), os.minor(st_dev)) != fields[2]:
                os.close(fd)  # another mount covers it
                continue
            wanted.discard(fstype)
            got.append((fstype, fd))
        return got

    def _this_namespace(self) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        return call("open", os.open, b"self/ns/mnt", flags, dir_fd=self._proc)

    def _become_root(self, fd: int) -> None:
        """Make the mount at `fd` the root, and drop the old one with all it holds."""
        call("fchdir", os.fchdir, fd)
        _linux.pivot_root(b".", b".")
        _linux.umount2(b".", _linux.MNT_DETACH)

    # What the yard holds, each made when it is first needed.

    def _attach(self, place: bytes, fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            call("mkdir", os.mkdir, place, 0o755)
        else:
            call("mknod", os.mknod, place, stat.S_IFREG | 0o644)
        _linux.move_mount(fd, _linux.AT_FDCWD, place)
        os.close(fd)
        self._yard.add(place)

    def _superblock(self, number: int) -> bytes:
        place = b"/%d" % number
        if place not in self._yard:
            spec = self._first[number]
            borrowed = self._borrowed.get(spec.fstype)
            if borrowed is None or spec.fstype == "proc":
                try:
                    self._attach(place, self._new_superblock(spec))
                    if spec.fstype in SHARED_BY_KERNEL:
                        self._lent.add(number)
                    return place
                except PermissionError:
                    # No proc of one's own without a pid namespace of one's own, or where the
                    # caller's is partly hidden: mount_namespaces(7).
                    if borrowed is None:
                        raise
            self._lent.add(number)
            fd, recursive = self._take(borrowed)
            if recursive:
                self._recursive.add(number)
            self._attach(place, fd)
        return place

    def _configure(self, context: int, spec: MountSpec) -> None:
        for option in filter(None, spec.options.split(",")):
            key, equals, value = option.encode(errors="surrogateescape").partition(b"=")
            command = _linux.FSCONFIG_SET_STRING if equals else _linux.FSCONFIG_SET_FLAG
            _linux.fsconfig(context, command, key, value if equals else None)

    def _new_superblock(self, spec: MountSpec) -> int:
        context = _linux.fsopen(spec.fstype.encode())
        try:
            # fsconfig(2) takes strings of up to 255 bytes; a source is a mere label here.
            source = spec.source.encode(errors="surrogateescape")[:255]
            if source:
                _linux.fsconfig(context, _linux.FSCONFIG_SET_STRING, b"source", source)
            self._configure(context, spec)
            _linux.fsconfig(context, _linux.FSCONFIG_CMD_CREATE)
            return _linux.fsmount(context)
        finally:
            os.close(context)

    def _peers(self, superblock: int, group: int) -> bytes:
        """A yard mount of the whole superblock that is a member of the group; 0 is no group."""
        place = self._superblock(superblock)
        chain: list[int] = []
        while group and group not in chain and (superblock, group) in self._master:
            chain.append(group)
            group = self._master[superblock, group]
        for group in reversed(chain):
            above, place = place, b"/%d.%d" % (superblock, group)
            if place not in self._yard:
                fd = self._clone(superblock, above)
                if group != chain[-1]:
                    _linux.mount_setattr(fd, propagation=_linux.MS_SLAVE)
                _linux.mount_setattr(fd, propagation=_linux.MS_SHARED)
                self._attach(place, fd)
        return place

    def _group_source(self, mount: MountSpec) -> int | None:
        """A detached mount whose groups are those `mount` is to have; None for a private one."""
        superblock = mount.superblock
        if superblock in self._recursive:
            return None  # MOVE_MOUNT_SET_GROUP refuses a mount with locked children
        if mount.shared_group:
            return self._clone(superblock, self._peers(superblock, mount.shared_group))
        if (superblock, mount.master_group) not in self._master:
            return None
        fd = self._clone(superblock, self._peers(superblock, mount.master_group))
        _linux.mount_setattr(fd, propagation=_linux.MS_SLAVE)
        return fd

    def _clone(self, superblock: int, place: bytes, dir_fd: int = _linux.AT_FDCWD) -> int:
        flags = _linux.AT_RECURSIVE if superblock in self._recursive else 0
        return _linux.open_tree(dir_fd, place, _linux.OPEN_TREE_CLONE | flags)

    # One target namespace.

    def _namespace(self, namespace: NamespaceSpec, index: int) -> int:
        """Starts and ends in the service namespace."""
        yard = set(self._yard)
        _linux.unshare(_linux.CLONE_NEWNS)
        waiting = self._mounts(namespace)
        for number in self._read_only.get(index, ()):
            if number not in self._lent:
                self._make_read_only(number)
        self._become_root(waiting[-1][1])
        # The root and what is stacked on it join their groups only here: pivot_root(2) refuses
        # shared mounts, and unmounting the old root from a shared one would propagate.
        for mount, fd, source in waiting:
            self._at(mount, mount.mountpoint)
            self._finish(mount, fd, source)
        got = self._this_namespace()
        _linux.setns(self._service, _linux.CLONE_NEWNS)
        self._yard = yard
        return got

    def _at(self, mount: MountSpec, path: bytes) -> None:
        self.mount_id, self.path = mount.id, path

    def _mounts(self, namespace: NamespaceSpec) -> list[tuple[MountSpec, int, int | None]]:
        """Make all mounts, each with all that is on it, before the next one on the same parent.

        Depth first, so that only descriptors on the way from the root are open. Returns the
        mounts on "/", the root last, not yet finished.
        """
        if not namespace.mounts:
            raise refuse("pivot_root", _errno.EINVAL)
        root, *others = namespace.mounts
        children: dict[int, list[MountSpec]] = {}
        # A deeper mount point before a shallower one of the same parent, which may hide it.
        for mount in sorted(others, key=_depth, reverse=True):
            children.setdefault(mount.parent, []).append(mount)
        self._at(root, root.mountpoint)
        fd = self._clone_of(root)
        _linux.move_mount(fd, _linux.AT_FDCWD, _ROOT)
        make_nodes(root, fd, self._at)
        waiting: list[tuple[MountSpec, int, int | None]] = []
        stack = [(root, fd, iter(children.pop(root.id, ())))]
        while stack:
            mount, fd, pending = stack[-1]
            if child := next(pending, None):
                self._at(child, child.mountpoint)
                below = self._clone_of(child)
                self._mount_on(child, below, mount, fd)
                make_nodes(child, below, self._at)
                stack.append((child, below, iter(children.pop(child.id, ()))))
                continue
            stack.pop()
            self._at(mount, mount.mountpoint)
            source = self._group_source(mount)
            if mount is root or mount.mountpoint == b"/":
                waiting.append((mount, fd, source))
            else:
                self._finish(mount, fd, source)
        for orphans in children.values():
            self._at(orphans[0], orphans[0].mountpoint)
            raise refuse("move_mount", _errno.ENOENT)
        return waiting

    def _clone_of(self, mount: MountSpec) -> int:
        place = self._superblock(mount.superblock)
        inner = mount.root.strip(b"/")
        if not inner:
            return self._clone(mount.superblock, place)
        whole = call("open", os.open, place, os.O_PATH | os.O_CLOEXEC)
        part = reach(whole, inner, self._may_create(mount), not mount.is_file)
        try:
            return self._clone(mount.superblock, b"", part)
        finally:
            _linux.close_all((whole, part))

    def _may_create(self, mount: MountSpec) -> bool:
        return mount.superblock not in self._lent

    def _mount_on(self, mount: MountSpec, fd: int, parent: MountSpec, parent_fd: int) -> None:
        inner = relative(mount.mountpoint, parent.mountpoint)
        directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        place = reach(parent_fd, inner, self._may_create(parent), directory)
        try:
            _linux.move_mount(fd, place)
        finally:
            os.close(place)

    def _finish(self, mount: MountSpec, fd: int, source: int | None) -> None:
        """Groups and attributes of a mount that is otherwise complete; closes both."""
        if source is not None:
            _linux.move_mount(source, fd, flags=_linux.MOVE_MOUNT_SET_GROUP)
            os.close(source)
        elif mount.unbindable:
            _linux.mount_setattr(fd, propagation=_linux.MS_UNBINDABLE)
        wanted = mount.attributes
        lent = mount.superblock in self._lent
        if lent and mount.read_only_superblock:
            wanted |= Attr.RDONLY
        try:
            _linux.mount_setattr(fd, attr_set=wanted, attr_clr=_CLEARABLE)
        except PermissionError:
            if not lent:
                raise
            # Locked on the caller's own mount: what may still be added is, the rest stays.
            _linux.mount_setattr(fd, attr_set=wanted & _ADDABLE)
        os.close(fd)

    def _make_read_only(self, number: int) -> None:
        spec = self._first[number]
        self._at(spec, spec.mountpoint)
        fd = _linux.open_tree(_linux.AT_FDCWD, self._superblock(number))
        context = _linux.fspick(fd)
        try:
            # Old-style file systems (devpts before Linux 6.14) forget what is not said again.
            self._configure(context, spec)
            _linux.fsconfig(context, _linux.FSCONFIG_SET_FLAG, b"ro")
            _linux.fsconfig(context, _linux.FSCONFIG_CMD_RECONFIGURE)
        finally:
            _linux.close_all((context, fd))


def _depth(mount: MountSpec) -> int:
    return mount.mountpoint.rstrip(b"/").count(b"/")
