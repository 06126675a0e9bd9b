"""Workers that hang: stopped by a signal, or in uninterruptible sleep on a frozen file system.

The run notices, goes on without them, undoes what it can, and says what hangs and what is left.
A worker that is slow but alive is left alone, however short the stall time is.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from ghostpool import _deliver, _linux, _pool, _process, _run
from ghostpool._errors import RevertError, WorkerDied, WorkerHung, leaves
from ghostpool._launch import launch
from ghostpool._pool import WorkerPool
from ghostpool._report import Report
from ghostpool._workerclient import WorkerClient
from tests.support.crash import children, wait_for
from tests.support.imagewriter import ImageSet
from tests.support.live import Live as LiveSpecs
from tests.support.live import live as live_specs
from tests.support.live import read_only, run, running
from tests.support.restore import Live, live

pytestmark = [pytest.mark.long, pytest.mark.needs_mount_ns]

STALL_S = 0.25
GHOSTS = 12


def two_mounts(directory: Path, size: int = 4096, *, shared: bool = False) -> Path:
    """Ghosts on two read-only mounts, with an open each, or two: those need to be cleaned up."""
    made = ImageSet()
    made.mount("/")
    made.mount("/data", flags=0x200001, device=(0, 70))
    made.mount("/other", flags=0x200001, device=(0, 71))
    made.task(1)
    for number in range(GHOSTS):
        where = ("/data", "/other")[number % 2]
        ghost = made.ghost(bytes(size))
        made.open(1, 3 + number, f"{where}/gone-{number}", ghost=ghost)
        if shared:
            made.open(1, 3 + GHOSTS + number, f"{where}/also-{number}", ghost=ghost)
    return made.write(directory)


def restore(images: Path, pid: int, jobs: int = 2, stall_s: float = STALL_S) -> Report:
    report = Report()
    request = _run.Request(str(images), jobs, tree=pid, stall_s=stall_s)

    async def story() -> None:
        await _run.run_restore(request, launch(), report, _deliver.discard)

    anyio.run(story, backend="trio")
    return report


# -- Stopped by a signal ------------------------------------------------------------------------


def stop_at(patch: pytest.MonkeyPatch, step: Callable[[int, str], bool]) -> list[str]:
    """Stop the worker (or guardian) that is about to get the chosen call."""
    calls: list[str] = []
    original = WorkerClient.call

    async def call(self: WorkerClient, request: str, *args: Any, **keywords: Any) -> Any:
        calls.append(request)
        # The guardian is asked by several at once; of this call nobody else waits for it.
        name = "settle names" if request == "settle" and args[:1] == ("names",) else request
        if step(len(calls) - 1, name):
            self.child.signal(signal.SIGSTOP)
        return await original(self, request, *args, **keywords)

    patch.setattr(WorkerClient, "call", call)
    return calls


@pytest.fixture
def target() -> Iterator[LiveSpecs]:
    mounts = [read_only(2, b"/data", "keep"), read_only(3, b"/other", "keep")]
    with live_specs(mounts) as (one,):
        yield one


UNDONE_BY_OTHERS = {"make_read_only", "remove", "settle names", "finish"}


@pytest.mark.parametrize(
    "request_name",
    ["look", "owe", "create", "make_writable", "open", *sorted(UNDONE_BY_OTHERS)],
)
def test_stopped_worker_is_noticed(
    target: LiveSpecs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_name: str
) -> None:
    before = target.snapshot().without_directory_times()
    stopped: list[int] = []

    def step(number: int, request: str) -> bool:
        chosen = request == request_name and not stopped
        if chosen:
            stopped.append(number)
        return chosen

    stop_at(monkeypatch, step)
    images = two_mounts(tmp_path, shared=True)
    begun = time.monotonic()
    if request_name in UNDONE_BY_OTHERS:
        assert restore(images, target.pid).restored
    else:
        with pytest.raises(WorkerHung, match="no sign of life") as caught:
            restore(images, target.pid)
        who = "guardian" if request_name == "owe" else f"during {request_name!r}"
        assert who in str(caught.value)
        assert "stopped by a signal" in str(caught.value)
        if request_name in ("create", "make_writable", "open", "look"):
            assert "/data in mnt:[" in str(caught.value) or "/other in mnt:[" in str(caught.value)
    assert time.monotonic() - begun < 10
    assert stopped
    assert target.snapshot().without_directory_times() == before


@pytest.mark.long
def test_stopped_worker_at_each_step(
    target: LiveSpecs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = target.snapshot().without_directory_times()
    images = two_mounts(tmp_path)
    step = noticed = 0
    while True:
        with monkeypatch.context() as patch:
            calls = stop_at(patch, lambda number, _: number == step)  # noqa: B023
            try:
                restore(images, target.pid)
            except* WorkerHung:
                noticed += 1
        assert target.snapshot().without_directory_times() == before, (step, calls)
        if len(calls) <= step:
            break
        step += 1
    assert noticed >= 12, (noticed, step)


def first_worker(pid: int) -> psutil.Process | None:
    """A grandchild of the command that is no guardian, as soon as there is one."""
    try:
        for server in psutil.Process(pid).children():
            for worker in server.children():
                if os.getsid(worker.pid) != worker.pid:
                    return worker
    except (psutil.NoSuchProcess, ProcessLookupError):
        pass
    return None


def test_command_says_what_hangs(target: LiveSpecs, tmp_path: Path) -> None:
    """Exit status 1, in time, with everything undone; the option says how long is long."""
    before = target.snapshot().without_directory_times()
    images = two_mounts(tmp_path, size=512 << 10)
    arguments = ("restore", "-D", images, "-t", target.pid, "-j", 2, "--discard")
    with running(*arguments, "--stall-timeout", "0.5") as process:
        victim = None
        while victim is None and process.poll() is None:
            victim = first_worker(process.pid)
        assert victim is not None
        victim.send_signal(signal.SIGSTOP)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, ""), err
    assert len(err.splitlines()) == 1
    assert f"worker {victim.pid} hangs" in err
    assert "no sign of life for 0.5 s (stopped by a signal" in err
    assert target.snapshot().without_directory_times() == before


def test_stopped_fork_server_does_not_hang_the_run(
    target: LiveSpecs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be started any more; what was not done by then is not done."""
    before = target.snapshot().without_directory_times()
    monkeypatch.setattr(_process, "FORK_S", 0.5)
    monkeypatch.setattr(_process, "STOP_S", 0.5)
    original = _process.ForkServer.fork

    async def fork(self: Any, kind: str, *arguments: object, fds: list[int]) -> Any:
        if kind == "guardian":
            os.kill(self._launched.pid, signal.SIGSTOP)
        return await original(self, kind, *arguments, fds=fds)

    monkeypatch.setattr(_process.ForkServer, "fork", fork)
    with pytest.raises(WorkerDied, match="gave no answer within"):
        restore(two_mounts(tmp_path), target.pid)
    assert target.snapshot().without_directory_times() == before


