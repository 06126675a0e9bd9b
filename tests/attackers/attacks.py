"""What a hostile container does, each as a function that never ends by itself.

An attack runs as root of the container, with the capabilities that runtimes give by default (and
those that `EXTRA` says), in its mount namespace. It works through `rw`, a writable bind of the
file system whose read-only mount `mnt` is restored into. Files of its own have the owner OWNER.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import random
import select
import signal
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ghostpool import _linux
from ghostpool._capabilities import WORKER, Cap

OWNER = 4242
EXCHANGE = 2  # RENAME_EXCHANGE
REACHED = "reached"
"""File in which an attack says what it should not have got."""
MOVED = ".moved-"
"""How names begin that an attack has given to files of ghostpool."""
_libc = ctypes.CDLL(None, use_errno=True)
_IN_CREATE = 0x100
_IN_MOVED_TO = 0x80
_EVENT = struct.Struct("iIII")


@dataclass(frozen=True)
class Place:
    """What an attack knows of its container."""

    rw: Path
    mnt: Path
    canary: Path
    """A tree of the host that it sees but that no mount of it leads to."""
    names: tuple[str, ...]
    """Old names of the ghosts, relative to the mount."""
    first: int
    """The first process of the container."""


Tick = Callable[[], None]
"""To be called after each blow."""
Attack = Callable[[Place, Tick], None]


def _own(path: Path) -> Path:
    os.chown(path, OWNER, OWNER, follow_symlinks=False)
    return path


def _exchange(one: Path, other: Path) -> None:
    here = _linux.AT_FDCWD
    _linux.renameat2(here, os.fsencode(one), here, os.fsencode(other), EXCHANGE)


def swap_parent(place: Place, tick: Tick) -> None:
    """The parents of the old names are symlinks to the host's tree every other moment."""
    links = {}
    for name in ("sub", "sub/deep"):
        link = links[name] = place.rw / f".link-{name.replace('/', '-')}"
        link.symlink_to(place.canary / name)
        _own(link)
    gone = place.rw / "gone"
    for turn in itertools.count():
        with suppress(OSError):
            _exchange(place.rw / "sub", links["sub"])
        if turn % 3 == 0:
            with suppress(OSError):
                _exchange(place.rw / "sub/deep", links["sub/deep"])
        with suppress(OSError):
            if turn % 2:
                gone.symlink_to(place.canary / "gone")
                _own(gone)
            else:
                gone.unlink()
        tick()
        if not (place.rw / "sub").is_symlink():
            # Restores that never get as far as their opens would show little.
            if gone.is_symlink():
                gone.unlink()
            time.sleep(random.choice((0.0, 0.0, 0.0, 0.0005, 0.005, 0.03)))


def _decoys(place: Place) -> Iterator[Callable[[Path, str], None]]:
    def link(path: Path, name: str) -> None:
        path.symlink_to(place.canary / name)

    def hard(path: Path, name: str) -> None:
        os.link(place.rw / "own", path)

    def file(path: Path, name: str) -> None:
        path.write_bytes(b"of the attacker")

    yield from (link, hard, file)
    yield lambda path, name: os.mkfifo(path)
    yield lambda path, name: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    yield lambda path, name: path.mkdir()


def replace_names(place: Place, tick: Tick) -> None:
    """Other files take the old names, between link and open if it happens so."""
    (place.rw / "own").write_bytes(b"own")
    decoys = list(_decoys(place))
    for turn in itertools.count():
        name = random.choice(place.names)
        decoy = place.rw / f".decoy-{turn % 8}"
        target = place.rw / name
        with suppress(OSError):
            random.choice(decoys)(decoy, name)
            _own(decoy)
            with suppress(OSError):
                os.rename(decoy, target)
        _remove_own(decoy)
        _remove_own(target)
        tick()


def _remove_own(path: Path) -> None:
    with suppress(OSError):
        status = path.lstat()
        if status.st_uid == OWNER:
            path.rmdir() if stat.S_ISDIR(status.st_mode) else path.unlink()


