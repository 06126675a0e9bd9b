"""One function per system call that Python's os module lacks.

Raw wrappers: they know nothing of ghosts, add no policy and raise plain OSError. Only the
standard library is imported, because workers load this module before they enter a namespace.
Numbers and structures: the kernel's uapi headers; those from 424 up are the same on every
architecture that ghostpool runs on.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
from collections.abc import Iterable
from enum import IntFlag
from typing import NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_FSPICK = 433
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442
_SYS_STATMOUNT = 457
_SYS_STATX = {"x86_64": 332, "aarch64": 291}.get(os.uname().machine, 291)
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine, 41)
_SYS_RENAMEAT2 = {"x86_64": 316, "aarch64": 276}.get(os.uname().machine, 276)

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_NO_AUTOMOUNT = 0x800
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC

MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MOVE_MOUNT_SET_GROUP = 0x100

FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
FSCONFIG_CMD_RECONFIGURE = 7
FSPICK_EMPTY_PATH = 0x8

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOSYMFOLLOW = 0x100
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_BIND = 0x1000
MS_REC = 0x4000
MS_UNBINDABLE = 0x20000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MS_SHARED = 0x100000
MS_RELATIME = 0x200000
MS_STRICTATIME = 0x1000000

MNT_DETACH = 2
RENAME_NOREPLACE = 1

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38


class Attr(IntFlag):
    """MOUNT_ATTR_* of mount_setattr(2); an atime mode is a value inside ATIME_MASK."""

    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4
    NOEXEC = 0x8
    NOATIME = 0x10
    STRICTATIME = 0x20
    NODIRATIME = 0x80
    NOSYMFOLLOW = 0x200000


ATIME_MASK = 0x70


class Resolve(IntFlag):
    """RESOLVE_* of openat2(2), Linux 5.6."""

    NO_XDEV = 0x01
    NO_MAGICLINKS = 0x02
    NO_SYMLINKS = 0x04
    BENEATH = 0x08
    IN_ROOT = 0x10


# Everything inside one mount: whoever may rename or mount in the container can not steer it out.
INSIDE = Resolve.NO_XDEV | Resolve.NO_MAGICLINKS | Resolve.NO_SYMLINKS | Resolve.BENEATH
# A mount point, found from the root of its namespace; crosses mounts, follows no link.
FROM_ROOT = Resolve.NO_MAGICLINKS | Resolve.NO_SYMLINKS | Resolve.IN_ROOT


def _fail(call: str) -> OSError:
    code = ctypes.get_errno()
    error = OSError(code, os.strerror(code))
    error.syscall = call  # type: ignore[attr-defined]  # for KernelError; OSError has no such slot
    return error


def openat2(dir_fd: int, path: bytes, flags: int, resolve: int, mode: int = 0) -> int:
    """Open `path` under `dir_fd` with RESOLVE_* `resolve`; close-on-exec unless O_PATH says else.

    openat2(2), Linux 5.6. EXDEV: left the mount or the directory; ELOOP: a symbolic link;
    EAGAIN: a rename or mount raced with "..", tried again here a few times.
    """
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(8):
        fd: int = _syscall(_SYS_OPENAT2, dir_fd, path, how, ctypes.c_size_t(24))
        if fd >= 0:
            return fd
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            break
    raise _fail("openat2")


def open_tree(dir_fd: int, path: bytes, flags: int = 0) -> int:
    """Descriptor of the mount at `path` (b"" for `dir_fd` itself), or a detached clone of it.

    open_tree(2), Linux 5.2. EINVAL with OPEN_TREE_CLONE: the mount is unbindable, or not in
    the caller's mount namespace.
    """
    flags |= OPEN_TREE_CLOEXEC | (AT_EMPTY_PATH if not path else 0)
    fd: int = _syscall(_SYS_OPEN_TREE, dir_fd, path, ctypes.c_uint(flags))
    if fd < 0:
        raise _fail("open_tree")
    return fd


def move_mount(from_fd: int, to_fd: int, to_path: bytes = b"", flags: int = 0) -> None:
    """Attach the mount at `from_fd` to `to_path` under `to_fd`; with MOVE_MOUNT_SET_GROUP,
    put the mount at `to_fd` into the peer group of the one at `from_fd` instead.

    move_mount(2), Linux 5.2; MOVE_MOUNT_SET_GROUP 5.15.
    """
    flags |= MOVE_MOUNT_F_EMPTY_PATH | (MOVE_MOUNT_T_EMPTY_PATH if not to_path else 0)
    if _syscall(_SYS_MOVE_MOUNT, from_fd, b"", to_fd, to_path, ctypes.c_uint(flags)) < 0:
        raise _fail("move_mount")


def fsopen(fstype: bytes) -> int:
    """A context for a new superblock of `fstype`: fsopen(2), Linux 5.2. ENODEV: unknown type."""
    fd: int = _syscall(_SYS_FSOPEN, fstype, ctypes.c_uint(1))  # FSOPEN_CLOEXEC
    if fd < 0:
        raise _fail("fsopen")
    return fd


def fspick(fd: int) -> int:
    """A context to reconfigure the superblock of the mount at `fd`: fspick(2), Linux 5.2."""
    got: int = _syscall(_SYS_FSPICK, fd, b"", ctypes.c_uint(1 | FSPICK_EMPTY_PATH))
    if got < 0:
        raise _fail("fspick")
    return got


def fsconfig(fd: int, command: int, key: bytes | None = None, value: bytes | None = None) -> None:
    """Set one option of a context, or act on it: fsconfig(2), Linux 5.2."""
    if _syscall(_SYS_FSCONFIG, fd, ctypes.c_uint(command), key, value, 0) < 0:
        raise _fail("fsconfig")


def fsmount(fd: int) -> int:
    """A detached mount of a created context: fsmount(2), Linux 5.2."""
    got: int = _syscall(_SYS_FSMOUNT, fd, ctypes.c_uint(1), ctypes.c_uint(0))  # FSMOUNT_CLOEXEC
    if got < 0:
        raise _fail("fsmount")
    return got


def mount_setattr(
    fd: int,
    *,
    attr_set: int = 0,
    attr_clr: int = 0,
    propagation: int = 0,
    recursive: bool = False,
) -> None:
    """Change attributes of the one mount at `fd`; other mounts of its superblock keep theirs.

    mount_setattr(2), Linux 5.12. Needs CAP_SYS_ADMIN in the user namespace that owns the
    mount namespace.
    EBUSY   setting RDONLY while a file is open for writing through this mount
    EINVAL  not the root of a mount, or a mount outside the caller's mount namespace
    EPERM   the attribute is locked on this mount, for every caller: mount_namespaces(7)
    ENOSYS  an older kernel, or a seccomp filter
    """
    attr = struct.pack("QQQQ", attr_set, attr_clr, propagation, 0)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    if _syscall(_SYS_MOUNT_SETATTR, fd, b"", ctypes.c_uint(flags), attr, ctypes.c_size_t(32)) < 0:
        raise _fail("mount_setattr")


def mount(source: bytes | None, target: bytes, fstype: bytes | None, flags: int) -> None:
    """mount(2), without data: remounts on kernels that lack mount_setattr(2), propagation."""
    if _libc.mount(source, target, fstype, ctypes.c_ulong(flags), None) < 0:
        raise _fail("mount")


def umount2(target: bytes, flags: int) -> None:
    """Unmount `target`: umount2(2)."""
    if _libc.umount2(target, flags) < 0:
        raise _fail("umount2")


def pivot_root(new_root: bytes, put_old: bytes) -> None:
    """pivot_root(2); with "." twice the old root ends up stacked on the new one."""
    if _syscall(_SYS_PIVOT_ROOT, new_root, put_old) < 0:
        raise _fail("pivot_root")


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """renameat2(2), Linux 3.15. EEXIST with RENAME_NOREPLACE: the new name is taken."""
    if _syscall(_SYS_RENAMEAT2, old_dir, old, new_dir, new, ctypes.c_uint(flags)) < 0:
        raise _fail("renameat2")


def setns(fd: int, nstype: int) -> None:
    """Enter the namespace at `fd`: setns(2); os.setns is there from Python 3.12 only.

    For a mount namespace: cwd and root become its root. EINVAL if another thread shares the
    file-system context; EPERM without CAP_SYS_ADMIN in the user namespace that owns it.
    """
    if _libc.setns(fd, nstype) < 0:
        raise _fail("setns")


def unshare(flags: int) -> None:
    """Leave shared namespaces for new ones: unshare(2); os.unshare is there from 3.12 only."""
    if _libc.unshare(flags) < 0:
        raise _fail("unshare")


def setfsids(uid: int, gid: int) -> None:
    """Own new files as these: setfsuid(2), setfsgid(2). Needs CAP_SETUID and CAP_SETGID.

    Like every change of credentials it makes the process dumpable as fs.suid_dumpable says, forgets
    PR_SET_PDEATHSIG, and takes the capabilities for files out of effect when it leaves user 0
    (or puts them in when it comes back): capabilities(7). They say nothing when they fail: EPERM
    is what asking again tells.
    """
    _libc.setfsgid(ctypes.c_uint(gid))
    _libc.setfsuid(ctypes.c_uint(uid))
    nobody = ctypes.c_uint(0xFFFFFFFF)
    now = (_libc.setfsuid(nobody) & 0xFFFFFFFF, _libc.setfsgid(nobody) & 0xFFFFFFFF)
    if now != (uid, gid):
        ctypes.set_errno(errno.EPERM)
        raise _fail("setfsuid")


def prctl(option: int, value: int = 0, further: int = 0) -> int:
    """prctl(2) with one or two numeric arguments; what it returns."""
    args = [ctypes.c_ulong(value), ctypes.c_ulong(further)] + [ctypes.c_ulong(0)] * 2
    got: int = _libc.prctl(option, *args)
    if got < 0:
        raise _fail("prctl")
    return got


_CAP_HEADER = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread


def capget() -> tuple[int, int, int]:
    """Effective, permitted and inheritable set of this thread, as bits: capget(2)."""
    data = ctypes.create_string_buffer(24)
    if _libc.capget(_CAP_HEADER, data) < 0:
        raise _fail("capget")
    low = struct.unpack_from("III", data, 0)
    high = struct.unpack_from("III", data, 12)
    effective, permitted, inheritable = (a | b << 32 for a, b in zip(low, high, strict=True))
    return effective, permitted, inheritable


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set them: capset(2). EPERM: more than is permitted."""
    sets = (effective, permitted, inheritable)
    low = struct.pack("III", *(bits & 0xFFFFFFFF for bits in sets))
    high = struct.pack("III", *(bits >> 32 for bits in sets))
    if _libc.capset(_CAP_HEADER, low + high) < 0:
        raise _fail("capset")