# -- Uninterruptible ----------------------------------------------------------------------------

_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878


class Frozen:
    """A file system that can be made to let everybody hang who changes it."""

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self.frozen = False

    def freeze(self) -> None:
        fcntl.ioctl(self._directory, _FIFREEZE, 0)
        self.frozen = True

    def thaw(self) -> None:
        if self.frozen:
            fcntl.ioctl(self._directory, _FITHAW, 0)
            self.frozen = False


@contextmanager
def with_ext4(
    tmp_path: Path, size: int = 64 << 20, options: str = ""
) -> Iterator[tuple[Live, Frozen, Path]]:
    """A target with an ext4 of its own on a directory, read-only, and a tmpfs on another."""
    backing, place, other = tmp_path / "backing", tmp_path / "data", tmp_path / "other"
    backing.touch()
    os.truncate(backing, size)
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", str(backing)], check=True, env={**os.environ, "PATH": path}
    )
    place.mkdir()
    other.mkdir()

    def setup() -> None:
        mount = ["mount", "-o", f"loop{options}", str(backing), str(place)]
        subprocess.run(mount, check=True, capture_output=True)
        _linux.mount(b"tmpfs", os.fsencode(other), b"tmpfs", 0)
        for point in (place, other):
            (point / "keep").write_bytes(b"kept")
            fd = os.open(point, os.O_PATH)
            _linux.mount_setattr(fd, attr_set=1)
            os.close(fd)

    with live(setup) as target:
        directory = os.open(f"/proc/{target.pid}/root{place}", os.O_RDONLY | os.O_DIRECTORY)
        frozen = Frozen(directory)
        try:
            yield target, frozen, place
        finally:
            frozen.thaw()
            os.close(directory)


