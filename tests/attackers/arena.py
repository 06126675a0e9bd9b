"""A container under attack, restores into it, and what is looked at after each of them.

Nothing of ghostpool's own word is believed: the canary is a tree of the host, watched by inotify
(an inode is watched, whatever mount it is reached through) and compared as a whole; descriptors
are read; the mount's flags are asked of the kernel through a descriptor from before.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import signal
import stat
import struct
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from ghostpool import _capabilities, _linux, _run
from ghostpool._capabilities import COMMAND
from ghostpool._errors import RevertError, leaves
from ghostpool._launch import launch
from ghostpool._linux import Attr
from ghostpool._report import Report
from ghostpool._restored import Restored
from ghostpool._run import Prepared
from ghostpool.testing._forked import in_child
from tests.attackers.attacks import ATTACKS, EXTRA, MOVED, OWNER, REACHED, Attack, Place
from tests.support.imagewriter import ImageSet
from tests.support.live import process
from tests.support.restore import Live, live

LIMIT_S = 120.0
"""Seconds after which one restore hangs."""
PATIENCE_S = 20.0
_libc = ctypes.CDLL(None, use_errno=True)
_IN_ALL_EVENTS = 0xFFF
_IN_ISDIR = 0x40000000
_EVENT = struct.Struct("iIII")

# Old name, mode, content. The parents of the last one are missing.
GHOSTS: tuple[tuple[str, int, bytes], ...] = (
    ("sub/alpha", 0o100640, b"content of alpha"),
    ("sub/beta", 0o10620, b""),
    ("sub/deep/gamma", 0o100600, b"content of gamma" * 1000),
    ("sub/kappa", 0o40750, b""),
    *((f"sub/deep/m{number}", 0o100644, b"content %d" % number) for number in range(12)),
    ("gone/delta", 0o100644, b"content of delta"),
)


@dataclass
class Result:
    """What happened under one attack."""

    attack: str
    seconds: float = 0.0
    blows: int = 0
    """How often the attacker did what it does."""
    restores: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """How the restores ended: "restored", or the names of their errors."""
    delivered: int = 0
    """Descriptors of restores that succeeded; all of them were compared."""
    moved: int = 0
    """Names of ghostpool's that the attacker has given another name, inside its file system."""
    violations: list[str] = field(default_factory=list)
    """What must not happen."""

    def document(self) -> dict[str, Any]:
        return {**vars(self), "outcomes": dict(self.outcomes), "seconds": round(self.seconds, 1)}


