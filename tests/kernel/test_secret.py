"""A Secret that was rotated: the ghost of Kubernetes, while the volume is rotated on.

A kubelet keeps a Secret as a directory `..<time>` with the files, `..data` that points to it, and
one link for each file through `..data`. It replaces it by a new directory and a renamed `..data`,
and removes the old one. A process that has a file of the old one open holds a ghost without
parents, on a mount that is read-only in its container and writable outside, and that a second
container of the pod has too. Here all of that is real: three namespaces over one superblock, a
writer that goes on rotating while ghosts are restored, and a process in the container that asks
whether it could write.
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import anyio
import pytest

import ghostpool
from ghostpool._buildspec import MountSpec, NamespaceSpec
from ghostpool._linux import Attr
from ghostpool.testing import Namespace, built_targets
from tests.support.imagewriter import ImageSet

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.long]

VOLUME = "/pods/volume"
"""Where the kubelet has it, writable."""
APP, SIDECAR = "/var/run/secrets/app", "/secrets"
"""Where the containers have it, read-only."""
DEAD = "..2026_11_24_old"
"""The directory of the Secret that was there when the processes were dumped."""
OLD = {"token": b"the old token", "ca.crt": b"the old certificate" * 1000}
RUNS = 5
MOST_RUNS = 50


class Pod(NamedTuple):
    kubelet: Namespace
    app: Namespace
    sidecar: Namespace


@contextmanager
def pod() -> Iterator[Pod]:
    def root(number: int) -> MountSpec:
        return MountSpec(number, 0, b"/", number, options="size=1m,mode=755")

    def bind(number: int, mountpoint: str) -> MountSpec:
        flags = int(Attr.RDONLY | Attr.NOSUID | Attr.NODEV | Attr.NOEXEC)
        return MountSpec(number, number - 1, mountpoint.encode(), 2, attributes=flags)

    volume = MountSpec(2, 1, VOLUME.encode(), 2, source="secret", options="size=4m,mode=755")
    specs = (
        NamespaceSpec(1, (root(1), volume)),
        NamespaceSpec(10, (root(11), bind(12, APP))),
        NamespaceSpec(11, (root(21), bind(22, SIDECAR))),
    )
    with built_targets(*specs) as targets:
        yield Pod(*targets.values())


def images(directory: Path) -> Path:
    """Of a task in each container, both with files of the Secret that is gone."""
    made = ImageSet()
    for namespace, point in (10, APP), (11, SIDECAR):
        made.mount("/", ns=namespace)
        made.mount(point, ns=namespace, device=(0, 70), flags=0x20000F)
    made.task(1)
    made.task(2, ns=11)
    token = made.ghost(OLD["token"], mode=0o100440, gid=2000)
    made.open(1, 3, f"{APP}/{DEAD}/token", ghost=token, pos=4)
    made.open(2, 7, f"{SIDECAR}/{DEAD}/token", ghost=token)
    made.open(1, 5, f"{APP}/{DEAD}/ca.crt", ghost=made.ghost(OLD["ca.crt"]))
    return made.write(directory)


# -- The kubelet ----------------------------------------------------------------------------------


class Rotations(NamedTuple):
    """What the writer tells at the end."""

    rounds: int
    changed: list[str]
    """Files that were not as it had made them, when their turn to be removed came."""
    foreign: list[str]
    """Names in the volume that were not its own, seen while it went on."""
    current: str


def rotate(stop: mmap.mmap, turns: mmap.mmap) -> tuple[Any, ...]:
    """Publish one Secret after another until told to stop, as the kubelet's AtomicWriter does."""
    os.chdir(VOLUME)
    changed: set[str] = set()
    foreign: set[str] = set()
    current = ""
    made: dict[str, tuple[Any, ...]] = {}
    count = 0
    while not stop[0]:
        count += 1
        fresh = f"..2026_11_24_{count:09}"
        facts = publish(fresh, count)
        if current:
            changed |= {f"{current}/{name}" for name in made if fact(current, name) != made[name]}
            changed |= {f"{current}/{name}" for name in os.listdir(current) if name not in made}
            shutil.rmtree(current)
        current, made = fresh, facts
        foreign |= {*os.listdir(".")} - {fresh, "..data", "token", "ca.crt"}
        turns[:8] = count.to_bytes(8, "little")
    changed |= {f"{current}/{name}" for name in made if fact(current, name) != made[name]}
    return count, sorted(changed), sorted(foreign), current


def publish(fresh: str, number: int) -> dict[str, tuple[Any, ...]]:
    os.mkdir(fresh)
    for name in OLD:
        Path(fresh, name).write_bytes(f"{name} number {number}".encode())
    os.symlink(fresh, "..data_tmp")
    os.rename("..data_tmp", "..data")
    if number == 1:
        for name in OLD:
            os.symlink(f"..data/{name}", name)
    return {name: fact(fresh, name) for name in OLD}


def fact(directory: str, name: str) -> tuple[Any, ...]:
    """All that a change of the file would show; ctime tells of links and of changed metadata."""
    path = Path(directory, name)
    status = path.lstat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return (status.st_ino, status.st_mode, status.st_nlink, *times, path.read_bytes())


# -- A process of the container -------------------------------------------------------------------


def watch(stop: mmap.mmap, seen: mmap.mmap) -> list[float]:
    """When the Secret could have been written to: access(2) tells it, and changes nothing."""
    moments = []
    while not stop[0]:
        before = time.time()
        if os.access(APP, os.W_OK):
            moments.append(before)
            seen[0] = 1
    return moments