def bounding_set() -> int:
    """The capability bounding set, as bits: prctl(2), PR_CAPBSET_READ."""
    bits = 0
    for number in range(64):
        try:
            bits |= prctl(PR_CAPBSET_READ, number) << number
        except OSError:
            break  # above the last one that this kernel has
    return bits


def drop_bounding(some: int) -> None:
    """Take capabilities out of the bounding set, for good; needs CAP_SETPCAP in effect."""
    for number in range(64):
        if some >> number & 1:
            try:
                prctl(PR_CAPBSET_DROP, number)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                break  # above the last one that this kernel has


def lchown_fd(fd: int, uid: int, gid: int) -> None:
    """Owner of the very file at `fd`, which may be O_PATH: fchownat(2), AT_EMPTY_PATH."""
    if _libc.fchownat(fd, b"", ctypes.c_uint(uid), ctypes.c_uint(gid), AT_EMPTY_PATH) < 0:
        raise _fail("fchownat")


def utimens_fd(fd: int, atime_ns: int, mtime_ns: int) -> None:
    """Times of the very file at `fd`, which may be O_PATH: utimensat(2), AT_EMPTY_PATH (5.8)."""
    times = struct.pack("qqqq", *divmod(atime_ns, 10**9), *divmod(mtime_ns, 10**9))
    if _libc.utimensat(fd, b"", times, AT_EMPTY_PATH) < 0:
        raise _fail("utimensat")