class Canary:
    """A tree of the host where a name stands for each ghost's, and what happens to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, mode, _ in GHOSTS:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if stat.S_ISDIR(mode):
                path.mkdir()
            elif stat.S_ISFIFO(mode):
                os.mkfifo(path)
            else:
                path.write_bytes(b"canary of " + name.encode())
        self._before = self._look()
        self._inotify = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watched: dict[int, str] = {}
        for path in self._paths():
            watch = _libc.inotify_add_watch(self._inotify, os.fsencode(path), _IN_ALL_EVENTS)
            self._watched[watch] = str(path.relative_to(root))

    def _paths(self) -> list[Path]:
        return [self.root, *sorted(self.root.rglob("*"))]

    def _look(self) -> dict[str, Any]:
        found = {}
        for path in self._paths():
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            found[str(path)] = (tuple(status)[:7], status.st_mtime_ns, status.st_ctime_ns, content)
        return found

    def events(self) -> list[str]:
        """Every open, read, write, creation, removal and change of attributes since the last."""
        try:
            data = os.read(self._inotify, 1 << 16)
        except BlockingIOError:
            return []
        found = []
        at = 0
        while at < len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, at)
            name = data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0")
            at += _EVENT.size + length
            found.append(f"canary {self._watched.get(watch)}/{os.fsdecode(name)}: {mask:#x}")
        return found

    def changes(self) -> list[str]:
        """What differs from the start, content, times and attributes; to be called once."""
        after = self._look()
        paths = self._before.keys() | after.keys()
        return [
            f"canary {path}: {self._before.get(path)} is {after.get(path)}"
            for path in sorted(paths)
            if self._before.get(path) != after.get(path)
        ]

    def close(self) -> None:
        os.close(self._inotify)


class Arena:
    """A container whose file system is restored into. Made by `arena`."""

    def __init__(self, base: Path, target: Live, canary: Canary, mounts: tuple[int, int]) -> None:
        self.canary = canary
        self.namespace = target.fd
        self._target = target
        self._rw, self._mnt = mounts
        self._images = _images(base)
        self._told: list[str] = []
        """What the restores said that they had to leave."""
        names = tuple(name for name, _, _ in GHOSTS)
        self.place = Place(base / "rw", base / "mnt", canary.root, names, target.pid)

    def is_read_only(self) -> bool:
        return bool(os.fstatvfs(self._mnt).f_flag & os.ST_RDONLY)

    def mend(self) -> None:
        """What the error's command does: make the mount read-only."""

        def child() -> None:
            _linux.setns(self._target.fd, _linux.CLONE_NEWNS)
            _linux.mount_setattr(self._mnt, attr_set=int(Attr.RDONLY))

        in_child(child)

    async def restore(self, result: Result) -> None:
        """One restore; what went wrong that must not is added to the violations."""

        async def deliver(run: Prepared, restored: Restored) -> None:
            for planned in run.plan.tasks:
                for number, fd in restored.of_task(planned).items():
                    result.delivered += 1
                    result.violations += _wrong(fd, *GHOSTS[number - 3])

        report = Report()
        request = _run.Request(str(self._images), 2, tree=self._target.pid)
        result.restores += 1
        needs_user = False
        try:
            with anyio.fail_after(LIMIT_S):
                await _run.run_restore(request, launch(), report, deliver)
            result.outcomes["restored"] += 1
        except Exception as error:  # noqa: BLE001  counted; nothing is to be said of the attacker's
            found = list(leaves(error))
            result.outcomes["+".join(sorted({type(leaf).__name__ for leaf in found}))] += 1
            needs_user = any(isinstance(leaf, RevertError) for leaf in found)
        self._told += report.left
        if not self.is_read_only():
            if not needs_user:
                result.violations.append(f"the mount stayed writable after {report.status}")
            else:
                result.outcomes["left to the user"] += 1
                self._mend_at_last(result)
        result.violations += self.canary.events()

    def _mend_at_last(self, result: Result) -> None:
        end = time.monotonic() + 5
        while True:
            try:
                self.mend()
            except OSError as error:
                if time.monotonic() > end:
                    result.violations.append(f"the mount can not be mended: {error}")
                    return
                time.sleep(0.01)
            else:
                return

    def look_for_leftovers(self, result: Result) -> None:
        """Once the attacker is dead: names of ghostpool's in the whole file system."""
        told = any("/gone" in line or line.startswith("gone") for line in self._told)
        for where, status in _walk(self._rw, ""):
            name = os.path.basename(where)
            own = status.st_uid == OWNER
            if name == REACHED:
                result.violations.append("processes of ghostpool's were reached")
            if name.startswith(MOVED):
                result.moved += 1
            elif not own and name.startswith(".ghostpool-"):
                result.violations.append(f"left behind: {where}: {status}")
            elif not own and where in self.place.names:
                result.violations.append(f"left behind at its old name: {where}: {status}")
            elif not own and where == "gone" and not told:
                result.violations.append("the parent of an old name was left without a word")


def _walk(directory: int, above: str) -> Iterator[tuple[str, os.stat_result]]:
    """Every name below, and no symbolic link followed: it may lead to the canary.

    Nor into what an attacker has mounted: it is not of this file system.
    """
    device = os.fstat(directory).st_dev
    for name in os.listdir(directory):
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        yield above + name, status
        if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            below = os.open(name, flags, dir_fd=directory)
            try:
                yield from _walk(below, f"{above}{name}/")
            finally:
                os.close(below)


def _wrong(fd: int, name: str, mode: int, content: bytes) -> list[str]:
    status = os.fstat(fd)
    if status.st_mode != mode or status.st_uid != 7:
        return [f"descriptor of {name} is of another file: {status}"]
    if stat.S_ISREG(mode) and os.pread(fd, len(content) + 1, 0) != content:
        return [f"descriptor of {name} has another content"]
    return []


