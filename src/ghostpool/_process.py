"""The coordinator's side of its child processes: the fork server, and what it forks.

What is said to a worker and to the guardian is in _workerclient; builders of namespaces and
commands have one thing to say, which is heard here.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio

from ghostpool import _linux
from ghostpool._channel import Channel
from ghostpool._errors import WorkerDied, WorkerHung, alone
from ghostpool._identity import has_ended
from ghostpool._launch import Launched
from ghostpool._protocol import MAX_FDS
from ghostpool._stall import STALL_S, Vigil, condition
from ghostpool._unbroken import unbroken

log = logging.getLogger("ghostpool")
FORK_S = 15.0
"""How long the fork server may take to fork one child."""
STOP_S = 5.0
"""How long children may take to end after their socket was closed."""
GONE_S = 2.0
"""How long killed children may take to be gone, before they are named as left behind."""
_T = TypeVar("_T")


class Child:
    """A grandchild of the coordinator, forked by the fork server; its end comes as an event."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._ended = anyio.Event()
        self.status: int | None = None
        """Exit status, negative for a signal; None while it lives. Of one that outlived the fork
        server nobody knows it: SIGKILL then."""

    def _end(self, status: int) -> None:
        self.status = status
        self._ended.set()

    async def wait(self) -> int:
        """Wait for its end; exit status, or the negative number of the signal that ended it."""
        await self._ended.wait()
        assert self.status is not None
        return self.status

    @property
    def pidfd(self) -> int:
        """Readable when it has ended; -1 after `close`."""
        return self._pidfd

    def signal(self, number: int) -> None:
        """Send a signal through the pidfd, so that a reused pid is never hit."""
        if self.status is None and self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass

    async def moves(
        self, receive: Callable[[], Awaitable[_T]], stall_s: float, deadline_s: float = math.inf
    ) -> _T:
        """What `receive` gives, which waits for this process.

        WorkerHung: it shows no sign of life for `stall_s` seconds. TimeoutError: it does, but
        `deadline_s` seconds are over. `receive` is cancelled now and then, and must lose nothing.
        """
        vigil = Vigil(self._pidfd, stall_s)
        give_up = anyio.current_time() + deadline_s
        while True:
            left_s = give_up - anyio.current_time()
            with anyio.move_on_after(min(vigil.interval_s, left_s)):
                return await receive()
            now = anyio.current_time()
            if now >= give_up:
                raise TimeoutError
            if vigil.hangs(now):
                raise WorkerHung(f"no sign of life for {stall_s:g} s ({condition(self._pidfd)})")

    def close(self) -> None:
        """Let go of the pidfd."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class ForkServer:
    """The running fork server. Made by `running`, which also ends it and all its workers."""

    def __init__(self, launched: Launched, stall_s: float) -> None:
        self._launched = launched
        self.stall_s = stall_s
        """Seconds without a sign of life after which a child that owes an answer hangs."""
        self._channel = Channel(launched.socket)
        self._lock = anyio.Lock()
        self._answers: list[Child | int] = []
        self._answered = anyio.Event()
        self._children: dict[int, Child] = {}
        self._dead = False
        self._listening = anyio.CancelScope(shield=True)

    @classmethod
    @asynccontextmanager
    async def running(
        cls, launched: Launched, stall_s: float = STALL_S
    ) -> AsyncIterator[ForkServer]:
        """The fork server for the time of the block.

        At its end every child is gone; but for one that not even SIGKILL ends, which is named.
        """
        server = cls(launched, stall_s)
        failed: BaseException | None = None
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(server._listen)
                try:
                    yield server
                finally:
                    server._listening.cancel()
        except BaseExceptionGroup as error:
            failed = alone(error)
        finally:
            server._channel.close()
            await unbroken(server._see_all_off)
        if failed is not None:
            raise failed

    async def _see_all_off(self) -> None:
        await _reap(self._launched)
        # They die with it.
        give_up = anyio.current_time() + GONE_S
        for child in self._children.values():
            await _see_off(child.pidfd, f"process {child.pid}", give_up)
            child.close()

    def pids(self) -> list[int]:
        """The fork server itself, then its children."""
        return [self._launched.pid, *self._children]

    @property
    def pid(self) -> int:
        return self._launched.pid

    @property
    def pidfd(self) -> int:
        """Readable when it has ended; this object's."""
        return self._launched.pidfd

    @property
    def dead(self) -> bool:
        """It was seen to end before its time: nothing can be forked any more."""
        return self._dead

    async def _listen(self) -> None:
        # Shielded: whoever undoes things after a cancellation needs new workers.
        with self._listening:
            await self._dispatch()

    async def _dispatch(self) -> None:
        while True:
            try:
                message, fds = await self._channel.receive()
            except anyio.EndOfStream:
                self._dead = True
                self._answered.set()
                await self._see_orphans_end()
                return
            if message[0] == "forked":
                child = self._children[message[1]] = Child(message[1], fds[0])
                self._answers.append(child)
                self._answered.set()
            elif message[0] == "failed":
                self._answers.append(message[1])
                self._answered.set()
            elif message[0] == "exit":
                self._bury(message[1], message[2])

    async def _see_orphans_end(self) -> None:
        """Nobody tells of ends any more. Workers die with the fork server, but uninterruptible
        sleep delays that; the guardian and commands live on."""
        async with anyio.create_task_group() as group:
            for child in self._children.values():
                group.start_soon(self._see_end, child)

    async def _see_end(self, child: Child) -> None:
        await anyio.wait_readable(child.pidfd)
        self._bury(child.pid, -signal.SIGKILL)

    def _bury(self, pid: int, status: int) -> None:
        child = self._children.pop(pid)
        child._end(status)
        child.close()

    async def fork(self, kind: str, *arguments: object, fds: list[int]) -> Child:
        """Fork one child. WorkerDied if the fork server is gone."""
        # Shielded: a child that was forked must be known, or nobody would end it.
        async with self._lock:
            # And bounded: a fork server that was stopped must not hang who undoes things.
            with anyio.move_on_after(FORK_S, shield=True) as scope:
                child = await self._fork(kind, arguments, fds)
            if scope.cancelled_caught:
                # Its answer may still come, and is none to the next question.
                self._dead = True
                raise WorkerDied(
                    f"the fork server (process {self._launched.pid}) gave no answer within "
                    f"{FORK_S:g} s"
                )
        if isinstance(child, int):
            raise WorkerDied(f"the fork server can not fork: {os.strerror(child)}")
        return child

    async def _fork(self, kind: str, arguments: tuple[object, ...], fds: list[int]) -> Child | int:
        if self._dead:
            raise WorkerDied("the fork server is gone")
        sent = 0
        try:
            while len(fds) - sent > MAX_FDS:
                await self._channel.send(("fds",), fds[sent : sent + MAX_FDS])
                sent += MAX_FDS
            await self._channel.send((kind, *arguments), fds[sent:])
        except OSError as error:
            raise WorkerDied(f"the fork server is gone: {error}") from error
        while not self._answers:
            if self._dead:
                raise WorkerDied("the fork server is gone")
            self._answered = anyio.Event()
            await self._answered.wait()
        return self._answers.pop(0)

    async def build(self, specs: object) -> list[int]:
        """Have a fresh child build mount namespaces; their descriptors, in order.

        BuildFailed: the child says why it could not.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        channel = Channel(ours.detach())
        try:
            try:
                child = await self.fork("build", specs, fds=[theirs.fileno()])
            finally:
                theirs.close()
            namespaces: list[int] = []
            message: Any = None
            try:
                while message is None:
                    message, fds = await child.moves(channel.receive, self.stall_s)
                    namespaces += fds
            except BaseException as error:
                child.signal(signal.SIGKILL)
                _linux.close_all(namespaces)
                if isinstance(error, WorkerHung):
                    raise WorkerHung(f"the namespace builder {child.pid} hangs: {error}") from None
                if isinstance(error, anyio.EndOfStream):
                    raise WorkerDied("the namespace builder ended without an answer") from None
                raise
            ok, result = message
            if not ok:
                raise BuildFailed(*result)
            return namespaces
        finally:
            channel.close()

    async def user_maps(self, user_namespace: int) -> tuple[str, str]:
        """The uid_map and gid_map of a user namespace, as this process has to see them.

        MapsHidden: it can not be entered. WorkerDied: who was to enter it was killed.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        channel = Channel(ours.detach())
        try:
            try:
                child = await self.fork("user_maps", fds=[theirs.fileno(), user_namespace])
            finally:
                theirs.close()
            try:
                failure, _ = await child.moves(channel.receive, self.stall_s)
                if failure is not None:
                    raise MapsHidden(*failure)
                maps = [_map_of(child.pid, name) for name in ("uid_map", "gid_map")]
                # They are its own only if it was still there after they were read.
                if has_ended(child.pidfd):
                    raise anyio.EndOfStream
            except anyio.EndOfStream:
                raise WorkerDied("who reads the maps of a user namespace was killed") from None
            except WorkerHung as error:
                raise WorkerHung(f"process {child.pid} hangs: {error}") from None
            finally:
                child.signal(signal.SIGKILL)
            return maps[0], maps[1]
        finally:
            channel.close()

    async def command(
        self,
        argv: list[bytes],
        environment: Mapping[bytes, bytes],
        namespace: int,
        descriptors: Mapping[int, int],
        soft_limit: int,
        capabilities: int,
        user_namespace: int = -1,
    ) -> Child:
        """Start a command in a mount namespace with exactly these descriptors.

        With a `user_namespace`, it is the root of that.

        `descriptors`: number in the command to descriptor here. Standard input, output and error
        are the coordinator's where they are not among them. Of the `capabilities` it has those
        that this process has.
        CommandFailed if it can not be executed.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        status = Channel(ours.detach())
        try:
            inside = [user_namespace] if user_namespace >= 0 else []
            fds = [theirs.fileno(), namespace, 0, 1, 2, *descriptors.values(), *inside]
            try:
                core_limit, _ = resource.getrlimit(resource.RLIMIT_CORE)
                child = await self.fork(
                    "spawn",
                    argv,
                    dict(environment),
                    list(descriptors),
                    soft_limit,
                    core_limit,
                    int(capabilities),
                    bool(inside),
                    fds=fds,
                )
            finally:
                theirs.close()
            try:
                (step, code), _ = await child.moves(status.receive, self.stall_s)
            except anyio.EndOfStream:
                return child
            except BaseException as error:
                child.signal(signal.SIGKILL)
                if isinstance(error, WorkerHung):
                    raise WorkerHung(f"the command {child.pid} hangs before it: {error}") from None
                raise
            raise CommandFailed(step, code)
        finally:
            status.close()


class BuildFailed(Exception):
    """The namespace builder says why: errno, system call, path and mount id as attributes."""

    def __init__(self, errno: int, syscall: str, path: str, mount_id: int) -> None:
        self.errno = errno
        self.syscall = syscall
        self.path = path
        self.mount_id = mount_id
        super().__init__(f"{path}: {syscall}: {os.strerror(errno)}")


class MapsHidden(Exception):
    """A user namespace can not be entered: errno and system call as attributes."""

    def __init__(self, errno: int, step: str) -> None:
        self.errno = errno
        self.step = step
        super().__init__(f"{step}: {os.strerror(errno)}")


class CommandFailed(Exception):
    """A command was not executed: the step that failed and its errno."""

    def __init__(self, step: str, errno: int) -> None:
        self.step = step
        self.errno = errno
        super().__init__(f"{step}: {os.strerror(errno)}")


def _map_of(pid: int, name: str) -> str:
    try:
        with open(f"/proc/{pid}/{name}", encoding="ascii") as file:
            return file.read()
    except OSError:
        raise anyio.EndOfStream from None


async def _reap(launched: Launched) -> None:
    """Wait for the fork server; kill it if it does not end by itself."""
    pid, pidfd = launched.pid, launched.pidfd
    try:
        with anyio.move_on_after(STOP_S):
            await anyio.wait_readable(pidfd)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        give_up = anyio.current_time() + GONE_S
        await _see_off(pidfd, f"the fork server (process {pid})", give_up)
        try:
            os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222  returns at once
        except ChildProcessError:
            # The program has: it waits for whatever child there is, or ignores SIGCHLD: wait(2).
            pass
    finally:
        os.close(pidfd)


async def _see_off(pidfd: int, name: str, give_up: float) -> None:
    """Wait for the end of a process until `give_up`; name it if that does not come."""
    if pidfd < 0:
        return
    with anyio.move_on_after(give_up - anyio.current_time()):
        await anyio.wait_readable(pidfd)
    if not has_ended(pidfd):
        log.warning("%s is left behind, %s", name, condition(pidfd))