def mount_over(place: Place, tick: Tick) -> None:
    """Other mounts cover the parents and the mount itself, the host's tree and /proc among them."""
    points = [place.mnt / "sub", place.mnt, place.mnt / "sub/deep", place.rw / "sub"]
    for turn in itertools.count():
        point = os.fsencode(points[turn % len(points)])
        with suppress(OSError):
            if turn % 3 == 0:
                _linux.mount(b"over", point, b"tmpfs", 0)
            elif turn % 3 == 1:
                _linux.mount(os.fsencode(place.canary / "sub"), point, None, _linux.MS_BIND)
            else:
                _linux.mount(b"/proc", point, None, _linux.MS_BIND | _linux.MS_REC)
            tick()
            time.sleep(random.choice((0, 0.0005, 0.003)))
            _linux.umount2(point, _linux.MNT_DETACH)
        time.sleep(random.choice((0, 0.001, 0.01)))


def fill_disk(place: Place, tick: Tick) -> None:
    """No block is free, most of the time."""
    path = place.rw / "full"
    block = bytes(1 << 16)
    while True:
        with suppress(OSError), open(path, "wb", buffering=0) as file:
            _own(path)
            with suppress(OSError):
                while True:
                    file.write(block)
            tick()
            time.sleep(random.choice((0.0, 0.01, 0.05)))
        os.truncate(path, 0)
        time.sleep(random.choice((0.0, 0.01, 0.1)))


