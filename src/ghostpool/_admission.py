"""What rules out a ghost, an open or a mount by itself; pure.

Whatever is refused here is refused before anything is touched.
"""

from __future__ import annotations

import os
import stat
from _socket import SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM

from ghostpool._errors import (
    HostNamespace,
    MountNotFound,
    PlanError,
    ReadOnlySuperblock,
    UnsupportedError,
)
from ghostpool._limits import NAME_LIMIT
from ghostpool._linux import Attr
from ghostpool._match import Site
from ghostpool._model import FifoData, Ghost, Linked, RegFile, Socket
from ghostpool._mountinfo import LiveMount
from ghostpool._ownership import no_such_owner
from ghostpool._paths import text
from ghostpool._planned import Policy
from ghostpool._userns import IdMaps

_TMPFILE_BIT = os.O_TMPFILE & ~os.O_DIRECTORY
_DROPPED_FLAGS = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY | os.O_CLOEXEC
_DEVICES = frozenset((stat.S_IFCHR, stat.S_IFBLK))
_SETID = stat.S_ISUID | stat.S_ISGID
_SOCKETS = frozenset((SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET))
_CLOSED, _LISTENING = 7, 10
_EXTERNAL, _SERVICE = 1, 2
_NEW_PIPE = 16 * os.sysconf("SC_PAGE_SIZE")
_MOST_EXTENTS = 250_000
"""What fits one request to a worker; 1 GiB of which every other block is a hole has as many."""
# Python says 0 on 64-bit machines, but fdinfo shows the kernel's own value there.
_O_LARGEFILE = {"x86_64": 0o100000, "aarch64": 0o400000}.get(os.uname().machine, 0o100000)
_KNOWN_FLAGS = (
    os.O_ACCMODE
    | os.O_APPEND
    | os.O_NONBLOCK
    | os.O_SYNC
    | os.O_ASYNC
    | os.O_DIRECT
    | os.O_LARGEFILE
    | _O_LARGEFILE
    | os.O_DIRECTORY
    | os.O_NOFOLLOW
    | os.O_NOATIME
    | os.O_PATH
)


def is_privileged(mode: int) -> bool:
    """A ghost of this st_mode could give somebody more than he has."""
    return mode & _SETID != 0 or stat.S_IFMT(mode) in _DEVICES


def privileges_of(ghost: Ghost, policy: Policy) -> tuple[tuple[str, ...], bool]:
    """What of a ghost needs the operator's word, and whether he has given it."""
    kinds: list[str] = []
    allowed = True
    if stat.S_IFMT(ghost.mode) in _DEVICES:
        kind = "char" if stat.S_ISCHR(ghost.mode) else "block"
        rdev = ghost.rdev or 0
        kinds.append(f"{kind} device {os.major(rdev)}:{os.minor(rdev)}")
        allowed &= policy.allow_devices
    for bit, word in (stat.S_ISUID, "setuid"), (stat.S_ISGID, "setgid"):
        if ghost.mode & bit:
            kinds.append(word)
            allowed &= policy.allow_setuid
    return tuple(kinds), allowed


def check_ghost(ghost: Ghost, policy: Policy) -> None:
    """Refuse what the operator has not allowed. PlanError."""
    if is_privileged(ghost.mode):
        _check_privileged(ghost, policy)
    if len(ghost.extents) > _MOST_EXTENTS:
        raise PlanError(
            f"{len(ghost.extents)} pieces of content, more than {_MOST_EXTENTS} in one file"
        )
    if not policy.own_owner and not policy.mapped(ghost.uid, ghost.gid):
        raise no_such_owner(ghost.uid, ghost.gid)


def _check_privileged(ghost: Ghost, policy: Policy) -> None:
    if stat.S_IFMT(ghost.mode) in _DEVICES and not policy.allow_devices:
        rdev = ghost.rdev or 0
        raise PlanError(
            f"a device ({os.major(rdev)}:{os.minor(rdev)}), refused without --allow-devices"
        )
    if ghost.mode & _SETID and not policy.allow_setuid:
        raise PlanError(
            f"a setuid or setgid file (mode {stat.S_IMODE(ghost.mode):04o}), refused "
            "without --allow-setuid"
        )


