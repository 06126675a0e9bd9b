"""The frozen values that the other modules hand each other; no behaviour, no I/O.

They are named tuples: a frozen dataclass takes four times as long to make, and so does its class
at import, where six methods of each are compiled.

Units: sizes, offsets and lengths in bytes; times in microseconds since 1970 (negative before);
device numbers as os.makedev gives them; modes are full st_mode values. Paths are bytes, since
file names are, and absolute image paths start with b"/" at the root of their mount namespace.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, NewType, TypeVar

from ghostpool._paths import ghost_file_name

MntId = NewType("MntId", int)
"""A mnt_id of the dumping kernel, as the images use it; never one of the live kernel."""
NsId = NewType("NsId", int)
"""A mount namespace id of the images (the N of mountpoints-N.img)."""
GhostId = NewType("GhostId", int)
"""Number of a ghost in the images; `Ghost.file` names the image of that one."""
RegId = NewType("RegId", int)
"""Id of a reg_file_entry: one open file description of the dumped tasks."""
_REG_BITS = 64
Pid = NewType("Pid", int)
"""A pid as the images have it: inside the dumped pid namespace."""

MountHandle = NewType("MountHandle", int)
"""Number under which coordinator and workers speak of one mount descriptor."""


def service_of(handle: MountHandle) -> MountHandle:
    """The handle of the private clone of a mount; live ones are even."""
    return MountHandle(handle | 1)


def live_of(handle: int) -> MountHandle:
    """The handle of the mount itself, given either of its two."""
    return MountHandle(handle & ~1)


def further_open(reg: RegId, number: int) -> RegId:
    """The id of one more open of a reg file, with other flags; number 0 is the file's own."""
    return RegId(number << _REG_BITS | reg)


def id_in_images(reg: RegId) -> RegId:
    """The id that the images have for an open."""
    return RegId(reg & (1 << _REG_BITS) - 1)


GHOST_KINDS = frozenset(
    (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK)
)
"""Type bits of what can be a ghost."""
TARGET_MAX = 4095
"""Longest target of a symbolic link, in bytes: PATH_MAX less the final NUL."""
HOST_NS = NsId(0)
"""Stands for the mount namespace of images that were dumped without one of their own."""
CONTAINER = 10**10
"""In a pod, numbers of its n-th container are n times this more than in its images: see `_pod`."""


_T = TypeVar("_T", bound=tuple[Any, ...])


def maker(kind: type[_T]) -> Callable[[tuple[Any, ...]], _T]:
    """What makes a named tuple out of all of its fields, in half of the time that its class takes.

    For where there are hundred thousands: neither their number nor their types are checked.
    """
    return partial(tuple.__new__, kind)


class Extent(NamedTuple):
    """A run of content: `length` bytes at `offset` of the file, at `position` of the image."""

    offset: int
    """Bytes from the beginning of the file."""
    length: int
    """Bytes."""
    position: int
    """Bytes from the beginning of the image; in an archive, see `Images.unpacking`."""


class Ghost(NamedTuple):
    """One ghost_file_entry and where its content lies in its image."""

    id: GhostId
    mode: int
    """Full st_mode."""
    uid: int
    """Owner, as the images have it."""
    gid: int
    """Group, likewise."""
    atime: int | None
    """Access time in microseconds since 1970; None: not in the image."""
    mtime: int | None
    """Modification time, likewise."""
    size: int
    """Bytes of a regular file, holes included; 0 for every other type."""
    extents: tuple[Extent, ...]
    """Content of a regular file, ascending; what no extent covers is a hole."""
    rdev: int | None = None
    """Device number of a device, as os.makedev gives it."""
    target: bytes | None = None
    """What a symbolic link points to."""

    @property
    def file(self) -> str:
        """Name of the image inside its directory."""
        return ghost_file_name(self.id % CONTAINER)


class ShmFile(NamedTuple):
    """A link remap in the archive of a container's /dev/shm, and where in it the content lies."""

    name: bytes
    """Relative to /dev/shm."""
    mode: int
    """Full st_mode, of a regular file."""
    uid: int
    gid: int
    mtime: int
    """Microseconds since 1970."""
    size: int
    position: int
    """Of the content, in bytes; the same for names of one file."""


class ShmGhost(Ghost):
    """A file of /dev/shm that is made anew, as a ghost is: its content is in the archive."""

    __slots__ = ()

    @property
    def file(self) -> str:
        """What is told of it."""
        return "the archive of /dev/shm"


class Linked(NamedTuple):
    """A file that has names still, but not the one it was opened by: a link remap leads to it.

    `criu dump` has linked it to a hidden name, link_remap.N, on its own file system.
    """

    id: GhostId
    """Beyond all numbers of ghosts; one for each reg file that is opened so."""
    mode: int
    """Full st_mode: as dumped, and in a plan as it is now."""
    hidden: bytes
    """That name, absolute in the mount namespace of the reg file."""


class RegFile(NamedTuple):
    """One reg_file_entry."""

    id: RegId
    flags: int
    """Of open(2), as dumped."""
    position: int | None
    """Offset in bytes; None: the restored file is not to be seeked."""
    name: bytes
    """The path that it was opened by, absolute in its mount namespace."""
    mnt_id: MntId | None
    """None where the dump had no mount namespace of its own, and in link remap targets."""
    size: int | None
    """Bytes when it was dumped, if the image says so."""
    mode: int | None
    """Full st_mode when it was dumped, if the image says so."""
    external: bool = False