class MountIdentity(NamedTuple):
    """What statx(2) says of the mount that a descriptor is on."""

    mnt_id: int
    """As in mountinfo; recycled by the kernel after an unmount."""
    unique_id: int
    """STATX_MNT_ID_UNIQUE, never used twice; 0 before Linux 6.8."""
    dev: int
    """Device number, as os.makedev gives it."""
    inode: int
    mount_root: bool
    """The descriptor is the root of its mount (STATX_ATTR_MOUNT_ROOT, Linux 5.8)."""


_STATX_MNT_ID = 0x1000
_STATX_MNT_ID_UNIQUE = 0x4000
_STATX_INO = 0x100
_STATX_ATTR_MOUNT_ROOT = 0x2000


def _statx(fd: int, mask: int) -> tuple[int, int, int, int, int]:
    buffer = ctypes.create_string_buffer(256)
    flags = ctypes.c_int(AT_EMPTY_PATH | AT_NO_AUTOMOUNT | AT_SYMLINK_NOFOLLOW)
    if _syscall(_SYS_STATX, fd, b"", flags, ctypes.c_uint(mask), buffer) < 0:
        raise _fail("statx")
    (got,) = struct.unpack_from("I", buffer, 0)
    (attributes,) = struct.unpack_from("Q", buffer, 8)
    (inode,) = struct.unpack_from("Q", buffer, 32)
    major, minor = struct.unpack_from("II", buffer, 136)
    (mnt_id,) = struct.unpack_from("Q", buffer, 144)
    return got, attributes, inode, os.makedev(major, minor), mnt_id


