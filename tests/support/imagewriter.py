"""A writer of CRIU image directories, for situations that no real dump of the corpus shows.

It encodes by hand (varints and lengths, twenty lines) and shares nothing with the reader, so a
mistake in the reader's schema or framing can not cancel itself out here. `ImageSet` collects
tasks, mounts, ghosts and opens; `images()` gives the records of each image as a plain dict of
lists, to be broken at will; `write()` puts them into a directory.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

COMMON_MAGIC = 0x54564319
MAGICS = {
    "inventory": 0x58313116,
    "pstree": 0x50273030,
    "core": 0x55053847,
    "ids": 0x54432030,
    "mm": 0x57492820,
    "fs": 0x51403912,
    "fdinfo": 0x56213732,
    "files": 0x56303138,
    "reg-files": 0x50363636,
    "fifo": 0x58364939,
    "pipes": 0x56513555,
    "tty": 0x59433025,
    "unixsk": 0x54373943,
    "remap-fpath": 0x59133954,
    "ghost-file": 0x52583605,
    "mountpoints": 0x55563928,
    "fifo-data": 0x59333054,
}
FSTYPES = {"": 0, "proc": 1, "sysfs": 2, "devtmpfs": 3, "tmpfs": 5, "devpts": 6, "overlay": 17}

REG, PIPE, FIFO, UNIXSK, TTY = 1, 2, 3, 5, 11
LINKED, GHOST, PROCFS = 0, 1, 2
ALIVE, ZOMBIE = 1, 6

O_RDONLY = 0o100000  # as fdinfo shows it: O_LARGEFILE is always there
O_RDWR = 0o100002

Images = dict[str, list[bytes]]


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def zigzag(value: int) -> int:
    return (value << 1) ^ (value >> 63)


def message(*fields: tuple[int, int | bytes | str | None]) -> bytes:
    """A protobuf message of (field number, value); a value of None leaves the field out."""
    out = b""
    for number, value in fields:
        if value is None:
            continue
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def record(payload: bytes, trailer: bytes = b"") -> bytes:
    """One framed record, and raw bytes behind it."""
    return struct.pack("<I", len(payload)) + payload + trailer


def head(name: str, *, version: int = 2) -> bytes:
    """The magic words of the image file `name`."""
    kind = name.removesuffix(".img")
    if kind not in MAGICS:
        kind = kind.rpartition("-")[0]
    words = [MAGICS[kind]]
    if version == 2 and kind != "inventory":
        words.insert(0, COMMON_MAGIC)
    return struct.pack(f"<{len(words)}I", *words)


def timeval(microseconds: int | None) -> bytes | None:
    if microseconds is None:
        return None
    seconds, rest = divmod(microseconds, 1_000_000)
    return message((1, seconds), (2, rest))


@dataclass
class _Task:
    pid: int
    parent: int
    ns: int | None
    files_id: int
    zombie: bool
    threads: Sequence[int]
    with_mm: bool
    with_fs: bool
    cwd: int
    root: int
    exe: int
    vmas: list[bytes] = field(default_factory=list)


@dataclass
class _Ghost:
    mode: int
    size: int | None
    parts: list[bytes]


@dataclass
class _Mount:
    id: int
    ns: int
    mountpoint: str


class ImageSet:
    """One image directory in the making; every method returns the id of what it added.

    `own_mounts` False makes images that were dumped without a mount namespace of their own.
    """

    def __init__(
        self, *, own_mounts: bool = True, own_user_namespace: bool = False, version: int = 2
    ) -> None:
        self.own_mounts = own_mounts
        self.own_user_namespace = own_user_namespace
        self.version = version
        self._ids = itertools.count(1)
        self._ghost_ids = itertools.count(1)
        self._mnt_ids = itertools.count(500)
        self._tasks: list[_Task] = []
        self._mounts: list[_Mount] = []
        self._mount_records: dict[int, list[bytes]] = {}
        self._files: list[bytes] = []
        self._fdinfo: dict[int, list[bytes]] = {}
        self._remaps: list[bytes] = []
        self._ghosts: dict[int, _Ghost] = {}
        self._fifo_data: list[bytes] = []

    # mounts and tasks

    def mount(
        self,
        mountpoint: str,
        *,
        ns: int = 10,
        id: int | None = None,  # noqa: A002
        parent: int | None = None,
        fstype: str = "tmpfs",
        fstype_code: int | None = None,
        fsname: str | None = None,
        device: tuple[int, int] = (0, 66),
        root: str = "/",
        source: str = "tmpfs",
        options: str = "",
        flags: int = 0x200000,
        sb_flags: int | None = 0,
        shared: int | None = None,
        master: int | None = None,
        ext_mount: bool | None = None,
        ext_key: str | None = None,
        deleted: bool | None = None,
    ) -> int:
        """A mount of namespace `ns`; its parent is the deepest mount above it so far."""
        mnt_id = next(self._mnt_ids) if id is None else id
        if parent is None:
            above = self._mount_of(mountpoint, ns)
            parent = 1 if above is None else above.id
        self._mounts.append(_Mount(mnt_id, ns, mountpoint))
        self._mount_records.setdefault(ns, []).append(
            record(
                message(
                    (1, FSTYPES[fstype] if fstype_code is None else fstype_code),
                    (2, mnt_id),
                    (3, device[0] << 20 | device[1]),
                    (4, parent),
                    (5, flags),
                    (6, root),
                    (7, mountpoint),
                    (8, source),
                    (9, options),
                    (10, shared),
                    (11, master),
                    (13, ext_mount),
                    (14, fsname),
                    (16, deleted),
                    (17, sb_flags),
                    (18, ext_key),
                )
            )
        )
        return mnt_id

    def task(
        self,
        pid: int = 1,
        *,
        ns: int | None = 10,
        parent: int | None = None,
        files_id: int | None = None,
        zombie: bool = False,
        threads: Sequence[int] = (),
        mm: bool = True,
        fs: bool = True,
    ) -> int:
        """A task, child of the first one; a mount namespace without mounts gets a root."""
        if parent is None:
            parent = self._tasks[0].pid if self._tasks else 0
        if not self.own_mounts:
            ns = 1
        elif ns is not None and not zombie and ns not in self._mount_records:
            self.mount("/", ns=ns)
        number = files_id if files_id is not None else 100 + pid
        task = _Task(pid, parent, ns, number, zombie, threads, mm, fs, 0, 0, 0)
        if not zombie:
            task.cwd = self.reg("/", ns=ns, flags=0, mode=0o40755)
            task.root = self.reg("/", ns=ns, flags=0, mode=0o40755)
            task.exe = self.reg("/bin/task", ns=ns, flags=0, mode=0o100755, size=4096)
        self._tasks.append(task)
        return pid

    def _mount_of(self, name: str, ns: int | None) -> _Mount | None:
        best = None
        for mount in self._mounts:
            prefix = mount.mountpoint.rstrip("/") + "/"
            if mount.ns != ns or not (name + "/").startswith(prefix):
                continue
            if best is None or len(mount.mountpoint) >= len(best.mountpoint):
                best = mount
        return best

    def _task(self, pid: int) -> _Task:
        return next(task for task in self._tasks if task.pid == pid)

    # files

    def reg(
        self,
        name: str | bytes,
        *,
        ns: int | None = 10,
        id: int | None = None,  # noqa: A002
        mnt_id: int | None = None,
        flags: int = O_RDONLY,
        pos: int = 0,
        mode: int | None = 0o100644,
        size: int | None = None,
        ext: bool | None = None,
        with_mount: bool = True,
    ) -> int:
        """A reg file; its mount is the deepest one above `name` in `ns` unless `mnt_id` says."""
        reg = next(self._ids) if id is None else id
        if mnt_id is None and with_mount and self.own_mounts:
            text = name if isinstance(name, str) else name.decode(errors="replace")
            mount = self._mount_of(text, ns)
            mnt_id = mount.id if mount else None
        inner = message(
            (1, reg),
            (2, flags),
            (3, pos),
            (5, message((1, 0), (2, 0), (3, 0), (4, 0), (5, 0))),
            (6, name),
            (7, None if mnt_id is None else zigzag(mnt_id)),
            (8, size),
            (9, ext),
            (10, mode),
        )
        self.file(REG, reg, (3, inner))
        return reg

    def file(self, kind: int, file_id: int, *details: tuple[int, bytes]) -> int:
        """A file_entry with the sub-messages `details`."""
        self._files.append(record(message((1, kind), (2, file_id), *details)))
        return file_id

    def fd(
        self, pid: int, fd: int, file_id: int, *, kind: int = REG, cloexec: bool = False
    ) -> None:
        """A row of the task's fdinfo; the same `file_id` again is a dup."""
        rows = self._fdinfo.setdefault(self._task(pid).files_id, [])
        rows.append(record(message((1, file_id), (2, int(cloexec)), (3, kind), (4, fd))))

    def open(
        self,
        pid: int,
        fd: int,
        name: str,
        *,
        ghost: int | None = None,
        mnt_id: int | None = None,
        flags: int = O_RDONLY,
        pos: int = 0,
        mode: int | None = None,
        size: int | None = None,
        cloexec: bool = False,
    ) -> int:
        """An open file of a task; with `ghost` one that was removed (size and mode follow it)."""
        if ghost is not None:
            known = self._ghosts[ghost]
            mode = known.mode if mode is None else mode
            size = known.size if size is None else size
        reg = self.reg(
            name,
            ns=self._task(pid).ns,
            mnt_id=mnt_id,
            flags=flags,
            pos=pos,
            mode=0o100644 if mode is None else mode,
            size=size,
        )
        self.fd(pid, fd, reg, cloexec=cloexec)
        if ghost is not None:
            self.remap(reg, ghost)
        return reg

    def open_fifo(
        self,
        pid: int,
        fd: int,
        name: str,
        *,
        ghost: int | None = None,
        pipe: int = 77,
        flags: int = O_RDWR,
    ) -> int:
        """An open fifo: a satellite reg file and the fifo itself; returns the reg id."""
        mode = 0o10644 if ghost is None else self._ghosts[ghost].mode
        reg = self.reg(name, ns=self._task(pid).ns, flags=flags, mode=mode)
        fifo = next(self._ids)
        self.file(FIFO, fifo, (17, message((1, fifo), (2, pipe), (3, reg))))
        self.fd(pid, fd, fifo, kind=FIFO)
        if ghost is not None:
            self.remap(reg, ghost)
        return reg

    def socket(
        self,
        pid: int,
        fd: int,
        name: bytes,
        *,
        id: int | None = None,  # noqa: A002
        deleted: bool | None = True,
        type: int = 1,  # noqa: A002
        state: int = 7,
        flags: int = 2,
        kind: int = 0,
        backlog: int = 0,
        peer: int = 0,
        shutdown: int | None = None,
        perms: tuple[int, int, int] | None = None,
        directory: bytes | None = None,
        buffers: tuple[int, int] = (212992, 212992),
        limits: tuple[int, int, int, int] = (0, 0, 0, 0),
        passcred: bool | None = None,
        cloexec: bool = False,
    ) -> int:
        """A bound UNIX socket; state 7 is unconnected, 10 listening, 1 connected.

        `perms` are mode, uid and gid; `limits` seconds and microseconds for sending and receiving.
        """
        sock = next(self._ids) if id is None else id
        sizes = [(number, size) for number, size in enumerate(buffers, 1)]
        times = [(number, time) for number, time in enumerate(limits, 3)]
        opts = message(*sizes, *times, (11, passcred))
        fown = message((1, 0), (2, 0), (3, 0), (4, 0), (5, 0))
        inner = message(
            *((1, sock), (2, 9000 + sock), (3, type), (4, state), (5, flags), (6, kind)),
            *((7, backlog), (8, peer), (9, fown), (10, opts), (11, name), (12, shutdown)),
            (13, None if perms is None else message(*enumerate(perms, 1))),
            *((14, directory), (15, deleted)),
        )
        self.file(UNIXSK, sock, (16, inner))
        self.fd(pid, fd, sock, kind=UNIXSK, cloexec=cloexec)
        return sock

    def fifo_data(self, pipe: int, data: bytes, *, size: int | None = None) -> None:
        """Bytes that a fifo held, and how many it could hold."""
        self._fifo_data.append(record(message((1, pipe), (2, len(data)), (3, size)), data))

    def map(
        self,
        pid: int,
        start: int,
        end: int,
        reg: int,
        *,
        status: int = 0x41,
        prot: int = 1,
        flags: int = 2,
        fdflags: int | None = None,
    ) -> None:
        """A mapping of a file; status 0x41, and flags 2, is a private one."""
        vma = message(
            (1, start),
            (2, end),
            (3, 0),
            (4, reg),
            (5, prot),
            (6, flags),
            (7, status),
            (8, zigzag(-1)),
            (10, fdflags),
        )
        self._task(pid).vmas.append(vma)

    def cwd(self, pid: int, reg: int) -> None:
        """Make `reg` the working directory of the task."""
        self._task(pid).cwd = reg

    def root(self, pid: int, reg: int) -> None:
        """Make `reg` the root directory of the task."""
        self._task(pid).root = reg

    def exe(self, pid: int, reg: int) -> None:
        """Make `reg` the program that the task executes."""
        self._task(pid).exe = reg

    # ghosts and remaps

    def ghost(
        self,
        content: bytes = b"",
        *,
        chunks: Iterable[tuple[int, bytes]] | None = None,
        size: int | None = None,
        id: int | None = None,  # noqa: A002
        mode: int = 0o100644,
        uid: int = 0,
        gid: int = 0,
        atime: int | None = 1_600_000_000_000_001,
        mtime: int | None = 1_500_000_000_000_002,
        rdev: int | None = None,
        target: str | bytes | None = None,
    ) -> int:
        """A ghost image: raw `content`, or `chunks` of (offset, data) and a logical `size`.

        Times are microseconds since 1970.
        """
        ghost = next(self._ghost_ids) if id is None else id
        entry = message(
            (1, uid),
            (2, gid),
            (3, mode),
            (4, 66),
            (5, 1000 + ghost),
            (6, rdev),
            (7, timeval(atime)),
            (8, timeval(mtime)),
            (9, None if chunks is None else True),
            (10, size),
            (11, target),
        )
        parts = [record(entry, b"" if chunks is not None else content)]
        for offset, data in chunks or ():
            parts.append(record(message((1, len(data)), (2, offset)), data))
        regular = mode & 0o170000 == 0o100000
        logical = (size if chunks is not None else len(content)) if regular else None
        self._ghosts[ghost] = _Ghost(mode, logical, parts)
        return ghost

    def remap(self, origin: int, target: int, kind: int | None = GHOST) -> None:
        """A record of remap-fpath.img; `kind` None leaves the type out, as CRIU 1.3 did."""
        self._remaps.append(record(message((1, origin), (2, target), (3, kind))))

    def link(self, origin: int, directory: str) -> int:
        """A link remap: the hidden name that a dump gives a file which has lost its own."""
        reg = next(self._ids)
        name = f"{directory.rstrip('/')}/link_remap.{reg}"
        self.reg(name, id=reg, flags=0, mode=None, with_mount=False)
        self.remap(origin, reg, LINKED)
        return reg

    # output

    def _task_ids(self, task: _Task, files_id: int) -> bytes:
        user = 2 if self.own_user_namespace else 1
        return message(
            (1, task.pid), (2, files_id), (3, task.pid), (4, task.pid), (9, task.ns), (10, user)
        )

    def images(self) -> Images:
        """Every image as a list of framed records (with what follows them), heads excluded."""
        host = message((1, 1), (2, 1), (3, 1), (4, 1), (9, 1), (10, 1))
        images: Images = {
            "inventory.img": [record(message((1, self.version), (2, True), (3, host), (4, True)))],
            "pstree.img": [],
            "files.img": list(self._files),
        }
        for task in self._tasks:
            threads = [(5, thread) for thread in (task.pid, *task.threads)]
            images["pstree.img"].append(
                record(message((1, task.pid), (2, task.parent), (3, 1), (4, 1), *threads))
            )
            state = message((1, ZOMBIE if task.zombie else ALIVE), (2, 0), (6, "task"))
            images[f"core-{task.pid}.img"] = [record(message((1, 1), (3, state)))]
            for thread in task.threads:
                images[f"core-{thread}.img"] = [record(message((1, 1)))]
            if task.zombie:
                continue
            images[f"ids-{task.pid}.img"] = [record(self._task_ids(task, task.files_id))]
            if task.with_fs:
                fs = message((1, task.cwd), (2, task.root), (3, 0o22))
                images[f"fs-{task.pid}.img"] = [record(fs)]
            if task.with_mm:
                vmas = [(14, vma) for vma in task.vmas]
                images[f"mm-{task.pid}.img"] = [record(message((1, 0), (12, task.exe), *vmas))]
        for files_id, rows in self._fdinfo.items():
            images[f"fdinfo-{files_id}.img"] = list(rows)
        if self.own_mounts:
            for ns, mounts in self._mount_records.items():
                images[f"mountpoints-{ns}.img"] = mounts[::-1]  # CRIU writes children first
        if self._remaps:
            images["remap-fpath.img"] = list(self._remaps)
        if self._fifo_data:
            images["fifo-data.img"] = list(self._fifo_data)
        for ghost_id, ghost in self._ghosts.items():
            images[f"ghost-file-{ghost_id:x}.img"] = list(ghost.parts)
        return images

    def write(self, directory: Path, images: Images | None = None) -> Path:
        """Write `images` (all of them if None) into `directory`, which is made if missing."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, records in (self.images() if images is None else images).items():
            data = head(name, version=self.version) + b"".join(records)
            (directory / name).write_bytes(data)
        return directory


def small() -> ImageSet:
    """One task, a read-only mount, one ghost that it holds as descriptor 3."""
    made = ImageSet()
    made.mount("/", ns=10, id=500)
    made.mount("/data", ns=10, id=501, flags=0x200001)
    made.task(1, ns=10)
    made.open(1, 3, "/data/gone", ghost=made.ghost(b"content", uid=7))
    made.open(1, 4, "/data/there")
    return made


def ghosts_on(mountpoint: str, names: Iterable[str], content: bytes, first: int = 3) -> ImageSet:
    """One task, a read-only mount, ghosts of `names` on it as its descriptors from `first` on."""
    made = ImageSet()
    made.mount("/")
    made.mount(mountpoint, flags=0x200001)
    made.task(1)
    for number, name in enumerate(names, first):
        made.open(1, number, f"{mountpoint}/{name}", ghost=made.ghost(content))
    return made