def names_of(target: Live, place: Path) -> list[str]:
    return sorted(os.listdir(f"/proc/{target.pid}/root{place}"))


def is_read_only(target: Live, place: Path) -> bool:
    fd = os.open(f"/proc/{target.pid}/root{place}", os.O_RDONLY)
    try:
        return bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY)
    finally:
        os.close(fd)


@pytest.mark.needs_loop
@pytest.mark.parametrize("phase", ["create", "open", "remove"])
def test_frozen_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, phase: str
) -> None:
    """Not even SIGKILL ends the worker. The run ends in time, with the other mount cleaned, and
    says which process is left and how to finish; that works once the file system answers."""
    monkeypatch.setattr(_pool, "DEATH_S", 0.5)
    monkeypatch.setattr(_process, "GONE_S", 0.3)
    with with_ext4(tmp_path) as (target, frozen, place):
        made = ImageSet()
        made.mount("/")
        other = tmp_path / "other"
        made.mount(str(place), flags=0x200001, device=(7, 0), fstype="", fsname="ext4")
        made.mount(str(other), flags=0x200001, device=(0, 71))
        made.task(1)
        for number in range(GHOSTS):
            where = (place, other)[number % 2]
            ghost = made.ghost(bytes(64))
            made.open(1, 3 + number, f"{where}/gone-{number}", ghost=ghost)
            made.open(1, 3 + GHOSTS + number, f"{where}/also-{number}", ghost=ghost)
        images = made.write(tmp_path / "images")
        kept = names_of(target, place)
        original = WorkerPool.call

        async def call(self: WorkerPool, slot: int, name: str, *args: Any, **keywords: Any) -> Any:
            if name == phase and not frozen.frozen:
                frozen.freeze()
            return await original(self, slot, name, *args, **keywords)

        monkeypatch.setattr(WorkerPool, "call", call)
        begun = time.monotonic()
        with pytest.raises((RevertError, ExceptionGroup)) as caught:
            restore(images, target.pid)
        assert time.monotonic() - begun < 15
        errors = list(leaves(caught.value))
        reverts = [error for error in errors if isinstance(error, RevertError)]
        assert [str(place) in str(error) for error in reverts] == [True], errors
        said = " ".join(map(str, errors))
        assert "in uninterruptible sleep" in said
        assert "is left behind, in uninterruptible sleep" in caplog.text
        assert names_of(target, other) == ["keep"]
        assert is_read_only(target, other)
        assert is_read_only(target, place)

        frozen.thaw()
        assert wait_for(lambda: not children())
        # In the phase "create" the one name came only now: the worker finished its call and died.
        assert names_of(target, place) != kept
        assert reverts[0].command.endswith("ghostpool recover")
        mended = run("recover")
        assert (mended.status, mended.err) == (0, ""), mended
        assert names_of(target, place) == kept
        assert is_read_only(target, place)


# -- Slow, but alive ----------------------------------------------------------------------------


@pytest.mark.needs_loop
def test_slow_worker_is_left_alone(tmp_path: Path) -> None:
    """It copies for many times the stall time, in one request, to a disk that waits for each
    write."""
    stall_s, size = 0.05, 192 << 20
    with with_ext4(tmp_path, size=320 << 20, options=",sync") as (target, _, place):
        made = ImageSet()
        made.mount("/")
        made.mount(str(place), flags=0x200001, device=(7, 0), fstype="", fsname="ext4")
        made.task(1)
        made.open(1, 3, f"{place}/gone", ghost=made.ghost(chunks=[(0, bytes(size))], size=size))
        images = made.write(tmp_path / "images")
        begun = time.monotonic()
        report = restore(images, target.pid, stall_s=stall_s)
        took_s = time.monotonic() - begun
        assert report.restored
        assert took_s > 8 * stall_s
        assert names_of(target, place) == ["keep", "lost+found"]
