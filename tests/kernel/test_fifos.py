"""Ghost fifos with what waited in them: the bytes are there for whichever end a task has."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import ghostpool
from ghostpool._errors import GhostpoolError
from ghostpool._fifos import FifoFiller
from ghostpool._pipelimit import pipe_limit
from ghostpool.testing import Namespace
from tests.support.imagewriter import ImageSet
from tests.support.live import assert_refused, live, read_only, run

pytestmark = pytest.mark.needs_mount_ns
READ, WRITE, BOTH = 0o100000, 0o100001, 0o100002
NEW = 65536
"""What a new pipe takes: pipe(7)."""


@pytest.fixture
def target() -> Iterator[Namespace]:
    with live([read_only(2, b"/data", "taken", "dir/")]) as (made,):
        before = made.snapshot().without_directory_times()
        yield made
        assert made.snapshot().without_directory_times() == before


def fifo_images(*ends: int, data: bytes = b"waiting", size: int | None = NEW) -> ImageSet:
    """One ghost fifo, and a task for each of its ends, at descriptor 3."""
    made = ImageSet()
    made.mount("/")
    made.mount("/data", flags=0x200001)
    ghost = made.ghost(mode=stat.S_IFIFO | 0o600, uid=7)
    for pid, flags in enumerate(ends, 1):
        made.task(pid)
        made.open_fifo(pid, 3, "/data/gone/fifo", ghost=ghost, flags=flags)
    made.fifo_data(77, data, size=size)
    return made


def taken(images: Path, target: Namespace, **options: Any) -> list[int]:
    """Descriptor 3 of each task, by a restore that is over."""

    async def main() -> list[int]:
        async with ghostpool.restore(images, tree=target.pid, **options) as restored:
            return [(await task.take_fds())[3] for task in restored.tasks.values()]

    return anyio.run(main, backend="trio")


def waiting(fd: int) -> int:
    count: int = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
    return count


def drained(fd: int) -> bytes:
    """All that can be read without waiting, by an open of our own, whatever `fd` is for."""
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK)
    data = b""
    try:
        while piece := os.read(reader, 1 << 20):
            data += piece
    except BlockingIOError:
        pass
    finally:
        os.close(reader)
    return data


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(
    ("ends", "strategy"),
    [
        ((READ,), "remount"),
        ((WRITE,), "detached"),
        ((BOTH,), "remount"),
        ((WRITE, READ), "detached"),
        ((READ, BOTH, WRITE), "remount"),
    ],
)
def test_bytes_wait_whatever_ends_there_are(
    target: Namespace, tmp_path: Path, ends: tuple[int, ...], strategy: str
) -> None:
    images = fifo_images(*ends).write(tmp_path)
    fds = taken(images, target, strategy=strategy)
    try:
        assert [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE for fd in fds] == [
            end & os.O_ACCMODE for end in ends
        ]
        assert len({os.fstat(fd).st_ino for fd in fds}) == 1
        status = os.fstat(fds[0])
        assert (status.st_uid, status.st_nlink) == (7, 0)
        assert status.st_mtime_ns == 1_500_000_000_000_002_000
        assert {waiting(fd) for fd in fds} == {7}
        assert drained(fds[0]) == b"waiting"
    finally:
        close(fds)


def test_no_other_end_stays_open(target: Namespace, tmp_path: Path) -> None:
    """A reader alone reads the end of the file after the bytes; a writer alone has no reader."""
    (reader,) = taken(fifo_images(READ).write(tmp_path / "r"), target)
    try:
        assert os.read(reader, 100) == b"waiting"
        assert os.read(reader, 100) == b""
    finally:
        os.close(reader)
    (writer,) = taken(fifo_images(WRITE).write(tmp_path / "w"), target)
    try:
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"more")
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    ("length", "size", "expected"),
    [
        (7, 4096, 4096),
        (NEW, NEW, NEW),
        (300_000, 1 << 20, 1 << 20),
        (0, 1 << 18, 1 << 18),
        (100_001, None, 131072),
    ],
)
def test_size_of_the_pipe(
    target: Namespace, tmp_path: Path, length: int, size: int | None, expected: int
) -> None:
    """Full to the brim, larger than usual, or not said: what waited fits, in its order."""
    data = os.urandom(length)
    fds = taken(fifo_images(READ, WRITE, data=data, size=size).write(tmp_path), target)
    try:
        assert fcntl.fcntl(fds[0], fcntl.F_GETPIPE_SZ) == expected
        assert drained(fds[0]) == data
    finally:
        close(fds)


def test_bytes_are_written_once_for_each_of_many_fifos(target: Namespace, tmp_path: Path) -> None:
    """Two of one name, dup'ed and shared descriptions, more than one batch takes."""
    made = ImageSet()
    made.mount("/")
    made.mount("/data", flags=0x200001)
    made.task(1)
    for number in range(70):
        ghost = made.ghost(mode=stat.S_IFIFO | 0o600)
        name = f"/data/{'taken' if number < 2 else number}"
        made.open_fifo(1, 100 + number, name, ghost=ghost, pipe=number)
        made.open_fifo(1, 300 + number, name, ghost=ghost, pipe=number, flags=READ)
        made.fifo_data(number, b"of %d" % number, size=NEW)

    async def main() -> dict[int, int]:
        async with ghostpool.restore(made.write(tmp_path), tree=target.pid) as restored:
            return await restored.tasks[1].take_fds()

    fds = anyio.run(main, backend="trio")
    try:
        assert len(fds) == 140
        assert {n: drained(fds[100 + n]) for n in range(70)} == {n: b"of %d" % n for n in range(70)}
        assert all(waiting(fds[300 + n]) == 0 for n in range(70))
    finally:
        close([*fds.values()])


