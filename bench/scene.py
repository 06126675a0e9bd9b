"""Where everything happens: a private mount namespace, and live ones below it to restore into.

Nothing here mounts in the caller's own namespace. A child leaves it first, and what it mounts
ends with it; the caller's file system only lends an empty directory as the mount point.
A live namespace is a process that holds read-only mounts, each a tmpfs of its own or, to measure
another file system, a bind of a directory of that. It is looked at again when it is given up,
since a rival that leaves a mount writable or a file behind has not done the same work.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from bench.images import Shape, write_images
from ghostpool import _linux

_FURTHER_FDS = 400
"""What a process of ghostpool has open besides mounts and namespaces, at most."""


class BenchError(Exception):
    """A measurement that would not mean what it says."""


def in_private_namespace(body: Callable[[Path], None]) -> int:
    """Run `body` in a child with private mounts; its argument is a fresh tmpfs. Exit status."""

    def leave(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    sys.stdout.flush()
    try:
        with tempfile.TemporaryDirectory(prefix="ghostpool-bench-") as scratch:
            pid = os.fork()
            if pid == 0:
                _become(body, scratch)
            try:
                _, status = os.waitpid(pid, 0)
            except BaseException:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
            return os.waitstatus_to_exitcode(status)
    finally:
        signal.signal(signal.SIGTERM, before)


def _become(body: Callable[[Path], None], scratch: str) -> NoReturn:
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _linux.prctl(_linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        _linux.unshare(_linux.CLONE_NEWNS)
        _linux.mount(None, b"/", None, _linux.MS_REC | _linux.MS_PRIVATE)
        _linux.mount(b"ghostpool-bench", os.fsencode(scratch), b"tmpfs", 0)
        # Journals belong on a tmpfs, as /run usually is one; and nothing is left in the caller's.
        os.environ["GHOSTPOOL_RUN_DIR"] = f"{scratch}/run"
        body(Path(scratch))
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
    except BaseException:  # noqa: BLE001  a forked child must not return into the caller
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def workplace(scratch: Path, name: str) -> Iterator[Path]:
    """A fresh directory, with everything that a question puts there, for as long as it is asked.

    To be entered before the live namespaces, whose mount points are in it.
    """
    home = scratch / name
    home.mkdir()
    try:
        yield home
    finally:
        shutil.rmtree(home)


@contextmanager
def live_namespaces(shape: Shape, backing: Path | None = None) -> Iterator[list[int]]:
    """Pids of processes in a mount namespace each, with the mounts of `shape` in them.

    To be used in a private namespace, from which they inherit the rest. Further mounts are binds
    of the file system that holds `shape.base`; the read-only ones are of `backing`, if it is
    given. BenchError: what was run in them left something behind.
    """
    for number in range(shape.mounts):
        os.makedirs(shape.mountpoint(number), exist_ok=True)
    for number in range(shape.further_mounts):
        os.makedirs(shape.further_mountpoint(number), exist_ok=True)
    os.makedirs(shape.shared_directory, exist_ok=True)
    with ExitStack() as stack:
        pids = [
            stack.enter_context(_process(shape, number, backing))
            for number in range(shape.namespaces)
        ]
        yield pids
        for pid in pids:
            _check_untouched(pid, shape)


@contextmanager
def restorable(images: Path, shape: Shape) -> Iterator[list[int]]:
    """As `live_namespaces`, with an image directory of the same shape made at `images`."""
    write_images(images, shape)
    with live_namespaces(shape) as pids:
        yield pids


@contextmanager
def live_namespace(shape: Shape, backing: Path | None = None) -> Iterator[int]:
    """As `live_namespaces`, for the first namespace of `shape` alone."""
    with live_namespaces(replace(shape, namespaces=1), backing) as (pid,):
        yield pid


@contextmanager
def _process(shape: Shape, number: int, backing: Path | None) -> Iterator[int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _hold(shape, writer, backing and backing / str(number))
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            if pipe.read(1) != b"+":
                raise BenchError("the live mount namespace could not be made")
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _hold(shape: Shape, writer: int, backing: Path | None) -> NoReturn:
    try:
        _linux.prctl(_linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        _linux.unshare(_linux.CLONE_NEWNS)
        for number in range(shape.mounts):
            point = shape.mountpoint(number)
            if backing is None:
                _linux.mount(b"ghosts", point, b"tmpfs", 0)
            else:
                shown = os.fsencode(backing) + b"/" + os.path.basename(point)
                os.makedirs(shown, exist_ok=True)
                _linux.mount(shown, point, None, _linux.MS_BIND)
            for directory in range(shape.directories):
                os.makedirs(point + shape.directory(directory), exist_ok=True)
            read_only = _linux.MS_REMOUNT | _linux.MS_BIND | _linux.MS_RDONLY
            _linux.mount(None, point, None, read_only)
        # For each bind the kernel looks at all mounts on the one that the source is on, whether any
        # is locked (has_locked_children). Through a mount without any it takes the same time for
        # each of a hundred thousand.
        _linux.mount(shape.shared_directory, shape.shared_directory, None, _linux.MS_BIND)
        for number in range(shape.further_mounts):
            point = shape.further_mountpoint(number)
            _linux.mount(shape.shared_directory, point, None, _linux.MS_BIND)
        _linux.umount2(shape.shared_directory, _linux.MNT_DETACH)
        os.write(writer, b"+")
        while True:
            signal.pause()
    except BaseException:  # noqa: BLE001  a forked child must not return into the caller
        traceback.print_exc()
    finally:
        os._exit(1)


def most_mounts(namespaces: int) -> int:
    """Read-only mounts that ghostpool can hold here: two descriptors for each, one process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (hard - _FURTHER_FDS - namespaces) // 2


def read_mountinfo(pid: int) -> bytes:
    """The whole mount table that a process sees."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return file.read()


def _check_untouched(pid: int, shape: Shape) -> None:
    options = {}
    for line in read_mountinfo(pid).splitlines():
        fields = line.split(b" ")
        options[fields[4]] = fields[5].split(b",")
    for number in range(shape.mounts):
        point = shape.mountpoint(number)
        if b"ro" not in options[point]:
            raise BenchError(f"{os.fsdecode(point)} was left writable")
        wanted = sorted(shape.directory(d)[1:] for d in range(shape.directories))
        found = sorted(os.listdir(b"/proc/%d/root%b" % (pid, point)))
        if found != wanted:
            raise BenchError(f"{os.fsdecode(point)} was left with {found[:3]} in it")
