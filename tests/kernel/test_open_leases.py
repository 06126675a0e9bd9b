"""Leases without a restore, on the real kernel: held once, shared, put back whatever dies."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

import ghostpool
from ghostpool import (
    GhostpoolError,
    HostNamespace,
    MountNotFound,
    NamespaceNotFound,
    Overmounted,
    PlanError,
    ReadOnlySuperblock,
    RevertError,
    WorkerDied,
    _linux,
    _mountkernel,
    open_leases,
)
from ghostpool._linux import Attr
from ghostpool._workerclient import WorkerClient
from ghostpool.testing._namespace import enter
from tests.support.crash import children, journals, wait_for
from tests.support.live import Live, live, process, read_lines, read_only, run, tmpfs

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.anyio]
FLAGS = int(Attr.RDONLY | Attr.NOSUID | Attr.NODEV | Attr.NOATIME)
MOUNTS = (
    read_only(2, b"/data", "file", attributes=FLAGS),
    read_only(3, b"/other"),
    tmpfs(4, b"/writable"),
    read_only(5, b"/with space"),
)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def target() -> Iterator[Live]:
    """What it looks like is the same afterwards, and no journal is left."""
    with live(MOUNTS) as (one,):
        before = one.snapshot().without_directory_times()
        yield one
        assert one.snapshot().without_directory_times() == before
        assert journals() == []


def writable(target: Live) -> set[bytes]:
    return {mount.mountpoint for mount in target.table() if not mount.read_only}


AS_FOUND = {b"/", b"/writable"}


# -- Held ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mount_setattr", [True, False])
async def test_writable_while_it_is_held(target: Live, mount_setattr: bool) -> None:
    """With its other options as they were, and beside mounts that nobody touches."""
    options = target.options()[b"/data"]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    leases_of = open_leases(target.pid, ["/data", "/other"], mount_setattr=mount_setattr)
    async with leases_of as leases:
        assert writable(target) == AS_FOUND
        async with leases.hold(["/data"]):
            assert writable(target) == {*AS_FOUND, b"/data"}
            assert target.options()[b"/data"] == ["rw", *options[1:]]
            target.run(lambda: os.mkdir("/data/made"))
            target.run(lambda: os.rmdir("/data/made"))
        assert writable(target) == AS_FOUND
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limit


async def test_one_change_for_all_who_hold_it(target: Live) -> None:
    """Many tasks at once; whoever comes later opens it anew."""
    all_in = anyio.Event()
    inside = 0

    async def hold(leases: ghostpool.MountLeases[str]) -> None:
        nonlocal inside
        async with leases.hold(["/data"]):
            assert target.is_writable(b"/data")
            inside += 1
            if inside == 20:
                all_in.set()
            await all_in.wait()

    async with open_leases(target.pid, ["/data"]) as leases:
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(hold, leases)
        assert leases.usage()["/data"].made_writable == 1
        assert leases.usage()["/data"].leases == 20
        assert not target.is_writable(b"/data")
        await hold(leases)
        assert leases.usage()["/data"].made_writable == 2


async def test_a_mount_that_others_made_writable_stays_so(target: Live) -> None:
    async with open_leases(target.pid, ["/writable"]) as leases:
        async with leases.hold(["/writable"]):
            pass
        assert leases.usage()["/writable"].made_writable == 0
    assert target.is_writable(b"/writable")


async def test_the_namespace_by_path(target: Live) -> None:
    """Here that of a descriptor; and a mount point that mountinfo writes with an escape."""
    where = f"/proc/{os.getpid()}/fd/{target.fd}"
    async with open_leases(where, ["/with space"]) as leases, leases.hold(["/with space"]):
        assert writable(target) == {*AS_FOUND, b"/with space"}


async def test_a_private_run_directory(target: Live, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    async with open_leases(target.pid, ["/data"], run_dir=directory) as leases:
        (journal,) = directory.iterdir()
        assert journals() == []
        for _ in range(2):
            size = journal.stat().st_size
            async with leases.hold(["/data"]):
                assert target.is_writable(b"/data")
        # The second time: the first brings the worker's record, too.
        assert journal.stat().st_size - size < 100
    assert list(directory.iterdir()) == []


# -- Refused ------------------------------------------------------------------------------------


async def refused(
    kind: type[GhostpoolError], words: str, namespace: int | str, mounts: Sequence[str]
) -> None:
    with pytest.raises(kind, match=words) as caught:
        async with open_leases(namespace, mounts):
            raise AssertionError("it was not refused")
    assert isinstance(caught.value, PlanError)


async def test_what_is_no_mount_point(target: Live) -> None:
    words = r"nothing is mounted on /data/file in .*: that is on the mount on /data$"
    await refused(MountNotFound, words, target.pid, ["/other", "/data/file"])
    await refused(MountNotFound, "nothing is mounted on data", target.pid, ["data"])
    await refused(MountNotFound, "nothing is mounted on /data/ in", target.pid, ["/data/"])


async def test_a_hidden_mount() -> None:
    """No path leads to it."""
    mounts = [tmpfs(2, b"/a"), read_only(3, b"/a/b", parent=2), tmpfs(4, b"/a", parent=2)]
    with live(mounts) as (target,):
        before = target.snapshot()
        await refused(Overmounted, "/a/b in .* is hidden by mount", target.pid, ["/a/b"])
        assert target.snapshot() == before


async def test_a_hidden_mount_that_a_path_leads_past() -> None:
    """Its path leads to what hides it: the kernel's word decides."""
    above = read_only(4, b"/a", "b/", parent=2)
    mounts = [tmpfs(2, b"/a"), read_only(3, b"/a/b", parent=2), above]
    with live(mounts) as (target,):
        before = target.snapshot()
        await refused(Overmounted, "another mount hides it", target.pid, ["/a/b"])
        assert target.snapshot() == before