def exhaust_inodes(place: Place, tick: Tick) -> None:
    """No inode is free, most of the time."""
    directory = place.rw / "inodes"
    directory.mkdir(exist_ok=True)
    while True:
        made = []
        with suppress(OSError):
            for number in itertools.count():
                path = directory / str(number)
                path.touch()
                made.append(path)
        tick()
        time.sleep(random.choice((0.0, 0.01, 0.05)))
        for path in made[random.choice((0, len(made) // 2)) :]:
            path.unlink()
        for path in directory.iterdir():
            path.unlink()
        time.sleep(random.choice((0.0, 0.01)))


def hold_busy(place: Place, tick: Tick) -> None:
    """As soon as the mount is writable, a file of it is open for writing, or mapped."""
    path = place.mnt / "held"
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            if error.errno != errno.EROFS:
                time.sleep(0.001)
            continue
        os.ftruncate(fd, 4096)
        mapped = mmap.mmap(fd, 4096)
        os.close(fd)
        tick()
        # The last one is longer than a revert waits.
        time.sleep(random.choice((0.001, 0.01, 0.02, 0.05, 0.1, 0.5, 3.0)))
        mapped.close()
        while not os.statvfs(place.mnt).f_flag & os.ST_RDONLY:
            time.sleep(0.001)


def stop(place: Place, tick: Tick) -> None:
    """The container's processes stop and end, files of the mount open."""
    while True:
        with suppress(OSError):
            os.kill(place.first, signal.SIGSTOP)
        pid = os.fork()
        if pid == 0:
            with suppress(OSError):
                os.chdir(place.mnt / "sub")
                os.open(".", os.O_RDONLY)
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        time.sleep(random.choice((0.0, 0.002)))
        os.kill(pid, random.choice((signal.SIGKILL, signal.SIGCONT)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        tick()


def rename_temporaries(place: Place, tick: Tick) -> None:
    """Whatever ghostpool makes under a name of its own is elsewhere a moment later."""
    number = itertools.count()
    away = place.rw / "away"
    away.mkdir(exist_ok=True)
    while True:
        for directory in (place.rw / "sub", place.rw / "sub/deep", place.rw):
            with suppress(OSError):
                for name in os.listdir(directory):
                    if name.startswith(".ghostpool-") and random.random() < 0.2:
                        moved = away / f"{MOVED}{next(number)}"
                        with suppress(OSError):
                            os.rename(directory / name, moved)
                            tick()
        time.sleep(random.choice((0.0, 0.0005, 0.02)))


def change_permissions(place: Place, tick: Tick) -> None:
    """Modes, owners and default ACLs of the directories change all the time."""
    # struct posix_acl_xattr_header, then entries of tag, permissions, id.
    entries = ((0x01, 7, -1), (0x02, 7, 1000), (0x04, 0, -1), (0x10, 7, -1), (0x20, 0, -1))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    directories = [place.rw, place.rw / "sub", place.rw / "sub/deep"]
    for turn in itertools.count():
        directory = directories[turn % 3]
        with suppress(OSError):
            os.chmod(directory, random.choice((0, 0o500, 0o755, 0o1777, 0o2775, 0o6777)))
            os.chown(directory, random.choice((0, 1000)), random.choice((0, 1000)))
        with suppress(OSError):
            if turn % 2:
                os.setxattr(directory, "system.posix_acl_default", acl)
            else:
                os.removexattr(directory, "system.posix_acl_default")
        tick()
        time.sleep(random.choice((0.0, 0.0002)))


def react(place: Place, tick: Tick) -> None:
    """Waits for names to appear, and puts something else in their place at once."""
    inotify = _libc.inotify_init1(0)
    watched = {}
    for name in ("", "sub", "sub/deep"):
        directory = os.fsencode(place.rw / name)
        watched[_libc.inotify_add_watch(inotify, directory, _IN_CREATE | _IN_MOVED_TO)] = name
    decoys = list(_decoys(place))
    (place.rw / "own").write_bytes(b"own")
    away = place.rw / "away"
    away.mkdir(exist_ok=True)
    number = itertools.count()
    put: list[Path] = []
    while True:
        if not select.select([inotify], [], [], 0.01)[0]:
            for path in put:
                _remove_own(path)
            put.clear()
            continue
        data = os.read(inotify, 1 << 16)
        at = 0
        while at < len(data):
            watch, _, _, length = _EVENT.unpack_from(data, at)
            name = os.fsdecode(data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0"))
            at += _EVENT.size + length
            path = place.rw / watched.get(watch, "") / name
            # Not every one: a restore that fails at its first file shows little.
            if not _is_of_ghosts(place, path) or random.random() < 0.9:
                continue
            with suppress(OSError):
                os.rename(path, away / f"{MOVED}{next(number)}")
                random.choice(decoys)(path, "sub/alpha")
                put.append(_own(path))
                tick()


def _is_of_ghosts(place: Place, path: Path) -> bool:
    if path.name.startswith(".ghostpool-"):
        return True
    return str(path.relative_to(place.rw)) in place.names


def reach_for_processes(place: Place, tick: Tick) -> None:
    """Executable, descriptors and memory of ghostpool's processes, in the pid namespace that the
    container shares with them; what can be opened is named in a file."""
    own = {os.getpid(), place.first, os.getppid()}
    while True:
        for name in os.listdir("/proc"):
            if not name.isdecimal() or int(name) in own:
                continue
            process = Path("/proc", name)
            try:
                ours = b"_forkserver" in (process / "cmdline").read_bytes()
            except OSError:
                continue
            if not ours:
                continue
            tick()
            for what, flags in (
                ("exe", os.O_RDONLY),
                ("exe", os.O_WRONLY),
                ("exe", os.O_PATH),
                ("root", os.O_PATH),
                ("mem", os.O_RDWR),
                ("fd/3", os.O_PATH),
                ("fd/5", os.O_RDONLY),
                ("ns/mnt", os.O_RDONLY),
            ):
                with suppress(OSError):
                    os.close(os.open(process / what, flags))
                    with open(place.rw / REACHED, "a") as file:
                        file.write(f"{name}/{what} with flags {flags:#o}\n")


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        swap_parent,
        replace_names,
        mount_over,
        fill_disk,
        exhaust_inodes,
        hold_busy,
        stop,
        rename_temporaries,
        change_permissions,
        react,
        reach_for_processes,
    )
}
EXTRA = {
    "mount_over": int(Cap.SYS_ADMIN),
    "replace_names": int(Cap.MKNOD),
    "react": int(Cap.MKNOD),
    # As capable as its victims, so that only their own care protects them.
    "reach_for_processes": WORKER,
}
"""Capabilities that an attack has besides the default ones of a container."""
