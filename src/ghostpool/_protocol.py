"""What coordinator and children say to each other: typed batches in frames on a stream socket.

    frame := u32 length, u16 number of descriptors, u16 zero, <length> bytes of marshal

Descriptors ride on the header, which is received alone, so that they never get lost between two
frames. Values are plain tuples, numbers and bytes: marshal is built in, needs no import in a lean
worker, and both ends are the same interpreter (docs/design.md, D-006).
"""

from __future__ import annotations

import _socket
import array
import errno
import marshal
import os
import struct
import time
from typing import Any, NamedTuple

HEADER = struct.Struct("<IHH")
MAX_FDS = 250
"""Below SCM_MAX_FD (253), the most that one sendmsg(2) carries."""
MAX_FRAME = 64 << 20
_CMSG_SPACE = _socket.CMSG_SPACE(253 * 4)
FLIGHT_S = 10.0
"""How long a sender waits for descriptors of others to be received."""
FLIGHT_STEP_S = 0.002


class Failure(NamedTuple):
    """One operation of a batch failed; those before it were done, those after it not begun."""

    at: int
    """Its number in the batch; -1: the request as a whole."""
    errno: int
    """0 if no system call failed: `step` then says what did not agree."""
    step: str
    """Name of the system call, or of the check."""
    path: bytes
    mount: int
    """Handle of the mount that the path is on, or -1."""
    done: tuple[Any, ...] = ()
    """Results of the operations before it."""


class MountFacts(NamedTuple):
    """What a worker found at a mount point."""

    mnt_id: int
    unique_id: int
    """0 before Linux 6.8."""
    fsid: int
    """A random or stored number of the file system, where it has one: statfs(2). Else 0."""


class Look(NamedTuple):
    """What stands at the directory of some old names."""

    existing: int
    """How many components of the directory exist."""
    device: int
    inode: int
    """Identity of the deepest existing one."""
    taken: tuple[bool, ...]
    """For each name: something has it."""
    errno: int
    """Why the directory can not be looked at (EXDEV: another mount covers it), or 0."""
    taken_alternative: tuple[bool, ...]
    """For each name with ".cr_link" appended."""


class Found(NamedTuple):
    """The file that has a name which a link remap leads to."""

    errno: int
    """Why nothing can be said of it (ENOENT: nothing has the name), or 0."""
    device: int
    """st_dev."""
    inode: int
    """st_ino."""
    mode: int
    """Full st_mode."""
    uid: int
    """Owner, as the worker sees it."""
    gid: int
    """Group, likewise."""
    size: int
    """Bytes, holes included."""
    links: int
    """How many names it has."""
    directory_device: int
    """st_dev of the directory that it was found in."""
    directory_inode: int
    """st_ino of that directory."""


class Room(NamedTuple):
    """What statvfs(3) says of a superblock."""

    block: int
    """Bytes of a block."""
    blocks: int
    free_blocks: int
    """For ordinary users: without what is reserved for root."""
    inodes: int
    """0: the file system makes them as they are needed."""
    free_inodes: int


STREAMED = -1
"""In place of a position: what is handed over is a stream, which gives the bytes next."""


class CreateOp(NamedTuple):
    """Make one ghost under a temporary name, through a service mount."""

    mount: int
    directory: bytes
    """Existing directory, relative to the mount's root; b"" is the root itself."""
    name: bytes
    """Random, exclusive."""
    mode: int
    uid: int
    gid: int
    times: tuple[int, int] | None
    """Access and modification time in nanoseconds."""
    rdev: int
    target: bytes
    image: bytes
    """Name of the image in its directory; empty: what is handed over is the content itself."""
    size: int
    extents: tuple[tuple[int, int, int], ...]


class Created(NamedTuple):
    """A ghost that is there, under its temporary name: its identity."""

    device: int
    inode: int


class PlaceOp(NamedTuple):
    """Move a directory ghost to its old name: directories have no hard links to open by."""

    mount: int
    directory: bytes
    name: bytes
    """Where it lies."""
    parents: tuple[bytes, ...]
    """Missing directories between `directory` and the old name."""
    final: tuple[bytes, ...]
    """Names to try, the old one first."""
    device: int
    inode: int


class Placed(NamedTuple):
    """Where a directory ghost has come to lie."""

    final: int
    """Index of the name that was free."""
    made: int
    """How many of the parents, counted from the innermost, were made for it."""


class FillOp(NamedTuple):
    """Put back what waited in a fifo, which lies under its temporary name."""

    mount: int
    directory: bytes
    name: bytes
    device: int
    inode: int
    image: bytes
    position: int
    """Where the bytes are in the image."""
    length: int
    size: int
    """Of the pipe's buffer; 0: as the kernel makes it."""
    times: tuple[int, int] | None


class BindOp(NamedTuple):
    """Make a UNIX socket and bind it to a name that is gone at once."""

    name: bytes
    """As bind(2) takes it."""
    type: int
    """SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET."""
    backlog: int | None
    """Of listen(2); None: it does not listen."""
    shutdown: int
    """What was shut down: 1 for reading, 2 for writing, 3 for both, 0 for neither."""
    nonblocking: bool
    owner: tuple[int, int, int] | None
    """Mode, uid and gid of the name, if they are known."""
    options: tuple[int, int, int, int, bool, bool]
    """Sizes of the buffers for sending and receiving, the same of time limits in microseconds,
    SO_PASSCRED, SO_PASSSEC."""