def _images(base: Path) -> Path:
    images = ImageSet()
    images.mount("/", device=(0, 60))
    images.mount(f"{base}/mnt", device=(0, 70), flags=0x200001)
    images.task(1)
    for number, (name, mode, content) in enumerate(GHOSTS, 3):
        ghost = images.ghost(content, mode=mode, uid=7, gid=8)
        images.open(1, number, f"{base}/mnt/{name}", ghost=ghost)
    return images.write(base / "images")


def _setup(base: Path) -> None:
    """In the container: one small file system, writable at `rw`, read-only at `mnt`."""
    context = _linux.fsopen(b"tmpfs")
    for key, value in ((b"size", b"8m"), (b"nr_inodes", b"500"), (b"mode", b"755")):
        _linux.fsconfig(context, _linux.FSCONFIG_SET_STRING, key, value)
    _linux.fsconfig(context, _linux.FSCONFIG_CMD_CREATE)
    mount = _linux.fsmount(context)
    _linux.move_mount(mount, _linux.AT_FDCWD, os.fsencode(base / "rw"))
    (base / "rw/sub/deep").mkdir(parents=True)
    _linux.mount(os.fsencode(base / "rw"), os.fsencode(base / "mnt"), None, _linux.MS_BIND)
    fd = os.open(base / "mnt", os.O_PATH)
    _linux.mount_setattr(fd, attr_set=int(Attr.RDONLY))
    for one in (context, mount, fd):
        os.close(one)


@contextmanager
def arena() -> Iterator[Arena]:
    """A container and a canary, gone at the end."""
    base = Path(tempfile.mkdtemp(prefix="ghostpool-attackers-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, base)
        for name in ("rw", "mnt", "canary"):
            (base / name).mkdir()
        canary = Canary(base / "canary")
        stack.callback(canary.close)
        target = stack.enter_context(live(lambda: _setup(base)))
        mounts = []
        for name in ("rw", "mnt"):
            path = f"/proc/{target.pid}/root{base}/{name}"
            mounts.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            stack.callback(os.close, mounts[-1])
        # A process that its container has stopped would not see its end.
        stack.callback(os.kill, target.pid, signal.SIGCONT)
        yield Arena(base, target, canary, (mounts[0], mounts[1]))


@contextmanager
def attacker(attack: Attack, extra: int, place: Place, namespace: int) -> Iterator[mmap.mmap]:
    """The attack in a process of its own; its count of blows as eight bytes."""
    count = mmap.mmap(-1, 8)

    def tick() -> None:
        (blows,) = struct.unpack("Q", count[:])
        count[:] = struct.pack("Q", blows + 1)

    def body(ready: Any) -> None:
        try:
            _linux.setns(namespace, _linux.CLONE_NEWNS)
            _capabilities.become_command(COMMAND | extra)
            os.setpgid(0, 0)
            ready()
            attack(place, tick)
        except BaseException:
            traceback.print_exc()  # a dead attacker must be seen
            raise

    with process(body) as pid:
        try:
            yield count
        finally:
            os.killpg(pid, signal.SIGKILL)


def run(name: str, seconds: float) -> Result:
    """One attack, for that long, on as many restores as there is time for."""
    result = Result(name)
    begun = time.monotonic()
    with arena() as ground:
        place, namespace = ground.place, ground.namespace
        with attacker(ATTACKS[name], EXTRA.get(name, 0), place, namespace) as count:
            elapsed = 0.0
            # Some attacks wait for their moment: one blow at least, if it comes in time.
            while elapsed < seconds or (not result.blows and elapsed < seconds + PATIENCE_S):
                anyio.run(ground.restore, result, backend="trio")
                (result.blows,) = struct.unpack("Q", count[:])
                if result.violations:
                    break
                elapsed = time.monotonic() - begun
        ground.look_for_leftovers(result)
        result.violations += ground.canary.events()
        result.violations += ground.canary.changes()
    result.seconds = time.monotonic() - begun
    return result