async def test_a_read_only_superblock() -> None:
    mount = read_only(2, b"/sealed", read_only_superblock=True)
    with live([mount]) as (target,):
        words = r"the superblock of /sealed in .* \(tmpfs\) is read-only"
        await refused(ReadOnlySuperblock, words, target.pid, ["/sealed"])


async def test_the_namespace_of_the_host() -> None:
    """Here this process's own, which counts as it: whatever the mount."""
    await refused(HostNamespace, "never remounted", os.getpid(), ["/"])
    await refused(HostNamespace, "never remounted", "/proc/self/ns/mnt", ["/"])


async def test_no_namespace() -> None:
    await refused(NamespaceNotFound, f"no process has pid {1 << 30}", 1 << 30, ["/"])
    await refused(NamespaceNotFound, "is not a mount namespace", "/proc/self/ns/net", ["/"])


async def test_what_no_leases_were_asked_for(target: Live) -> None:
    """It is said before the others are touched."""
    async with open_leases(target.pid, ["/data"]) as leases:
        with pytest.raises(MountNotFound, match=r"^/other is none of the mounts .*: /data$"):
            async with leases.hold(["/data", "/other"]):
                raise AssertionError("it was not refused")
        assert leases.usage() == {}


async def test_a_mount_that_is_gone_when_it_is_held() -> None:
    with live(MOUNTS) as (target,):
        async with open_leases(target.pid, ["/data"]) as leases:
            target.run(lambda: _linux.umount2(b"/data", _linux.MNT_DETACH))
            with pytest.raises(ghostpool.KernelError, match="taken off since") as caught:
                async with leases.hold(["/data"]):
                    raise AssertionError("it can not be held")
            assert caught.value.errno in (errno.EINVAL, errno.ENOENT)
        assert journals() == []


# -- Ends ---------------------------------------------------------------------------------------


async def test_cancelled_while_it_is_held(target: Live) -> None:
    with anyio.CancelScope() as scope:
        async with open_leases(target.pid, ["/data"]) as leases, leases.hold(["/data"]):
            assert target.is_writable(b"/data")
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert not target.is_writable(b"/data")