class OpenOp(NamedTuple):
    """Give a ghost its old name, open it through the task's mount, take the name away again."""

    link: int
    """Mount through which the name is made and removed."""
    temp_directory: bytes
    temp_name: bytes
    """Where the ghost lies, relative to the root of `link`; b"" name: it has its name already."""
    link_directory: bytes
    """Directory of the old name, relative to the root of `link`."""
    live: int
    """The task's own mount."""
    live_directory: bytes
    names: tuple[bytes, ...]
    """The old name, and what to use if that is taken."""
    flags: int
    position: int
    """-1: do not seek."""
    device: int
    inode: int
    mode: int
    size: int
    """-1: the image does not say."""
    keep: bool
    move: bool = False
    """Nobody else opens this ghost: the old name takes the place of the temporary one."""


class Opened(NamedTuple):
    """Which of the names was used, and what could not be taken away again."""

    name: int
    left: tuple[bytes, ...]


class RemoveOp(NamedTuple):
    """Take a name away, if it still is what was made there."""

    mount: int
    directory: bytes
    name: bytes
    device: int
    inode: int
    """0: not known, because whoever made it died; the name alone decides, so it is random."""
    parents: tuple[bytes, ...]
    """The last components of `directory` that go too if they are empty, outermost first."""
    times: tuple[int, int] | None
    """A directory's times, which working inside it has changed."""
    wanted: tuple[bytes, ...] = ()
    """A directory: names to go by, if nothing has them by then, best first."""


class Removed(NamedTuple):
    """0, or the errno with which the name resisted; and the parents that were not empty."""

    errno: int
    step: str
    left: tuple[bytes, ...]
    found: int
    """What had the name: nothing, what was made there (now removed), or something else."""


NOTHING, REMOVED, OTHER = range(3)
"""Values of Removed.found."""


class Remnant(NamedTuple):
    """A file that has the name of a leftover."""

    directory: bytes
    """Relative to the mount's root."""
    name: bytes
    kind: str
    """ghostpool, criu_ghost, cr_link or link_remap."""
    device: int
    inode: int
    above: int
    """Inode of the directory."""
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    """Seconds since 1970."""


class Report(NamedTuple):
    """A worker's last words."""

    peak_rss: int
    """Bytes."""


def encode(message: Any, fds: list[int]) -> tuple[bytes, bytes]:
    """Header and body of a frame. ValueError: too much for one frame."""
    body = marshal.dumps(message)
    if len(body) > MAX_FRAME or len(fds) > MAX_FDS:
        raise ValueError(f"{len(body)} bytes with {len(fds)} descriptors do not fit one frame")
    return HEADER.pack(len(body), len(fds), 0), body


def rights(fds: list[int]) -> list[tuple[int, int, array.array[int]]]:
    """Ancillary data for sendmsg(2)."""
    return [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def take_rights(ancillary: list[tuple[int, int, bytes]], flags: int) -> list[int]:
    """The descriptors out of recvmsg(2). OSError if some did not fit under RLIMIT_NOFILE."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % 4])
    if flags & _socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise OSError(24, "descriptors were lost: the limit RLIMIT_NOFILE is too low")
    return list(fds)


class EndOfStream(Exception):
    """The other end is gone."""


class BlockingChannel:
    """The child's end: blocking, one thread."""

    def __init__(self, fd: int) -> None:
        self._socket = _socket.socket(fileno=fd)

    def send(self, message: Any, fds: list[int] | None = None) -> None:
        header, body = encode(message, fds or [])
        give_up = time.monotonic() + FLIGHT_S
        while True:
            try:
                self._socket.sendmsg([header], rights(fds or []), _socket.MSG_NOSIGNAL)
                break
            except OSError as error:
                # Without CAP_SYS_RESOURCE a user may have no more descriptors in flight than
                # RLIMIT_NOFILE, whoever sent them: unix(7).
                if error.errno != errno.ETOOMANYREFS or time.monotonic() > give_up:
                    raise
                time.sleep(FLIGHT_STEP_S)
        self._socket.sendall(body, _socket.MSG_NOSIGNAL)

    def receive(self) -> tuple[Any, list[int]]:
        """The next message. EndOfStream when the other end has closed."""
        header, ancillary, flags, _ = self._socket.recvmsg(
            HEADER.size, _CMSG_SPACE, _socket.MSG_CMSG_CLOEXEC
        )
        if not header:
            raise EndOfStream
        fds = take_rights(ancillary, flags)
        header += self._exactly(HEADER.size - len(header))
        length, count, _ = HEADER.unpack(header)
        if length > MAX_FRAME or count != len(fds):
            raise EndOfStream
        return marshal.loads(self._exactly(length)), fds  # noqa: S302  our own coordinator

    def _exactly(self, length: int) -> bytes:
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            got = self._socket.recv_into(view)
            if not got:
                raise EndOfStream
            view = view[got:]
        return bytes(buffer)

    def fileno(self) -> int:
        return self._socket.fileno()