class Remap(NamedTuple):
    """One remap_file_path_entry; `target` is a ghost id, a reg id or a pid by `kind`."""

    record: int
    """Its number in remap-fpath.img: the first referrer fixes where a ghost is created."""
    origin: RegId
    kind: Literal["ghost", "linked", "procfs"]
    target: int
    """Id of a ghost or of a reg file, or a pid: by `kind`."""


class FifoData(NamedTuple):
    """What waited in a fifo: `length` bytes at `position` of fifo-data.img."""

    position: int
    """Bytes from the beginning of the image; in an archive, see `Images.unpacking`."""
    length: int
    """Bytes; there may be none."""
    pipe_size: int | None
    """Size of the pipe's buffer in bytes, if the image says so."""


class Socket(NamedTuple):
    """One unix_sk_entry: a bound UNIX socket whose name was gone."""

    id: RegId
    """Its file id, or another number if a reg file has that one (before CRIU 3.6)."""
    type: int
    """SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET."""
    state: int
    """The kernel's TCP_CLOSE (7) or TCP_LISTEN (10); or it is connected."""
    flags: int
    """Of open(2), as dumped."""
    kind: int
    """CRIU's USK_* flags: 1, external; 2, of CRIU itself; 4, left to a plugin."""
    backlog: int
    """Of listen(2)."""
    peer: int
    """Inode number of the socket that it is connected to, or 0."""
    shutdown: int
    """What was shut down: 1 for reading, 2 for writing, 3 for both, 0 for neither."""
    name: bytes
    """What bind(2) was given, which is what getsockname(2) says."""
    directory: bytes
    """What a relative name is relative to, if the image says so."""
    owner: tuple[int, int, int] | None
    """Mode, uid and gid of the name, if the image says so."""
    options: tuple[int, int, int, int, bool, bool]
    """Bytes of the buffers for sending and for receiving, time limits of the same in microseconds
    (0: none), SO_PASSCRED, SO_PASSSEC."""

    @property
    def listening(self) -> bool:
        """It was listening."""
        return self.state == 10

    @property
    def path(self) -> bytes:
        """Its name from the root, as far as it is known."""
        name = self.name
        return name if name.startswith(b"/") or not self.directory else self.directory + b"/" + name


class Descriptor(NamedTuple):
    """One row of a task's fdinfo that leads to a reg file (directly, or as a fifo or tty), or to a
    UNIX socket whose name was gone."""

    number: int
    """The descriptor in the task."""
    reg_id: RegId
    close_on_exec: bool
    fifo: bool = False


class Holder(NamedTuple):
    """Something besides a descriptor that keeps a reg file: a mapping, exe, cwd or root."""

    pid: Pid
    key: str
    """exe, cwd, root or map:<start>-<end> (hex)."""
    reg_id: RegId
    flags: int | None = None
    """Of open(2), for a mapping; None: those of the file."""


class Task(NamedTuple):
    """One living task of the images; zombies have neither namespaces nor descriptors."""

    pid: Pid
    parent: Pid
    namespace: NsId
    descriptors: Sequence[Descriptor]
    """Those that lead to reg files, or to sockets of `Images.sockets`, by number; other sockets,
    pipes and the rest are left out."""
    holders: tuple[Holder, ...] = ()


class ImageMount(NamedTuple):
    """One mnt_entry."""

    id: MntId
    parent: MntId
    namespace: NsId
    fstype: str
    """File-system name (tmpfs, proc, …); "" where the image only says that it is another one."""
    device: int
    """Device number of its superblock, as os.makedev gives it."""
    root: bytes
    """What of the file system is mounted: an absolute path inside it."""
    mountpoint: bytes
    """Absolute, in its mount namespace."""
    source: str
    options: str
    """Of the superblock, as mount(8) takes them."""
    flags: int
    """Per-mount MS_* flags without propagation bits."""
    superblock_flags: int
    """MS_RDONLY, MS_SYNCHRONOUS (as 16) and MS_DIRSYNC."""
    shared_group: int
    """Peer group of a shared mount, or 0."""
    master_group: int
    """Peer group whose slave the mount is, or 0."""
    unbindable: bool
    external_key: str | None
    """Set for a mount whose superblock the dump left to the outside."""
    deleted_root: bool = False


class Step(NamedTuple):
    """One step of unpacking: what lies at a position of what is there so far is unpacked."""

    kind: str
    """"gzip" or "zstd"."""
    at: int
    """Bytes from the beginning."""


class Images(NamedTuple):
    """Everything ghostpool needs of one image directory, joined and checked."""

    directory: str
    """As the user named it, for messages."""
    tasks: tuple[Task, ...]
    files: dict[RegId, RegFile]
    remaps: Sequence[Remap]
    ghosts: dict[GhostId, Ghost]
    mounts: dict[NsId, tuple[ImageMount, ...]]
    """Parents before children; empty where the dump had no mount namespace of its own. Where none
    is to be rebuilt, only the roots, the mounts that files were opened on, and all on the mount
    points of these."""
    root_namespace: NsId
    own_user_namespace: bool
    """Ids in the images are those inside a dumped user namespace."""
    fifo_data: Mapping[RegId, FifoData] = MappingProxyType({})
    """What waited in fifos, by the first reg file in the image that the fifo was opened through."""
    sockets: Mapping[RegId, Socket] = MappingProxyType({})
    """Bound UNIX sockets whose names were gone; their ids are those of no reg file."""
    unpacking: tuple[Step, ...] | None = None
    """None: the images are files of a directory. Else they are members of an archive, and the
    position of an extent is one in what comes out of the archive after these steps."""
    devshm: Mapping[bytes, ShmFile] | None = None
    """Link remaps in the archive of /dev/shm, by name; None: there is no such archive."""
