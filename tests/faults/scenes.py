"""Small restores that between them come to every step: images, targets, and how these were.

A scene lives in namespaces of its own; a keeper process stays in each of them, as a container's
would, and tells how everything in it is: mount table, every file, and what the superblocks count,
which shows an unlinked file that somebody still holds.
"""

from __future__ import annotations

import hashlib
import marshal
import os
import signal
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ghostpool import _linux
from ghostpool._buildspec import MountSpec, NamespaceSpec, Node
from ghostpool._linux import Attr
from ghostpool._planned import Overmounts, Strategy
from ghostpool.testing import Namespace
from ghostpool.testing._forked import fork
from ghostpool.testing._namespace import enter
from ghostpool.testing._targets import built
from tests.support.imagewriter import LINKED, ImageSet
from tests.support.live import host_programs
from tests.support.usernamespaces import copied

RO = int(Attr.RDONLY)
MS_RO = 0x200001
O_DIRECTORY, O_PATH, O_NOFOLLOW = 0o300000, 0o12000000, 0o500000
_ROOT = MountSpec(1, 0, b"/", 1, "tmpfs", "root", "size=1m,mode=755")

SHARED = 5000
"""From this number on, superblocks are the same in all namespaces of a scene."""

Seen = tuple[bytes, dict[str, tuple[Any, ...]]]
"""The mount table, and all files by path."""


class Definition(NamedTuple):
    """What makes a scene."""

    name: str
    images: Callable[[], ImageSet]
    mounts: tuple[tuple[MountSpec, ...], ...]
    """Of the target of each mount namespace of the images, from number 10 on; the root included."""
    keep: bool = False
    mount_setattr: bool = True
    strategy: Strategy = "remount"
    overmounted: Overmounts = "refuse"
    cover: bytes = b""
    """Each keeper goes to this mount point, and then covers it."""
    discard: bool = False
    """The files are for nobody: workers close them."""
    command: tuple[str, ...] = ()
    rebuilt: bool = False
    """The targets are made by the run itself; those here are not used."""
    copied: bool = False
    """One more target is a copy of the last one's mounts, in a user namespace: their flags are
    locked there."""


def _mount(number: int, point: str, *nodes: Node, **fields: Any) -> MountSpec:
    spec = MountSpec(number, 1, point.encode(), number, "tmpfs", f"m{number}", "size=1m", b"/", RO)
    return spec._replace(nodes=nodes, **fields)


def _file(path: str) -> Node:
    return Node(path.encode(), stat.S_IFREG | 0o600, data=b"somebody else's")


def _all_kinds() -> ImageSet:
    """Every kind of ghost and of place, in two namespaces."""
    made = ImageSet()
    for number in (10, 11):
        made.mount("/", ns=number)
        made.mount("/data", ns=number, flags=MS_RO)
    made.task(1, ns=10)
    made.task(2, ns=11)
    holes = made.ghost(chunks=[(4096, b"x" * 100), (12288, b"y")], size=20000)
    made.open(1, 3, "/data/holes", ghost=holes, pos=4100)
    made.open(1, 4, "/data/gone/deep/plain", ghost=made.ghost(b"content", uid=7), flags=O_NOFOLLOW)
    made.open(1, 5, "/data/taken", ghost=made.ghost(b"ghost"))
    made.open_fifo(1, 6, "/data/pipe", ghost=made.ghost(mode=0o10640))
    made.fifo_data(77, b"waiting", size=131072)
    owner = (0o140640, 7, 8)
    made.socket(1, 8, b"/data/sock", perms=owner, state=10, backlog=5, buffers=(8192, 8192))
    made.socket(1, 9, b"../data/sock", type=2, limits=(1, 0, 0, 0), passcred=True, shutdown=1)
    link = made.ghost(mode=0o120777, target="away")
    made.open(1, 7, "/data/link", ghost=link, flags=O_PATH | 0o400000)
    directory = made.ghost(mode=0o40750)
    made.open(2, 3, "/data/lost/dir", ghost=directory, flags=O_DIRECTORY)
    again = made.ghost(mode=0o40700)
    made.open(2, 6, "/data/lost/dir", ghost=again, flags=O_DIRECTORY)
    made.open(2, 4, "/data/lost/dir/inner", ghost=made.ghost(b"inside"))
    made.open(2, 5, "/data/there", ghost=made.ghost(b"again"))
    return made


def _one_mount() -> ImageSet:
    made = ImageSet()
    made.mount("/", ns=10)
    made.mount("/data", ns=10, flags=MS_RO)
    made.task(1, ns=10)
    made.open(1, 3, "/data/gone/plain", ghost=made.ghost(b"content"))
    made.open(1, 4, "/data/dir", ghost=made.ghost(mode=0o40750), flags=O_DIRECTORY)
    return made