def test_bytes_are_there_before_any_end_is_given_out(target: Namespace, tmp_path: Path) -> None:
    """Whoever opens its end early reads them, and no end of file, before the others have theirs."""

    async def main() -> tuple[bytes, str]:
        images = fifo_images(READ, WRITE).write(tmp_path)
        pool = ghostpool.open_pool(images, tree=target.pid)
        async with pool as opened, anyio.create_task_group() as group:

            async def writer() -> None:
                async with opened.task(2):
                    pass

            async with opened.task(1) as task:
                reader = (await task.open_files())[3]
                os.set_blocking(reader, False)
                got = os.read(reader, 100)
                try:
                    after = repr(os.read(reader, 100))
                except BlockingIOError:
                    after = "nothing yet"
                group.start_soon(writer)
        return got, after

    assert anyio.run(main, backend="trio") == (b"waiting", "nothing yet")


def test_rehearsal(target: Namespace, tmp_path: Path) -> None:
    images = fifo_images(READ, WRITE).write(tmp_path)
    done = run("restore", "-D", images, "-t", target.pid, "--discard")
    assert (done.status, done.err) == (0, "")


def test_kept_fifo_loses_them(tmp_path: Path) -> None:
    """By name alone nothing waits in a fifo: that is said."""
    images = fifo_images(READ, WRITE).write(tmp_path)
    with live([read_only(2, b"/data")]) as (target,):
        done = run("restore", "-D", images, "-t", target.pid, "--keep")
    assert done.status == 0
    assert "/data/gone/fifo: 7 bytes" in done.err


def test_more_than_a_pipe_takes_here(target: Namespace, tmp_path: Path) -> None:
    before = target.snapshot()
    limit = pipe_limit()
    images = fifo_images(BOTH, data=bytes(limit + 1), size=2 * limit).write(tmp_path / "1")
    done = run("restore", "-D", images, "-t", target.pid, "--discard")
    assert_refused(done, [before], [target], "/data/gone/fifo", str(limit), "fs.pipe-max-size")
    images = fifo_images(BOTH, size=1 << 31).write(tmp_path / "2")
    done = run("restore", "-D", images, "-t", target.pid, "--discard")
    assert done.status == 0
    assert "/data/gone/fifo" in done.err
    assert "fs.pipe-max-size" in done.err


def test_bytes_of_what_is_no_fifo(target: Namespace, tmp_path: Path) -> None:
    made = ImageSet()
    made.mount("/")
    made.mount("/data", flags=0x200001)
    made.task(1)
    made.open_fifo(1, 3, "/data/gone", ghost=made.ghost(b"a file"), flags=READ)
    made.fifo_data(77, b"waiting")
    done = run("restore", "-D", made.write(tmp_path), "-t", target.pid, "--discard")
    assert_refused(done, [target.snapshot()], [target], "/data/gone", "no fifo")


def test_image_cut_after_the_plan(target: Namespace, tmp_path: Path) -> None:
    """It fails, and neither name nor parent is left."""
    images = fifo_images(BOTH).write(tmp_path)

    async def main() -> None:
        async with ghostpool.open_pool(images, tree=target.pid):
            pass

    real = FifoFiller.fill

    async def cut(self: Any) -> None:
        os.truncate(images / "fifo-data.img", 20)
        await real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FifoFiller, "fill", cut)
        with pytest.raises(ExceptionGroup) as caught:
            anyio.run(main, backend="trio")
    (error,) = caught.value.exceptions
    assert isinstance(error, GhostpoolError)
    assert "cut since the plan" in str(error)
