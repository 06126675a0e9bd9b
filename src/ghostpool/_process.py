"""The coordinator's side of its child processes: fork server, workers, commands.

A call to a worker is one frame there and one (or a few) back. Once sent, its outcome has to be
known, so a cancelled call still waits for the answer for a moment; a worker that gives none is
killed, and whoever undoes its work asks another one (docs/design.md, D-007).
"""

from __future__ import annotations

import errno
import logging
import marshal
import math
import os
import resource
import select
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio

from ghostpool import _linux
from ghostpool._capabilities import COMMAND
from ghostpool._errors import WorkerDied, WorkerHung, alone
from ghostpool._launch import Launched
from ghostpool._model import MountHandle
from ghostpool._protocol import (
    FLIGHT_S,
    FLIGHT_STEP_S,
    HEADER,
    MAX_FDS,
    MAX_FRAME,
    Failure,
    encode,
    rights,
    take_rights,
)
from ghostpool._stall import STALL_S, Vigil, condition

log = logging.getLogger("ghostpool")
FORK_S = 15.0
"""How long the fork server may take to fork one child."""
SEND_S = 10.0
"""How long a worker may take to read a request that it is waiting for."""
CANCEL_GRACE_S = 2.0
"""How long a cancelled call waits for its answer before its worker is killed."""
STOP_S = 5.0
"""How long children may take to end after their socket was closed."""
GONE_S = 2.0
"""How long killed children may take to be gone, before they are named as left behind."""
_T = TypeVar("_T")
_CMSG_SPACE = socket.CMSG_SPACE(253 * 4)