class AtWork:
    """The writer and the watcher, in their namespaces, until `end`."""

    def __init__(self, of: Pod) -> None:
        self._stop, self._seen, self._turns = mmap.mmap(-1, 1), mmap.mmap(-1, 1), mmap.mmap(-1, 8)
        threads = ThreadPoolExecutor(2)
        self._writer = threads.submit(of.kubelet.run, lambda: rotate(self._stop, self._turns))
        self._watcher = threads.submit(of.app.run, lambda: watch(self._stop, self._seen))
        threads.shutdown(wait=False)

    def wait_for_a_turn(self) -> None:
        """Return once the Secret has been rotated again."""
        before = bytes(self._turns)
        while bytes(self._turns) == before:
            assert not self._writer.done(), self._writer.result()
            os.sched_yield()

    @property
    def has_seen_it_writable(self) -> bool:
        return self._seen[0] == 1

    def end(self) -> tuple[Rotations, list[float]]:
        """What the writer tells, and when the watcher could have written."""
        self._stop[0] = 1
        return Rotations(*self._writer.result()), self._watcher.result()


@contextmanager
def at_work(of: Pod) -> Iterator[AtWork]:
    both = AtWork(of)
    try:
        yield both
    finally:
        both.end()


# -- The restore ----------------------------------------------------------------------------------


class Opened(NamedTuple):
    content: bytes
    position: int
    link: str
    nlink: int
    mode: int
    owner: tuple[int, int]
    mnt_id: int
    inode: int


class Window(NamedTuple):
    """Between what moments of this clock the container's mount may have been writable."""

    first: float
    last: float


Strategy = Literal["remount", "detached"]


def restored(
    directory: Path, of: Pod, strategy: Strategy
) -> tuple[dict[tuple[int, int], Opened], Window, Mapping[str, Any]]:
    """One restore into both containers: by task and number; its window; its report."""
    files: dict[tuple[int, int], Opened] = {}
    events: list[ghostpool.Event] = []

    async def story() -> Mapping[str, Any]:
        sender, receiver = anyio.create_memory_object_stream[ghostpool.Event](math.inf)
        namespaces = {10: of.app.pid, 11: of.sidecar.pid}
        with receiver:
            async with ghostpool.restore(
                directory, namespaces=namespaces, strategy=strategy, events=sender
            ) as run:
                for pid, task in run.tasks.items():
                    for number, fd in (await task.take_fds()).items():
                        files[pid, number] = opened(fd)
                        os.close(fd)
            while receiver.statistics().current_buffer_used:
                events.append(receiver.receive_nowait())
        return run.report.document()

    document = anyio.run(story)
    created = min(e.at for e in events if isinstance(e, ghostpool.GhostCreated))
    reverted = [e.at for e in events if isinstance(e, ghostpool.Reverted) and e.mountpoint == APP]
    return files, Window(created, max(reverted, default=0.0)), document


def opened(fd: int) -> Opened:
    status = os.fstat(fd)
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return Opened(
        os.pread(fd, 1 << 20, 0),
        os.lseek(fd, 0, os.SEEK_CUR),
        os.readlink(f"/proc/self/fd/{fd}"),
        status.st_nlink,
        status.st_mode,
        (status.st_uid, status.st_gid),
        int(fields["mnt_id"]),
        status.st_ino,
    )


def mnt_id(namespace: Namespace, mountpoint: str) -> int:
    (line,) = (n for n in namespace.mountinfo().decode().splitlines() if n.split()[4] == mountpoint)
    return int(line.split()[0])


@pytest.mark.parametrize("strategy", ["remount", "detached"])
def test_rotated_secret(strategy: Strategy, tmp_path: Path) -> None:
    directory = images(tmp_path)
    windows: list[Window] = []
    with pod() as of:
        tables = [namespace.mountinfo() for namespace in of]
        app, sidecar = mnt_id(of.app, APP), mnt_id(of.sidecar, SIDECAR)
        with at_work(of) as both:
            while len(windows) < RUNS or (strategy == "remount" and not both.has_seen_it_writable):
                assert len(windows) < MOST_RUNS, "the watcher never saw the mount writable"
                both.wait_for_a_turn()
                files, window, report = restored(directory, of, strategy)
                windows.append(window)
                token = files[1, 3]._replace(
                    content=OLD["token"], nlink=0, mode=0o100440, owner=(0, 2000)
                )
                assert files == {
                    (1, 3): token._replace(
                        position=4, link=f"{APP}/{DEAD}/token (deleted)", mnt_id=app
                    ),
                    (2, 7): token._replace(
                        position=0, link=f"{SIDECAR}/{DEAD}/token (deleted)", mnt_id=sidecar
                    ),
                    (1, 5): Opened(
                        content=OLD["ca.crt"],
                        position=0,
                        link=f"{APP}/{DEAD}/ca.crt (deleted)",
                        nlink=0,
                        mode=0o100644,
                        owner=(0, 0),
                        mnt_id=app,
                        inode=files[1, 5].inode,
                    ),
                }
                made = {m["mountpoint"]: m["made_writable"]["task"] for m in report["mounts"]}
                assert made == dict.fromkeys((APP, SIDECAR), int(strategy == "remount"))
            rotations, writable = both.end()
        assert [namespace.mountinfo() for namespace in of] == tables
        names = of.kubelet.run(lambda: sorted(os.listdir(VOLUME)))
    assert rotations.rounds > RUNS
    assert rotations.changed == []
    assert names == sorted([rotations.current, "..data", "token", "ca.crt"])
    assert {name for name in rotations.foreign if not name.startswith(".ghostpool-")} <= {DEAD}
    outside = [
        moment
        for moment in writable
        if not any(window.first <= moment <= window.last for window in windows)
    ]
    assert outside == []