def mount_identity(fd: int) -> MountIdentity:
    """Which mount `fd` is on: statx(2) with STATX_MNT_ID (Linux 5.8), and _UNIQUE (6.8)."""
    got, attributes, inode, dev, mnt_id = _statx(fd, _STATX_INO | _STATX_MNT_ID)
    if not got & _STATX_MNT_ID:
        mnt_id = _mnt_id_of_fdinfo(fd)
    unique_mask, *_, unique = _statx(fd, _STATX_MNT_ID_UNIQUE)
    if not unique_mask & _STATX_MNT_ID_UNIQUE:
        unique = 0
    return MountIdentity(mnt_id, unique, dev, inode, bool(attributes & _STATX_ATTR_MOUNT_ROOT))


def _mnt_id_of_fdinfo(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        for line in file:
            if line.startswith(b"mnt_id:"):
                return int(line.split()[1])
    raise OSError(errno.ENODATA, "no mnt_id in fdinfo")


class MountState(NamedTuple):
    """What statmount(2) says of one mount."""

    attr: int
    """MOUNT_ATTR_* bits."""
    superblock_read_only: bool
    mnt_id: int


def statmount(unique_id: int) -> MountState:
    """Attributes of one mount of the caller's namespace: statmount(2), Linux 6.8.

    ENOENT: no such mount here (unmounted since); ENOSYS: an older kernel.
    """
    request = struct.pack("IIQQ", 24, 0, unique_id, 0x1 | 0x2)  # SB_BASIC | MNT_BASIC
    buffer = ctypes.create_string_buffer(1024)
    if _syscall(_SYS_STATMOUNT, request, buffer, ctypes.c_size_t(1024), ctypes.c_uint(0)) < 0:
        raise _fail("statmount")
    (sb_flags,) = struct.unpack_from("I", buffer, 32)
    (mnt_id,) = struct.unpack_from("I", buffer, 56)
    (attr,) = struct.unpack_from("Q", buffer, 64)
    return MountState(attr, bool(sb_flags & 1), mnt_id)


def idmap_of(unique_id: int, namespace_id: int) -> tuple[str, str] | None:
    """Maps of an idmapped mount in any mount namespace, as lines of uid_map and gid_map: ids of the
    file system, ids that are shown, how many. STATMOUNT_MNT_UIDMAP, _GIDMAP: Linux 6.15; None: an
    older kernel.
    """
    wanted = 0x2000 | 0x4000
    request = struct.pack("IIQQQ", 32, 0, unique_id, wanted, namespace_id)
    size = 1 << 16  # 340 extents of each kind, the most there are, and their text
    buffer = ctypes.create_string_buffer(size)
    if _syscall(_SYS_STATMOUNT, request, buffer, ctypes.c_size_t(size), ctypes.c_uint(0)) < 0:
        raise _fail("statmount")
    (mask,) = struct.unpack_from("Q", buffer, 8)
    if mask & wanted != wanted:
        return None
    maps = []
    for count, offset in struct.iter_unpack("II", buffer.raw[152:168]):
        lines = buffer.raw[512 + offset :].split(b"\0", count)[:count]
        maps.append("\n".join(line.decode() for line in lines))
    return maps[0], maps[1]


_NS_GET_USERNS = 0xB701
_NS_GET_NSTYPE = 0xB703
_NS_GET_MNTNS_ID = 0x8008B705
_NS_MNT_GET_NEXT = 0x8010B70B
_NS_MNT_GET_PREV = 0x8010B70C
_MNT_NS_INFO = struct.Struct("IIQ")


def namespace_type(fd: int) -> int:
    """CLONE_NEW* of the namespace at `fd`: ioctl_nsfs(2), Linux 4.11. ENOTTY: no namespace."""
    return fcntl.ioctl(fd, _NS_GET_NSTYPE)


def owning_user_namespace(fd: int) -> int:
    """Descriptor of the user namespace that owns the one at `fd`: ioctl_nsfs(2), Linux 4.9.

    EPERM: the owner is outside the caller's user namespace.
    """
    got = fcntl.ioctl(fd, _NS_GET_USERNS)
    os.set_inheritable(got, False)
    return got


def mount_namespace_id(fd: int) -> int:
    """A number of the mount namespace at `fd` that is never used again; 0 where there is none.

    NS_GET_MNTNS_ID, ioctl_nsfs(2), Linux 6.11.
    """
    buffer = bytearray(8)
    try:
        fcntl.ioctl(fd, _NS_GET_MNTNS_ID, buffer)
    except OSError:
        return 0
    return int.from_bytes(buffer, sys.byteorder)


def next_mount_namespace(fd: int, *, back: bool = False) -> int | None:
    """Descriptor of the mount namespace after (or before) the one at `fd`; None at the end.

    NS_MNT_GET_NEXT, NS_MNT_GET_PREV, ioctl_nsfs(2), Linux 6.12. ENOTTY: an older kernel; EPERM:
    not in the initial pid and user namespaces.
    """
    info = bytearray(_MNT_NS_INFO.pack(_MNT_NS_INFO.size, 0, 0))
    try:
        got: int = fcntl.ioctl(fd, _NS_MNT_GET_PREV if back else _NS_MNT_GET_NEXT, info)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    os.set_inheritable(got, False)
    return got


_ATTR_TO_MS = (
    (Attr.RDONLY, MS_RDONLY),
    (Attr.NOSUID, MS_NOSUID),
    (Attr.NODEV, MS_NODEV),
    (Attr.NOEXEC, MS_NOEXEC),
    (Attr.NODIRATIME, MS_NODIRATIME),
    (Attr.NOSYMFOLLOW, MS_NOSYMFOLLOW),
)


def mount_flags_of(attr: int) -> int:
    """The MS_* word of mount(2) that restates `attr` in full.

    MS_REMOUNT|MS_BIND replaces every per-mount flag, and an atime mode is kept only when none
    is named, so exactly one is always named here: mount(2), NOTES.
    """
    flags = sum(ms for bit, ms in _ATTR_TO_MS if attr & bit)
    mode = attr & ATIME_MASK
    if mode == Attr.NOATIME:
        return flags | MS_NOATIME
    return flags | (MS_STRICTATIME if mode == Attr.STRICTATIME else MS_RELATIME)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors; errors of close(2) tell nothing that could be acted on here."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """pwrite(2) until all of `data` is in place; ENOSPC and friends are raised as they come."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view = view[done:]
        offset += done