class Channel:
    """A frame channel for one sender and one receiver at a time; works on trio and asyncio."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._header = b""
        self._body = bytearray()
        self._fds: list[int] = []

    async def send(self, message: object, fds: list[int] | None = None) -> None:
        """Send one message. OSError (EPIPE, ECONNRESET) if the other end is gone."""
        header, body = encode(message, fds or [])
        await self._send_part(header, fds or [])
        view = memoryview(body)
        while view:
            view = view[await self._send_part(view, []) :]

    async def _send_part(self, data: bytes | memoryview, fds: list[int]) -> int:
        give_up = anyio.current_time() + FLIGHT_S
        while True:
            try:
                return self._socket.sendmsg([data], rights(fds), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await anyio.wait_writable(self._socket)
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS or anyio.current_time() > give_up:
                    raise
                await anyio.sleep(FLIGHT_STEP_S)

    async def receive(self) -> tuple[Any, list[int]]:
        """The next message. anyio.EndOfStream when the other end has closed.

        A cancelled receive loses nothing: the next one goes on where it was.
        """
        while len(self._header) < HEADER.size:
            # Descriptors come with the header's first byte; it is received alone, so that a
            # receive never takes those of the frame after.
            self._header += await self._some(HEADER.size - len(self._header), _CMSG_SPACE)
        length, count, _ = HEADER.unpack(self._header)
        if length > MAX_FRAME or count != len(self._fds):
            raise anyio.EndOfStream
        while len(self._body) < length:
            self._body += await self._some(length - len(self._body))
        message = marshal.loads(self._body)  # noqa: S302  written by our own child
        fds = self._fds
        self._header, self._body, self._fds = b"", bytearray(), []
        return message, fds

    async def _some(self, most: int, space: int = 0) -> bytes:
        """At least one byte; descriptors that come with it, in `space` bytes, are kept aside."""
        while True:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    most, space, socket.MSG_CMSG_CLOEXEC
                )
                break
            except BlockingIOError:
                await anyio.wait_readable(self._socket)
            except ConnectionError:
                raise anyio.EndOfStream from None
        if not data:
            raise anyio.EndOfStream
        self._fds += take_rights(ancillary, flags)
        return data

    def close(self) -> None:
        """Close at once; closing twice is harmless."""
        self._socket.close()
        _linux.close_all(self._fds)
        self._fds = []


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
            with anyio.CancelScope(shield=True):
                await _reap(launched.pid)
                # They die with it.
                give_up = anyio.current_time() + GONE_S
                for child in server._children.values():
                    await _see_off(child.pidfd, f"process {child.pid}", give_up)
                    child.close()
        if failed is not None:
            raise failed

    def pids(self) -> list[int]:
        """The fork server itself, then its children."""
        return [self._launched.pid, *self._children]

    @property
    def pid(self) -> int:
        return self._launched.pid

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

    async def worker(
        self, kind: str = "worker", *, mount_setattr: bool = True, devices: bool = False
    ) -> Worker:
        """Fork a worker, or the guardian, which is one too.

        `mount_setattr=False` makes it do as on Linux before 5.12. `devices`: it may make them.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            extra = [True] if devices else []
            child = await self.fork(kind, mount_setattr, *extra, fds=[theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Worker(f"{kind} {child.pid}", child, Channel(ours.detach()), self.stall_s)

    async def build(self, specs: object) -> list[int]:
        """Have a fresh child build mount namespaces; their descriptors, in order.

        Returns what the child answered; a failure comes as WorkerFailure.
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

    async def command(
        self,
        argv: list[bytes],
        environment: Mapping[bytes, bytes],
        namespace: int,
        descriptors: Mapping[int, int],
        soft_limit: int,
        capabilities: int = COMMAND,
    ) -> Child:
        """Start a command in a mount namespace with exactly these descriptors.

        `descriptors`: number in the command to descriptor here. Standard input, output and error
        are the coordinator's where they are not among them. Of the `capabilities` it has those
        that this process has.
        CommandFailed if it can not be executed.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        status = Channel(ours.detach())
        try:
            fds = [theirs.fileno(), namespace, 0, 1, 2, *descriptors.values()]
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


class CommandFailed(Exception):
    """A command was not executed: the step that failed and its errno."""

    def __init__(self, step: str, errno: int) -> None:
        self.step = step
        self.errno = errno
        super().__init__(f"{step}: {os.strerror(errno)}")


class WorkerFailure(Exception):
    """A worker says that one operation of a batch failed."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure)


class Worker:
    """One worker process: a lock around its socket, and what it has been given so far."""

    def __init__(self, name: str, child: Child, channel: Channel, stall_s: float) -> None:
        self.name = name
        """For messages."""
        self._stall_s = stall_s
        self.child = child
        self._channel = channel
        self._lock = anyio.Lock()
        self._mounts: set[int] = set()
        self._namespaces: set[int] = set()
        self._received: list[int] = []
        """Descriptors of an answer of which the last frame is still to come."""
        self.alive = True

    async def call(
        self,
        request: str,
        *arguments: object,
        namespace: int = -1,
        namespaces: Mapping[int, int] | None = None,
        mounts: Mapping[MountHandle, int] | None = None,
        fds: Iterable[int] = (),
        deadline_s: float = math.inf,
        stall_s: float = math.inf,
    ) -> tuple[Any, list[int]]:
        """Have one request done; its result, and the descriptors that came with it.

        `namespace` is entered first. `namespaces` and `mounts` (number to descriptor here) are
        sent along as far as this worker lacks them. WorkerFailure if the operation failed,
        WorkerDied if the worker ended, or gave no answer within `deadline_s` seconds, WorkerHung
        if it shows no sign of life for `stall_s` seconds (or those that hold for all workers, if
        they are fewer). It is killed then.
        """
        async with self._lock:
            if not self.alive:
                raise WorkerDied(f"{self.name} is gone")
            new_namespaces = {
                key: fd for key, fd in (namespaces or {}).items() if key not in self._namespaces
            }
            new_mounts = {key: fd for key, fd in (mounts or {}).items() if key not in self._mounts}
            try:
                await self._hand_over(new_mounts)
            except (anyio.EndOfStream, OSError) as error:
                self.kill()
                raise WorkerDied(f"{self.name} ended") from error
            numbers = (namespace, list(new_namespaces), list(new_mounts))
            passed = [*new_namespaces.values(), *new_mounts.values(), *fds]
            # What may have arrived needs not be sent again, and what has not, dies with it.
            self._namespaces |= new_namespaces.keys()
            self._mounts |= new_mounts.keys()
            try:
                with anyio.fail_after(SEND_S, shield=True):
                    await self._channel.send((*numbers, request, *arguments), passed)
                ok, result, received = await self.child.moves(
                    self._answer, min(stall_s, self._stall_s), deadline_s
                )
            except WorkerHung as error:
                self.kill()
                raise WorkerHung(f"{self.name} hangs during {request!r}: {error}") from None
            except TimeoutError as error:
                doing = condition(self.child.pidfd)
                self.kill()
                raise WorkerDied(f"{self.name} gave no answer to {request!r} ({doing})") from error
            except (anyio.EndOfStream, OSError) as error:
                self.kill()
                raise WorkerDied(f"{self.name} ended during {request!r}") from error
            except BaseException:
                await self._abandon()
                raise
            if not ok:
                _linux.close_all(received)
                failure = Failure(*result)
                if failure.at < 0 and not failure.errno:
                    # No system call and no check of its own: what it knows can not be relied on.
                    self.kill()
                    raise WorkerDied(f"{self.name} was ended, it failed in {failure.step}")
                raise WorkerFailure(failure)
            return result, received

    async def _hand_over(self, mounts: dict[MountHandle, int]) -> None:
        """Send ahead what would not fit the descriptors of one frame."""
        while len(mounts) > MAX_FDS - 20:
            some = [mounts.popitem() for _ in range(MAX_FDS - 20)]
            message: tuple[object, ...] = (-1, [], [handle for handle, _ in some], "ping")
            with anyio.fail_after(SEND_S, shield=True):
                await self._channel.send(message, [fd for _, fd in some])
                await self._answer()
            self._mounts |= {handle for handle, _ in some}

    async def _answer(self) -> tuple[bool, Any, list[int]]:
        while True:
            message, fds = await self._channel.receive()
            self._received += fds
            if message is not None:
                received, self._received = self._received, []
                return message[0], message[1], received

    async def _abandon(self) -> None:
        """The caller was cancelled: wait for the answer a moment, then give the worker up."""
        answered = False
        with anyio.move_on_after(CANCEL_GRACE_S, shield=True):
            try:
                _, _, received = await self._answer()
                _linux.close_all(received)
                answered = True
            except (anyio.EndOfStream, OSError):
                pass
        if not answered:
            self.kill()

    def learned(self, handles: Iterable[MountHandle]) -> None:
        """Bookkeeping: the worker opened these itself."""
        self._mounts |= set(handles)

    def kill(self) -> None:
        """End it at once (SIGKILL); its socket is closed."""
        self.alive = False
        self.child.signal(signal.SIGKILL)
        _linux.close_all(self._received)
        self._received = []
        self._channel.close()

    def let_go(self) -> None:
        """Close its socket and leave it to itself; for the guardian, which has more to do then."""
        self.alive = False
        self._channel.close()

    async def stop(self) -> int | None:
        """End it in good order; its peak resident set in bytes, or None if it was dead already."""
        if not self.alive:
            return None
        try:
            (peak,), _ = await self.call("finish", deadline_s=STOP_S)
        except (WorkerDied, WorkerFailure):
            return None
        self.alive = False
        self._channel.close()
        with anyio.move_on_after(STOP_S):
            await self.child.wait()
        self.child.signal(signal.SIGKILL)
        return int(peak)


async def _reap(pid: int) -> None:
    """Wait for a child of this process; kill it if it does not end by itself."""
    pidfd = os.pidfd_open(pid)
    try:
        with anyio.move_on_after(STOP_S):
            await anyio.wait_readable(pidfd)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        give_up = anyio.current_time() + GONE_S
        await _see_off(pidfd, f"the fork server (process {pid})", give_up)
        os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222  returns at once
    finally:
        os.close(pidfd)


async def _see_off(pidfd: int, name: str, give_up: float) -> None:
    """Wait for the end of a process until `give_up`; name it if that does not come."""
    if pidfd < 0:
        return
    with anyio.move_on_after(give_up - anyio.current_time()):
        await anyio.wait_readable(pidfd)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(0):
        log.warning("%s is left behind, %s", name, condition(pidfd))