def _hidden() -> ImageSet:
    """Ghosts on the lower of two mounts on one mount point."""
    made = ImageSet()
    made.mount("/", ns=10)
    made.mount("/data", ns=10, flags=MS_RO, id=700)
    made.mount("/data", ns=10, device=(0, 67), parent=700)
    made.task(1, ns=10)
    made.open(1, 3, "/data/gone/plain", ghost=made.ghost(b"content"), mnt_id=700)
    directory = made.ghost(mode=0o40750)
    made.open(1, 4, "/data/dir", ghost=directory, flags=O_DIRECTORY, mnt_id=700)
    return made


def _kept() -> ImageSet:
    made = _one_mount()
    made.open(1, 5, "/data/taken", ghost=made.ghost(b"ghost"))
    again = made.ghost(b"twice")
    made.open(1, 6, "/data/twice", ghost=again)
    made.open(1, 7, "/data/twice", ghost=again)
    return made


def _locked() -> ImageSet:
    made = ImageSet(own_user_namespace=True)
    for number in (10, 11):
        made.mount("/", ns=number)
        made.mount("/data", ns=number, flags=MS_RO)
    made.task(1, ns=10)
    made.task(2, ns=11)
    made.open(2, 3, "/data/gone/plain", ghost=made.ghost(b"content", uid=7))
    made.open(2, 4, "/data/dir", ghost=made.ghost(mode=0o40750), flags=O_DIRECTORY)
    return made


def _rebuilt() -> ImageSet:
    made = ImageSet()
    made.mount("/", ns=10)
    made.mount("/data", ns=10, flags=MS_RO, device=(0, 67))
    made.task(1, ns=10)
    made.open(1, 3, "/data/gone/plain", ghost=made.ghost(b"content"))
    return made


def _link_remap() -> ImageSet:
    made = ImageSet()
    made.mount("/", ns=10)
    made.mount("/data", ns=10, flags=MS_RO)
    made.task(1, ns=10)
    reg = made.open(1, 3, "/data/gone/linked")
    made.reg("/data/link_remap.90", id=90, flags=0, mode=None, with_mount=False)
    made.remap(reg, 90, LINKED)
    return made


def definitions() -> list[Definition]:
    """All scenes; the first one that comes to a step is where its faults are tried."""
    data = _mount(2, "/data", _file("/data/taken"))
    other = _mount(2, "/data", _file("/data/own"))
    hidden = _mount(2, "/data", _file("/data/link_remap.90")._replace(mode=stat.S_IFREG | 0o644))
    # What is hidden can be seen there, too.
    again = _mount(3, "/again", superblock=2)
    cover = _mount(4, "/data", parent=2, attributes=0)
    links, programs = host_programs(10)
    root = _ROOT._replace(nodes=links)
    return [
        Definition("kinds", _all_kinds, ((_ROOT, data), (_ROOT, other))),
        Definition("mount(2)", _one_mount, ((_ROOT, data),), mount_setattr=False),
        Definition("detached", _one_mount, ((_ROOT, data),), strategy="detached", discard=True),
        Definition("hidden", _hidden, ((_ROOT, data, again, cover),), overmounted="private"),
        Definition("held", _hidden, ((_ROOT, data, again),), overmounted="private", cover=b"/data"),
        Definition("keep", _kept, ((_ROOT, data),), keep=True),
        Definition("command", _one_mount, ((root, data, *programs),), command=("/bin/true",)),
        Definition("link remap", _link_remap, ((_ROOT, hidden),)),
        Definition("rebuilt", _rebuilt, (), rebuilt=True),
        Definition("locked", _locked, ((_ROOT, data),), copied=True),
    ]


@dataclass
class Scene:
    """A scene that stands."""

    definition: Definition
    images: Path
    namespaces: dict[int, int]
    """Descriptors by number."""
    keepers: list[Keeper]
    before: list[Seen] = field(default_factory=list)
    kept: list[Seen] = field(default_factory=list)
    """How it is after a success with `keep`: put back by `clean`."""

    def look(self) -> list[Seen]:
        for keeper in self.keepers:
            keeper.ask(b"l")
        return [keeper.answer() for keeper in self.keepers]

    def clean(self) -> None:
        """Take away what a success has left on purpose, or a failure by mistake."""
        for keeper in self.keepers:
            keeper.ask(b"c")
        for keeper in self.keepers:
            keeper.answer()


class Keeper:
    """A process that stays in a namespace and looks at it when asked."""

    def __init__(self, namespace: int, cover: bytes) -> None:
        mine, theirs = os.pipe(), os.pipe()
        self.pid = fork()
        if self.pid == 0:
            try:
                _linux.prctl(_linux.PR_SET_PDEATHSIG, signal.SIGKILL)
                proc = os.open("/proc/self", os.O_PATH)
                enter(namespace)
                if cover:
                    os.chdir(cover)
                    _linux.mount(b"cover", cover, b"tmpfs", 0)
                _keep(proc, theirs[0], mine[1])
            finally:
                os._exit(1)
        os.close(mine[1])
        os.close(theirs[0])
        self._from, self._to = mine[0], theirs[1]

    def ask(self, what: bytes) -> None:
        os.write(self._to, what)

    def answer(self) -> Any:
        size = struct.unpack("Q", _exactly(self._from, 8))[0]
        return marshal.loads(_exactly(self._from, size))

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._from)
        os.close(self._to)


