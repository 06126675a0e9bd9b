"""The mount table of a process: what `MountTable` finds in it, and when a restore reads it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from ghostpool import (
    ImageError,
    Images,
    LiveMount,
    MountTable,
    NamespaceNotFound,
    _deliver,
    _linux,
    _reading,
    _run,
    _survey,
)
from ghostpool._launch import launch
from ghostpool._pool import WorkerPool
from ghostpool._report import Report
from ghostpool._startreader import Reading
from ghostpool._targets import Target
from tests.support.imagewriter import ImageSet
from tests.support.live import Live, live, process, read_only, tmpfs

pytestmark = pytest.mark.needs_mount_ns


@pytest.fixture
def target() -> Iterator[Live]:
    mounts = [read_only(2, b"/data"), tmpfs(3, b"/data/deep"), tmpfs(4, b"/with space")]
    with live(mounts) as (one,):
        yield one


def test_every_line_of_a_process(target: Live) -> None:
    table = MountTable.of_process(target.pid)
    assert sorted(table) == sorted(target.table())
    assert len(table) == 4
    (data,) = table.stack(b"/data")
    assert data.read_only
    assert data.options()[0] == "ro"
    assert table.with_id(data.mnt_id) == data
    assert table.stack(b"/with space")[0].mountpoint == b"/with space"
    assert table.stack(b"/nothing") == []
    assert table.with_id(0) is None


def test_which_mount_holds_a_path(target: Live) -> None:
    table = MountTable.of_process(target.pid)

    def holding(path: bytes) -> bytes | None:
        found = table.containing(path)
        return found and found.mountpoint

    assert holding(b"/data/file") == b"/data"
    assert holding(b"/data/deep") == b"/data/deep"
    assert holding(b"/data/deep/er/still") == b"/data/deep"
    assert holding(b"/database") == b"/"
    assert MountTable(b"").containing(b"/data") is None


def test_the_top_of_a_stack_comes_last(target: Live) -> None:
    target.run(lambda: _linux.mount(b"over", b"/data", b"tmpfs", 0))
    bottom, top = MountTable.of_process(target.pid).stack(b"/data")
    assert isinstance(top, LiveMount)
    assert (bottom.source, top.source) == ("t2", "over")
    assert top.parent == bottom.mnt_id
    assert not top.read_only


def test_it_stays_as_it_was_read(target: Live) -> None:
    table = MountTable.of_process(target.pid)
    target.run(lambda: _linux.umount2(b"/with space", 0))
    assert len(table.stack(b"/with space")) == 1
    assert MountTable.of_process(target.pid).stack(b"/with space") == []


def test_no_such_process() -> None:
    highest = int(Path("/proc/sys/kernel/pid_max").read_text())
    with pytest.raises(NamespaceNotFound, match=f"no process has pid {highest}"):
        MountTable.of_process(highest)


def test_a_process_that_has_ended() -> None:
    """Nobody has waited for it, so its pid is still there; its mounts are not."""

    def body(ready: Callable[[], None]) -> None:
        ready()
        os.kill(os.getpid(), signal.SIGKILL)

    with process(body) as pid:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(NamespaceNotFound, match=f"mount table of pid {pid}: Invalid argument"):
            MountTable.of_process(pid)


# -- In a restore ------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    made = ImageSet()
    made.mount("/")
    made.mount("/data", flags=0x200001, device=(0, 70))
    made.task(1)
    made.open(1, 3, "/data/gone", ghost=made.ghost(b"content"))
    return made.write(tmp_path / "images")


def restore(images: Path, pid: int) -> Report:
    report = Report()
    request = _run.Request(str(images), 1, tree=pid)

    async def story() -> None:
        with anyio.fail_after(30):
            await _run.run_restore(request, launch(), report, _deliver.discard)

    anyio.run(story, backend="trio")
    return report


def test_it_is_read_while_the_images_are(
    images: Path, target: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the two begins before the other has ended."""
    begun: dict[str, anyio.Event] = {}
    read_apart, read_tables = _reading.read_apart, _survey.read_tables

    async def both(which: str) -> None:
        for name in ("images", "tables"):
            begun.setdefault(name, anyio.Event())
        begun[which].set()
        for event in [*begun.values()]:
            await event.wait()

    async def images_of(reading: Reading) -> Images:
        await both("images")
        return await read_apart(reading)

    async def tables_of(pool: WorkerPool, targets: Sequence[Target]) -> dict[int, MountTable]:
        await both("tables")
        return await read_tables(pool, targets)

    monkeypatch.setattr(_run, "read_apart", images_of)
    monkeypatch.setattr(_run, "read_tables", tables_of)
    assert restore(images, target.pid).restored


def test_bad_images_are_told_before_a_bad_namespace(
    tmp_path: Path, target: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two is found first."""

    async def broken(pool: WorkerPool, targets: Sequence[Target]) -> dict[int, MountTable]:
        raise NamespaceNotFound("it has gone")

    monkeypatch.setattr(_run, "read_tables", broken)
    with pytest.raises(ImageError, match=r"inventory\.img"):
        restore(tmp_path, target.pid)


def test_a_namespace_that_can_not_be_looked_at(
    images: Path, target: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(pool: WorkerPool, targets: Sequence[Target]) -> dict[int, MountTable]:
        await anyio.lowlevel.checkpoint()
        raise NamespaceNotFound("it has gone")

    monkeypatch.setattr(_run, "read_tables", broken)
    with pytest.raises(NamespaceNotFound, match="it has gone"):
        restore(images, target.pid)


def test_a_large_one_is_read_in_a_thread(
    images: Path, target: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of it is lost where the thread takes over."""

    def bind_often() -> None:
        for number in range(4000):
            os.mkdir(f"/with space/{number}")
            _linux.mount(b"/data", b"/with space/%d" % number, None, _linux.MS_BIND)

    target.run(bind_often)
    read: list[bytes] = []
    threads: set[int] = set()

    class Noted(MountTable):
        def __init__(self, raw: bytes) -> None:
            read.append(raw)
            super().__init__(raw)

    run_sync = anyio.to_thread.run_sync

    async def noted(work: Callable[[], bytes]) -> bytes:
        def there() -> bytes:
            threads.add(threading.get_ident())
            return work()

        return await run_sync(there)

    monkeypatch.setattr(_survey, "MountTable", Noted)
    monkeypatch.setattr(anyio.to_thread, "run_sync", noted)
    assert restore(images, target.pid).restored
    assert len(read) == 1
    assert len(read[0].splitlines()) == len(MountTable.of_process(target.pid)) == 4004
    assert len(threads) == 1
    assert threading.get_ident() not in threads