async def test_cancelled_at_each_call(target: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a worker or the guardian, from the first look to the last word."""
    call = WorkerClient.call
    scope = anyio.CancelScope()
    left = 0

    async def cancelling(self: WorkerClient, *args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            scope.cancel()
        return await call(self, *args, **options)

    monkeypatch.setattr(WorkerClient, "call", cancelling)
    calls = 0
    held = []
    while left <= 0:
        left, calls = calls, calls + 1
        scope = anyio.CancelScope()
        with scope:
            async with open_leases(target.pid, ["/data"]) as leases, leases.hold(["/data"]):
                held.append(target.is_writable(b"/data"))
        assert not target.is_writable(b"/data")
        assert journals() == []
        assert not children()
    assert calls > 10
    assert held
    assert all(held)


async def test_an_error_of_the_block_comes_out_as_it_is(target: Live) -> None:
    with pytest.raises(KeyError):
        async with open_leases(target.pid, ["/data"]) as leases, leases.hold(["/data"]):
            raise KeyError


async def test_held_beyond_the_end(target: Live) -> None:
    """The end of the block puts it back; whoever still holds it learns of it by its failures."""
    async with AsyncExitStack() as late:
        async with open_leases(target.pid, ["/data"]) as leases:
            await late.enter_async_context(leases.hold(["/data"]))
            assert target.is_writable(b"/data")
        assert not target.is_writable(b"/data")
        with pytest.raises(RuntimeError, match="the block of open_leases is over"):
            await late.enter_async_context(leases.hold(["/data"]))
    assert not target.is_writable(b"/data")


# -- Busy ---------------------------------------------------------------------------------------


@contextmanager
def writer(target: Live) -> Iterator[Callable[[], None]]:
    """What has a process open a file of the mount for writing, and keep it open.

    The process is there before: forked later, it would hold the sockets of the leases open too.
    """
    asked_here, asked_there = os.pipe()
    told_here, told_there = os.pipe()

    def body(ready: Callable[[], None]) -> None:
        enter(target.fd)
        ready()
        os.read(asked_here, 1)
        os.open("/data/file", os.O_WRONLY)
        os.write(told_there, b".")
        while True:
            signal.pause()

    def open_file() -> None:
        os.write(asked_there, b".")
        assert os.read(told_here, 1) == b"."

    try:
        with process(body):
            yield open_file
    finally:
        _linux.close_all((asked_here, asked_there, told_here, told_there))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mountkernel, "BUSY_S", 0.1)


async def test_a_busy_mount_is_tried_again_at_the_end(target: Live, quick: None) -> None:
    with ExitStack() as busy:
        open_file = busy.enter_context(writer(target))
        async with open_leases(target.pid, ["/data"]) as leases:
            with pytest.raises(RevertError, match="stays writable: mount_setattr") as caught:
                async with leases.hold(["/data"]):
                    open_file()
            assert f"-N {target.pid}" in caught.value.command
            assert target.is_writable(b"/data")
            assert list(leases.revert_errors) == ["/data"]
            busy.close()
    assert not target.is_writable(b"/data")


async def test_a_mount_that_stays_busy(target: Live, quick: None) -> None:
    """Said once; the journal stays, for when it is not busy any more."""
    with writer(target) as open_file:
        with pytest.raises(RevertError, match="held for writing by"):
            async with open_leases(target.pid, ["/data"]) as leases, leases.hold(["/data"]):
                open_file()
        assert target.is_writable(b"/data")
        assert len(journals()) == 1
    done = run("recover")
    assert done.status == 0, done
    assert not target.is_writable(b"/data")


async def test_busy_beside_an_error_of_the_block(target: Live, quick: None) -> None:
    async def fail(open_file: Callable[[], None]) -> None:
        async with open_leases(target.pid, ["/data"]) as leases, leases.hold(["/data"]):
            open_file()
            raise KeyError

    with writer(target) as open_file:
        with pytest.raises(ExceptionGroup) as caught:
            await fail(open_file)
        assert [type(leaf) for leaf in caught.value.exceptions] == [KeyError, RevertError]
    assert run("recover").status == 0


# -- Death --------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys
import anyio, ghostpool

async def main():
    async with ghostpool.open_leases(int(sys.argv[1]), ["/data", "/other"]) as leases:
        async with leases.hold(["/data", "/other"]):
            if "fork" in sys.argv and os.fork() == 0:
                while True:
                    signal.pause()
            print("held", flush=True)
            await anyio.sleep_forever()

anyio.run(main, backend=sys.argv[2])
"""


@contextmanager
def program(target: Live, *arguments: str) -> Iterator[tuple[psutil.Process, list[psutil.Process]]]:
    """A program of somebody's that holds leases, and the processes below it."""
    argv = [sys.executable, "-c", PROGRAM, str(target.pid), *arguments]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert read_lines(started, 1) == ["held"]
            assert writable(target) == {*AS_FOUND, b"/data", b"/other"}
            own = psutil.Process(started.pid)
            yield own, own.children(recursive=True)
        finally:
            started.kill()


async def test_the_program_is_killed(target: Live, anyio_backend: str) -> None:
    """The guardian puts the mounts back."""
    with program(target, anyio_backend) as (own, _):
        own.kill()
    assert wait_for(lambda: writable(target) == AS_FOUND)
    assert wait_for(lambda: not children())


async def test_the_program_is_killed_but_for_a_fork_of_it(target: Live) -> None:
    """That has copies of its sockets: the guardian waits for its end."""
    with program(target, "trio", "fork") as (own, below):
        (fork,) = [one for one in below if one.cmdline() == own.cmdline()]
        own.kill()
        own.wait()
        assert children()
        assert writable(target) == {*AS_FOUND, b"/data", b"/other"}
        fork.kill()
    assert wait_for(lambda: writable(target) == AS_FOUND)
    assert wait_for(lambda: not children())


def kill_all(own: psutil.Process, below: Sequence[psutil.Process]) -> None:
    for one in reversed(below):  # the fork server, which is the first of them, comes last
        one.kill()
    own.kill()


@pytest.mark.parametrize("how", ["recover", "the next leases"])
async def test_everything_is_killed(target: Live, anyio_backend: str, how: str) -> None:
    """The journal is what is left."""
    with program(target, anyio_backend) as (own, below):
        assert len(below) == 3  # fork server, worker, guardian
        kill_all(own, below)
    assert wait_for(lambda: not children())
    assert writable(target) == {*AS_FOUND, b"/data", b"/other"}
    assert len(journals()) == 1
    if how == "recover":
        done = run("recover")
        assert done.status == 0, done
        assert done.out.count("read-only again") == 2
    else:
        async with open_leases(target.pid, ["/data"]):
            assert writable(target) == AS_FOUND
    assert writable(target) == AS_FOUND


async def test_the_guardian_is_killed(target: Live) -> None:
    """Nothing is changed any more that it can not be told of; what is held is put back."""
    async with open_leases(target.pid, ["/data", "/other"]) as leases:
        async with leases.hold(["/data"]):
            (server,) = [c for c in psutil.Process().children() if "_forkserver" in cmdline(c)]
            # No worker of the session's own is a session leader: the guardian is one.
            (guardian,) = [c for c in server.children() if os.getsid(c.pid) == c.pid]
            guardian.kill()
            guardian.wait()
            with pytest.raises(WorkerDied, match="guardian"):
                async with leases.hold(["/other"]):
                    raise AssertionError("it can not be held")
            assert not target.is_writable(b"/other")
        assert not target.is_writable(b"/data")


async def test_the_worker_is_killed(target: Live) -> None:
    """Another one puts back what is held."""
    async with open_leases(target.pid, ["/data"]) as leases, leases.hold(["/data"]):
        (server,) = [c for c in psutil.Process().children() if "_forkserver" in cmdline(c)]
        (worker,) = [c for c in server.children() if os.getsid(c.pid) != c.pid]
        worker.kill()
    assert not target.is_writable(b"/data")


def cmdline(one: psutil.Process) -> str:
    return " ".join(one.cmdline())