def _exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = os.read(fd, size - len(data))
        if not piece:
            raise EOFError("the keeper of a namespace has ended")
        data += piece
    return data


def _keep(proc: int, requests: int, answers: int) -> None:
    known: set[str] = set()
    while what := os.read(requests, 1):
        table = _read(proc, "mountinfo")
        files = _files(table)
        if not known:
            known = set(files)
        if what == b"c":
            _clean(table, known, files)
        data = marshal.dumps((table, files))
        os.write(answers, struct.pack("Q", len(data)))
        while data:
            data = data[os.write(answers, data) :]


def _read(proc: int, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY, dir_fd=proc)
    with open(fd, "rb") as file:
        return file.read()


def _own(table: bytes) -> list[str]:
    """Mount points of the scene's own file systems, outer ones first."""
    rows = [line.decode().split(" ") for line in table.splitlines()]
    return sorted(row[4] for row in rows if row[row.index("-") + 1] == "tmpfs")


def _files(table: bytes) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for point in _own(table):
        counts = os.statvfs(point)
        found[f"{point} (counts)"] = (counts.f_bfree, counts.f_ffree)
        _walk(found, point, os.lstat(point).st_dev)
    return found


def _walk(found: dict[str, tuple[Any, ...]], path: str, device: int) -> None:
    status = os.lstat(path)
    if status.st_dev != device:
        return
    content = ""
    # Linking sets a file's ctime: one with a link remap had another name for a moment.
    times = (status.st_mtime_ns, 0 if "/link_remap." in path else status.st_ctime_ns)
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            content = hashlib.sha256(file.read()).hexdigest()
    elif stat.S_ISDIR(status.st_mode):
        times = (0, 0)  # a name was in it for a moment
    found[path] = (
        *(status.st_mode, status.st_uid, status.st_gid, status.st_ino, status.st_nlink),
        *(status.st_size, times, content),
    )
    if stat.S_ISDIR(status.st_mode):
        for name in sorted(os.listdir(path)):
            _walk(found, os.path.join(path, name), device)


def _clean(table: bytes, known: set[str], files: dict[str, tuple[Any, ...]]) -> None:
    """Remove what was not there at first, through a private copy of the namespace."""
    extra = sorted(set(files) - known, reverse=True)
    for row in [line.decode().split(" ") for line in table.splitlines()]:
        point = row[4]
        if row[row.index("-") + 1] != "tmpfs" or point == "/":
            continue
        if not any(path.startswith(f"{point}/") for path in extra):
            continue  # its flag may be locked
        fd = os.open(point, os.O_PATH)
        clone = _linux.open_tree(fd, b"", _linux.OPEN_TREE_CLONE)
        _linux.mount_setattr(clone, attr_clr=RO)
        for path in extra:
            if path.startswith(f"{point}/"):
                inside = path[len(point) + 1 :]
                if stat.S_ISDIR(files[path][0]):
                    os.rmdir(inside, dir_fd=clone)
                else:
                    os.unlink(inside, dir_fd=clone)
        os.close(clone)
        _linux.mount_setattr(fd, attr_set=RO)
        os.close(fd)


@contextmanager
def standing(definition: Definition, directory: Path) -> Iterator[Scene]:
    """The scene, for the time of the block."""
    images = definition.images().write(directory)
    specs = [NamespaceSpec(10 + n, _apart(n, own)) for n, own in enumerate(definition.mounts)]
    with built(specs) as fds, ExitStack() as stack:
        if definition.copied:
            fds.append(stack.enter_context(copied(Namespace(0, fds[-1]))).fd)
            stack.callback(fds.pop)  # the copy's own block closes it
        keepers = []
        for fd in fds:
            keepers.append(Keeper(fd, definition.cover))
            stack.callback(keepers[-1].end)
        scene = Scene(definition, images, {10 + n: fd for n, fd in enumerate(fds)}, keepers)
        scene.before = scene.look()
        yield scene


def _apart(number: int, mounts: Sequence[MountSpec]) -> tuple[MountSpec, ...]:
    """With ids of their own in every namespace."""
    base = 1000 * number
    return tuple(
        mount._replace(
            id=base + mount.id,
            parent=base + mount.parent if mount.parent else 0,
            superblock=mount.superblock + (base if mount.superblock < SHARED else 0),
        )
        for mount in mounts
    )
