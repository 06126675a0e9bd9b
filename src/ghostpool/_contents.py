"""What was in the tmpfs mounts of rebuilt namespaces: tmpfs-dev-D.tar.gz.img, D being the device.

A process that may do nothing else reads each of these images; what it tells is believed of nothing.
A path has plain components and is there once, a hard link leads to a file that was told before, and
the builder makes each name relative to the root of the new superblock, through neither links nor
mounts. What is not made is left out and named: devices and setuid files unless they are allowed,
sparse files, and what would be more than is held in memory.
"""

from __future__ import annotations

import binascii
import json
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Sequence
from typing import Any, Final

import anyio
import anyio.lowlevel

from ghostpool._buildspec import MountSpec, NamespaceSpec, Node
from ghostpool._channel import receive_some
from ghostpool._errors import ImageError
from ghostpool._imagesource import OPEN_FLAGS
from ghostpool._launch import execute, package_root
from ghostpool._limits import size_text
from ghostpool._model import Images
from ghostpool._paths import text
from ghostpool._planned import Policy
from ghostpool._protocol import rights
from ghostpool._reading import SILENCE_S, STOP_S, discard, processor_s, why_it_ended
from ghostpool._said import LENGTH, MAX_FRAME
from ghostpool._startreader import Reading

log = logging.getLogger("ghostpool")

MOST: Final = 16 << 20
"""Bytes of content of all images together: they are held in memory until they are written."""
MEMBERS: Final = 1 << 16
"""Members of all images together."""
_NAMES: Final = 8 << 20
"""Bytes of their names and link texts together."""
_SHOWN: Final = 5
_MOST_S: Final = 1 << 62
_BOOT: Final = (
    "import sys; sys.path += {paths!r}; from ghostpool import _contentsreader as c; c.main(3)"
)
_TYPES: Final = {
    "file": stat.S_IFREG,
    "link": stat.S_IFLNK,
    "char device": stat.S_IFCHR,
    "block device": stat.S_IFBLK,
    "directory": stat.S_IFDIR,
    "fifo": stat.S_IFIFO,
}
_LEFT: Final = {
    "sparse": "sparse files",
    "unknown": "files of a kind that is not known",
    "large": f"more than {size_text(MOST)} of all tmpfs contents together",
}


async def with_contents(
    specs: Sequence[NamespaceSpec], images: Images, directory: int, policy: Policy
) -> tuple[NamespaceSpec, ...]:
    """The specs, with the files of each tmpfs on the first mount of its whole.

    `directory` is that of the images. ImageError: an image of a tmpfs is malformed.
    """
    devices = {int(one.id): one.device for mounts in images.mounts.values() for one in mounts}
    homes: dict[int, MountSpec] = {}
    for namespace in specs:
        for mount in namespace.mounts:
            if mount.fstype == "tmpfs" and mount.external is None and mount.root == b"/":
                homes.setdefault(devices[mount.id], mount)
    if homes and not stat.S_ISDIR(os.fstat(directory).st_mode):
        log.warning(
            "%s: contents of tmpfs mounts are not read from archives: %s and what else is a tmpfs "
            "begins empty",
            images.directory,
            text(next(iter(homes.values())).mountpoint),
        )
        return tuple(specs)
    made: dict[int, tuple[Node, ...]] = {}
    room = _Room()
    for device, mount in homes.items():
        name = f"tmpfs-dev-{os.major(device) << 20 | os.minor(device)}.tar.gz.img"
        image = _open(name, directory)
        if image >= 0:
            try:
                contents = _Contents(name, mount.mountpoint, policy, room)
                await contents.read(image)
            finally:
                os.close(image)
            contents.warn()
            made[mount.id] = tuple(contents.nodes.values())
    return tuple(
        namespace._replace(
            mounts=tuple(one._replace(nodes=made.get(one.id, ())) for one in namespace.mounts)
        )
        for namespace in specs
    )


