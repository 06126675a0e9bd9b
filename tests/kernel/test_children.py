"""Children whose surroundings fail: what becomes of their ends, descriptors and slots."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from ghostpool import _worker
from ghostpool._errors import WorkerDied
from ghostpool._launch import launch
from ghostpool._pool import INSIST, WorkerPool
from ghostpool._process import Child, ForkServer
from ghostpool._workerclient import WorkerClient, WorkerFailure
from ghostpool.testing._forked import in_child

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.anyio]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- The fork server is killed ------------------------------------------------------------------


async def test_child_that_outlives_the_fork_server() -> None:
    """The guardian does, by design: it counts as alive, and can be ended, until it has ended."""
    launched = launch()
    with anyio.fail_after(20):
        async with ForkServer.running(launched) as server:
            worker = await WorkerClient.forked(server)
            guardian = await WorkerClient.forked(server, "guardian")
            await guardian.call("ping")  # it leads its own session by now
            os.kill(launched.pid, signal.SIGKILL)
            # That of the worker comes by its death signal, and nobody else tells of it.
            assert await worker.child.wait() == -signal.SIGKILL
            assert (worker.child.pidfd, server.pids()[1:]) == (-1, [guardian.child.pid])
            assert guardian.child.status is None
            assert await guardian.call("ping") == (guardian.child.pid, [])
            with pytest.raises(WorkerDied, match="fork server is gone"):
                await WorkerClient.forked(server)
            guardian.kill()
            assert await guardian.child.wait() == -signal.SIGKILL
            assert guardian.child.pidfd == -1
            guardian.child.signal(signal.SIGKILL)
            worker.kill()


async def test_fork_server_dies_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever lives then is not waited for, but named, and no descriptor of it is left."""
    launched = launch()
    with anyio.fail_after(20):
        async with ForkServer.running(launched) as server:
            guardian = await WorkerClient.forked(server, "guardian")
            pidfd = os.dup(guardian.child.pidfd)
            await guardian.call("ping")
            os.kill(launched.pid, signal.SIGKILL)
            with pytest.raises(WorkerDied, match="fork server is gone"):
                await WorkerClient.forked(server)
    assert f"process {guardian.child.pid} is left behind" in caplog.text
    assert guardian.child.status is None
    guardian.kill()  # its end is not ours to see any more, but its socket is
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    await anyio.wait_readable(pidfd)
    os.close(pidfd)


# -- A namespace that can not be entered --------------------------------------------------------


def held_by(pid: int) -> list[str]:
    return [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]


async def test_what_is_lent_goes_with_the_request(tmp_path: Path) -> None:
    """Also with one that fails before it begins, since its namespace can not be entered."""
    async with ForkServer.running(launch()) as server:
        worker = await WorkerClient.forked(server)
        lent = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        no_namespace = os.open("/dev/null", os.O_RDONLY)
        try:
            for _ in range(2):
                with pytest.raises(WorkerFailure, match="setns") as caught:
                    await worker.call("ping", namespace=1, namespaces={1: no_namespace}, fds=[lent])
                failure = caught.value.failure
                assert (failure.step, failure.errno) == ("setns", errno.EINVAL)
            assert str(tmp_path) not in held_by(worker.child.pid)
        finally:
            os.close(lent)
            os.close(no_namespace)
        await worker.stop()


# -- A worker that can not be watched -----------------------------------------------------------


class Watcher:
    """Notes the workers that it is told of, and does what the test wants then."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.children: list[Child] = []
        self.do = do

    async def __call__(self, child: Child) -> None:
        self.children.append(child)
        self.do()
        await anyio.lowlevel.checkpoint()


def refuse(error: Exception) -> Callable[[], None]:
    def do() -> None:
        raise error

    return do


@pytest.mark.parametrize("how", ["fails", "cancelled"])
async def test_worker_that_can_not_be_watched_is_ended(how: str) -> None:
    """Another one takes its slot, and is watched."""
    async with ForkServer.running(launch()) as server, WorkerPool.running(server, 1, []) as pool:
        with anyio.CancelScope() as scope:
            do = scope.cancel if how == "cancelled" else refuse(OSError(errno.EMFILE, "dup"))
            watcher = Watcher(do)
            await pool.watch_with(watcher)
            with pytest.raises((OSError, anyio.get_cancelled_exc_class())) as caught:
                await pool.call(0, "ping")
        assert isinstance(caught.value, OSError) == (how == "fails")
        with anyio.fail_after(10):
            assert await watcher.children[0].wait() == -signal.SIGKILL
        watcher.do = lambda: None
        pid, _ = await pool.call(0, "ping")
        assert [child.pid for child in watcher.children[1:]] == [pid]


async def test_undoing_gets_workers_when_the_guardian_is_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many as it would get else; but what changes things fails."""
    async with ForkServer.running(launch()) as server, WorkerPool.running(server, 1, []) as pool:
        watcher = Watcher(refuse(WorkerDied("guardian 1 is gone")))
        await pool.watch_with(watcher)
        with pytest.raises(WorkerDied, match="guardian 1 is gone"):
            await pool.call(0, "ping")
        original = WorkerClient.call
        killed: list[int] = []

        async def call(
            self: WorkerClient, request: str, *args: object, **keywords: object
        ) -> object:
            if request == "ping" and len(killed) < INSIST - 1:
                killed.append(self.child.pid)
                self.child.signal(signal.SIGKILL)
            return await original(self, request, *args, **keywords)  # type: ignore[arg-type]

        monkeypatch.setattr(WorkerClient, "call", call)
        pid, _ = await pool.insist(0, "ping")
        pids = [child.pid for child in watcher.children]
        assert pids == [*killed, pid]
        assert len(pids) == INSIST


def test_a_worker_whose_fork_server_is_gone_already() -> None:
    """It ends by itself, with what it is asked unread: no death signal will come."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"?")
        ours.shutdown(socket.SHUT_WR)
        fd = os.dup(theirs.fileno())

        def child() -> None:
            _worker.main(fd, mount_setattr=True, parent=os.getpid())  # its parent is another

        in_child(child)
        os.close(fd)
        theirs.close()
        with pytest.raises(ConnectionResetError):
            ours.recv(1)