def check_fifo(data: FifoData, ghost: Ghost, policy: Policy) -> FifoData:
    """What waited in a fifo, with the largest size up to its own that a pipe may have. PlanError.

    Of a pipe whose size is not in the image, that of the bytes, if a new one does not take them.
    """
    if not stat.S_ISFIFO(ghost.mode):
        raise PlanError(f"bytes wait in it, but {ghost.file} says mode {ghost.mode:o}: no fifo")
    limit = policy.pipe_limit()
    if data.length > limit:
        raise PlanError(
            f"{data.length} bytes waited in the fifo, but a pipe can hold no more than {limit} "
            "(fs.pipe-max-size)"
        )
    size = data.pipe_size
    if size is None:
        return data._replace(pipe_size=data.length if data.length > _NEW_PIPE else None)
    return data._replace(pipe_size=min(size, limit))


def why_not_bound(socket: Socket) -> str | None:
    """Why a socket can not be restored; None: it can."""
    last = socket.name.rpartition(b"/")[2]
    if len(socket.name) >= NAME_LIMIT or last in (b"", b".", b".."):
        return "it can not be bound by its name"
    if socket.kind & (_EXTERNAL | _SERVICE) or socket.type not in _SOCKETS:
        return "it is not one of the dumped tasks' own"
    if socket.peer or socket.state not in (_CLOSED, _LISTENING):
        return "it is connected, and its peer can not be restored"
    if socket.listening and socket.type == SOCK_DGRAM:
        return "it listens, which its type can not"
    return None


def owned(socket: Socket, ids: IdMaps | None, policy: Policy) -> Socket:
    """A socket with the owner of its name as we see him; `ids` are the maps of its tasks' user
    namespace. PlanError: there is none."""
    if socket.owner is None or policy.own_owner:
        return socket
    mode, uid, gid = socket.owner
    if ids is None:
        if not policy.mapped(uid, gid):
            raise no_such_owner(uid, gid)
        return socket
    outside = ids.outside(uid, gid)
    if outside is None:
        raise PlanError(
            f"its owner {uid}:{gid} has no id in the user namespace of its task ({ids})"
        )
    return socket._replace(owner=(mode, *outside))


def open_flags(file: RegFile, ghost: Ghost | Linked, mount: LiveMount) -> int:
    """Flags to open a file with through a mount. PlanError, UnsupportedError."""
    flags = file.flags & ~_DROPPED_FLAGS
    if flags & _TMPFILE_BIT:
        # The file is opened by a name now. O_DIRECTORY is part of O_TMPFILE, but only then.
        flags &= ~os.O_TMPFILE
    unknown = flags & ~_KNOWN_FLAGS
    if unknown:
        raise UnsupportedError(f"open flags {unknown:#o} are not known")
    if flags & os.O_PATH:
        return flags & (os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY)
    kind = stat.S_IFMT(ghost.mode)
    if kind == stat.S_IFLNK:
        raise PlanError("a symbolic link that was not opened with O_PATH")
    if kind in _DEVICES and mount.attributes & Attr.NODEV:
        raise PlanError(f"a device on {text(mount.mountpoint)}, which is nodev now")
    writes = flags & os.O_ACCMODE != os.O_RDONLY
    if kind == stat.S_IFREG and writes and mount.read_only:
        # The open would succeed during the lease and then keep the mount from going back.
        raise PlanError(
            f"open for writing, but {text(mount.mountpoint)} is read-only now: it could "
            "not be made read-only again while the file is open"
        )
    return flags


def alike(flags: int) -> int:
    """What of open flags tells one open file from another."""
    return flags & ~(_DROPPED_FLAGS | _O_LARGEFILE)


def check_mount(site: Site) -> None:
    """Refuse what nothing can be created on.

    ReadOnlySuperblock, HostNamespace, MountNotFound, UnsupportedError.
    """
    mount, target = site.mount, site.namespace.target
    where = f"{text(mount.mountpoint)} in {target.label}"
    if mount.superblock_read_only:
        raise ReadOnlySuperblock(
            f"the superblock of {where} ({mount.fstype}) is read-only, so nothing can be "
            "created on it through any mount"
        )
    if target.enter is None:
        from ghostpool._buildspec import SHARED_BY_KERNEL  # a namespace of this run: it is loaded

        if mount.fstype in SHARED_BY_KERNEL:
            raise UnsupportedError(
                f"{where} is the machine's own {mount.fstype}, which a rebuilt namespace only "
                "borrows: nothing is created on it"
            )
    if mount.read_only and target.is_host:
        raise HostNamespace(
            f"{where} is read-only and belongs to the host's mount namespace, which is "
            "never remounted: run the restore in a container's namespace, or remount it "
            "yourself"
        )
    if mount.root.endswith(b"//deleted"):
        raise MountNotFound(f"the directory that was mounted on {where} has been removed")