def _open(name: str, directory: int) -> int:
    """-1: there is none."""
    try:
        fd = os.open(name, OPEN_FLAGS, dir_fd=directory)
    except FileNotFoundError:
        return -1
    except OSError as error:
        raise ImageError(name, None, f"can not be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(name, None, "is not a regular file")
    return fd


class _Room:
    """What all images together may still hold."""

    def __init__(self) -> None:
        self.content = MOST
        self.members = MEMBERS
        self.names = _NAMES


class _Contents:
    """The members of one image, as they are told."""

    def __init__(self, name: str, mountpoint: bytes, policy: Policy, room: _Room) -> None:
        self.nodes: dict[bytes, Node] = {}
        """By path inside the file system; b"" is its root."""
        self._name = name
        self._mountpoint = mountpoint
        self._policy = policy
        self._room = room
        self._left: dict[str, list[bytes]] = {}
        """Why something is left out -> paths."""
        self._seen: set[bytes] = set()
        self._pieces: list[bytes] | None = None
        """Content of the file that was told last; None: it is left out, or was no file."""
        self._last = b""
        self._buffer = bytearray()

    def warn(self) -> None:
        """Name what is left out."""
        for why, paths in self._left.items():
            some = ", ".join(map(text, paths[:_SHOWN]))
            more = f" and {len(paths) - _SHOWN:,} more" if len(paths) > _SHOWN else ""
            log.warning("%s: left out: %s: %s%s", self._name, why, some, more)

    async def read(self, image: int) -> None:
        """All of it. ImageError: it is malformed, or its reader came to grief."""
        ours, theirs = socket.socketpair()
        with theirs:
            paths = [package_root(), *filter(os.path.isabs, sys.path)]
            pid = execute(_BOOT.format(paths=paths), theirs.fileno(), null=(0, 1, 2))
        pidfd = os.pidfd_open(pid)
        # What ends it is that which ends the other reader.
        reading = Reading(pid, os.dup(ours.fileno()), image, self._name, 0, pidfd)
        try:
            with ours:
                ours.setblocking(False)
                request = json.dumps([self._room.content]).encode()
                ours.sendmsg([LENGTH.pack(len(request)) + request], rights([image]))
                await self._listen(ours)
        except TimeoutError:
            problem = f"reading it has hung for {SILENCE_S:g} s: does its storage answer?"
            raise self._wrong(problem) from None
        except anyio.EndOfStream:
            with anyio.move_on_after(1):
                await anyio.wait_readable(pidfd)
            why = why_it_ended(pidfd, "the process that reads it", processor_s(image))
            raise self._wrong(why) from None
        finally:
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass
            with anyio.move_on_after(STOP_S, shield=True):
                await anyio.wait_readable(pidfd)
            discard(reading)

    async def _listen(self, end: socket.socket) -> None:
        while True:
            match await self._frame(end):
                case ["node", [str() as name, str() as kind, *rest]]:
                    self._finish()
                    self._add(self._path(name), kind, rest)
                case ["data", [str() as data]]:
                    self._take(data)
                case ["left", [str() as name, ("sparse" | "unknown" | "large") as why]]:
                    self._finish()
                    self._leave(self._path(name), _LEFT[why])
                case ["end", []]:
                    self._finish()
                    return
                case ["still", []]:
                    pass
                case ["error", [str() as problem]]:
                    raise self._wrong(problem[:1000])
                case _:
                    raise self._nonsense()

    async def _frame(self, end: socket.socket) -> Any:
        await anyio.lowlevel.checkpoint()
        (length,) = LENGTH.unpack(await self._bytes(end, LENGTH.size))
        if length > MAX_FRAME:
            raise self._nonsense()
        try:
            return json.loads(await self._bytes(end, length))
        except (ValueError, RecursionError):
            raise self._nonsense() from None

    async def _bytes(self, end: socket.socket, length: int) -> bytes:
        with anyio.fail_after(SILENCE_S):
            while len(self._buffer) < length:
                data, _, _ = await receive_some(end, 1 << 18)
                self._buffer += data
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken

    def _add(self, path: bytes, kind: str, rest: list[Any]) -> None:
        match rest:
            case [
                int() as mode,
                int() as uid,
                int() as gid,
                int() as mtime,
                str() as link,
                int() as major,
                int() as minor,
            ]:
                target = self._bytes_of(link)
            case _:
                raise self._nonsense()
        place = self._place(path)
        if kind == "hard link":
            # A file that was left out takes its further names with it.
            other = self.nodes.get(self._normal(target))
            if other is None:
                self._leave(path, "a hard link to what is not there")
            elif stat.S_ISDIR(other.mode):
                raise self._wrong(f"{text(path)} is a hard link to a directory")
            else:
                self.nodes[path] = Node(place, other.mode, hard_link_of=other.path)
            return
        if kind not in _TYPES or (path == b"" and kind != "directory"):
            raise self._nonsense()
        mode = (mode & 0o7777) | _TYPES[kind]
        if not (0 <= uid < 0xFFFFFFFF and 0 <= gid < 0xFFFFFFFF and abs(mtime) < _MOST_S):
            raise self._wrong(f"no file can have the owner or time of {text(path)}")
        node = Node(place, mode, uid, gid, mtime_ns=mtime)
        if kind.endswith("device"):
            if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
                raise self._wrong(f"no device has the number of {text(path)}")
            node = node._replace(rdev=os.makedev(major, minor))
            if not self._policy.allow_devices:
                self._leave(path, "devices, without --allow-devices")
                return
        if kind == "link":
            if not target or len(target) > 4095 or b"\0" in target:
                raise self._wrong(f"{text(path)} leads to no path")
            node = node._replace(target=target)
        self.nodes[path] = node
        if kind == "file":
            self._last, self._pieces = path, []
            if mode & (stat.S_ISUID | stat.S_ISGID) and not self._policy.allow_setuid:
                del self.nodes[path]
                self._leave(path, "setuid and setgid files, without --allow-setuid")

    def _take(self, data: str) -> None:
        if self._pieces is None:
            raise self._nonsense()
        try:
            piece = binascii.a2b_base64(data)
        except ValueError:
            raise self._nonsense() from None
        self._room.content -= len(piece)
        if self._room.content < 0:
            raise self._nonsense()
        if self._last in self.nodes:
            self._pieces.append(piece)

    def _finish(self) -> None:
        if self._pieces and self._last in self.nodes:
            node = self.nodes[self._last]
            self.nodes[self._last] = node._replace(data=b"".join(self._pieces))
        self._pieces = None

    def _leave(self, path: bytes, why: str) -> None:
        self._left.setdefault(why, []).append(path)

    def _path(self, name: str) -> bytes:
        """Of a new member, which no other one has."""
        self._room.members -= 1
        if self._room.members < 0:
            raise self._wrong(f"more than {MEMBERS:,} files in the images of tmpfs mounts")
        path = self._normal(self._bytes_of(name))
        if path in self._seen:
            raise self._wrong(f"holds {text(path) or '/'} twice")
        self._seen.add(path)
        return path

    def _normal(self, name: bytes) -> bytes:
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        if name.startswith(b"/") or b".." in parts or b"\0" in name:
            raise self._wrong(f"{text(name)} is no path inside it")
        if len(name) > 4095 or any(len(part) > 255 for part in parts):
            raise self._wrong("no file can have a name so long")
        return b"/".join(parts)

    def _place(self, path: bytes) -> bytes:
        return self._mountpoint.rstrip(b"/") + b"/" + path if path else self._mountpoint

    def _bytes_of(self, told: str) -> bytes:
        self._room.names -= len(told)
        if self._room.names < 0:
            raise self._wrong(f"more than {size_text(_NAMES)} of names")
        try:
            return told.encode("latin-1")
        except UnicodeEncodeError:
            raise self._nonsense() from None

    def _wrong(self, problem: str) -> ImageError:
        return ImageError(self._name, None, problem)

    def _nonsense(self) -> ImageError:
        return self._wrong("the process that reads it makes no sense")


__all__ = ["with_contents"]
