"""The coordinator's side of one worker, or of the guardian, which is one too.

A call to a worker is one frame there and one (or a few) back. The next may be sent before that:
answers come in the order of the requests. Once sent, its outcome has to be known, so a cancelled
call still waits for the answer for a moment; a worker that gives none is killed, and whoever
undoes its work asks another one (docs/design.md, D-007).
"""

from __future__ import annotations

import math
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anyio

from ghostpool import _linux
from ghostpool._channel import Channel
from ghostpool._errors import WorkerDied, WorkerHung
from ghostpool._model import MountHandle
from ghostpool._process import STOP_S, Child, ForkServer
from ghostpool._protocol import MAX_FDS, Failure, encode
from ghostpool._stall import condition

SEND_S = 10.0
"""How long a worker may take to read a request that it is waiting for."""
_SMALL = 1 << 16
"""Bytes: two such requests fit the buffer of a socket."""
CANCEL_GRACE_S = 2.0
"""How long a cancelled call waits for its answer before its worker is killed."""


class WorkerFailure(Exception):
    """A worker says that one operation of a batch failed."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure)


class WorkerClient:
    """One worker process: its socket, who waits for which answer, and what it has been given."""

    def __init__(self, name: str, child: Child, channel: Channel, stall_s: float) -> None:
        self.name = name
        """For messages."""
        self._stall_s = stall_s
        self.child = child
        self._channel = channel
        self._lock = anyio.Lock()
        self._mounts: set[int] = set()
        self._namespaces: set[int] = set()
        self._answered = anyio.Event()
        """The request that was sent last has its answer, or never will."""
        self._answered.set()
        self._answered_before = self._answered
        """Likewise for the one before."""
        self._waiting = 0
        """How many wait for an answer."""
        self._end: WorkerHung | None = None
        """Why it was killed, for those who wait for a later answer."""
        self._received: list[int] = []
        """Descriptors of an answer of which the last frame is still to come."""
        self.alive: bool = True

    @classmethod
    async def forked(
        cls,
        server: ForkServer,
        kind: str = "worker",
        *,
        mount_setattr: bool = True,
        devices: bool = False,
        acting: bool = False,
    ) -> WorkerClient:
        """Fork a worker, or the guardian, which is one too.

        `mount_setattr=False` makes it do as on Linux before 5.12. `devices`: it may make them.
        `acting`: it may own files as somebody else.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            extra = [devices, acting] if devices or acting else []
            child = await server.fork(kind, mount_setattr, *extra, fds=[theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(f"{kind} {child.pid}", child, Channel(ours.detach()), server.stall_s)

    async def call(
        self,
        request: str,
        *arguments: object,
        namespace: int = -1,
        acting: tuple[int, int] | None = None,
        namespaces: Mapping[int, int] | None = None,
        mounts: Mapping[MountHandle, int] | None = None,
        fds: Iterable[int] = (),
        deadline_s: float = math.inf,
        stall_s: float = math.inf,
        sent: Callable[[], object] = lambda: None,
    ) -> tuple[Any, list[int]]:
        """Have one request done; its result, and the descriptors that came with it.

        `sent` is called as soon as the request is sent.

        `namespace` is entered first; `acting` owns what is made there, ghostpool if it is None.
        `namespaces` and `mounts` (number to descriptor here) are
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
            numbers = (namespace, acting, list(new_namespaces), list(new_mounts))
            passed = [*new_namespaces.values(), *new_mounts.values(), *fds]
            # What may have arrived needs not be sent again, and what has not, dies with it.
            self._namespaces.update(new_namespaces)
            self._mounts.update(new_mounts)
            frame = encode((*numbers, request, *arguments), passed)
            # Where two are under way, or a large one would not fit the socket's buffer, a worker
            # that is busy is not one that does not read.
            await (self._answered if len(frame[1]) > _SMALL else self._answered_before).wait()
            with self._errors(request):
                self._check_alive()
                try:
                    with anyio.fail_after(SEND_S, shield=True):
                        await self._channel.send_frame(frame, passed)
                except OSError:  # a timeout is one
                    raise
                except BaseException:
                    self.kill()  # half a frame may be there
                    raise
            before, answered = self._answered, anyio.Event()
            self._answered_before, self._answered = before, answered
            self._waiting += 1
        sent()
        try:
            ok, result, received = await self._turn(before, request, stall_s, deadline_s)
        finally:
            answered.set()
            self._waiting -= 1
            self._close_if_dead()
        if not ok:
            _linux.close_all(received)
            failure = Failure(*result)
            if failure.at < 0 and not failure.errno:
                # No system call and no check of its own: what it knows can not be relied on.
                self.kill()
                raise WorkerDied(f"{self.name} was ended, it failed in {failure.step}")
            raise WorkerFailure(failure)
        return result, received

    async def _turn(
        self, before: anyio.Event, request: str, stall_s: float, deadline_s: float
    ) -> tuple[bool, Any, list[int]]:
        """The answer to a request that was sent, after the one that was sent before it."""
        try:
            await before.wait()
            with self._errors(request):
                self._check_alive()
                return await self.child.moves(self._answer, min(stall_s, self._stall_s), deadline_s)
        except (WorkerDied, WorkerHung):
            raise
        except BaseException:
            await self._abandon(before)
            raise

    def _close_if_dead(self) -> None:
        if not self.alive and not self._waiting:
            self._channel.close()

    def _check_alive(self) -> None:
        if not self.alive:
            raise self._end or anyio.EndOfStream

    @contextmanager
    def _errors(self, request: str) -> Iterator[None]:
        """What goes wrong with a worker is its end."""
        try:
            yield
        except WorkerHung as error:
            if self._end is None:
                self.kill()
                # Whoever waits for a later answer is to hear the same.
                self._end = WorkerHung(f"{self.name} hangs during {request!r}: {error}")
            raise WorkerHung(str(self._end)) from None
        except TimeoutError as error:
            doing = condition(self.child.pidfd)
            self.kill()
            raise WorkerDied(f"{self.name} gave no answer to {request!r} ({doing})") from error
        except (anyio.EndOfStream, OSError) as error:
            self.kill()
            raise WorkerDied(f"{self.name} ended during {request!r}") from error

    async def _hand_over(self, mounts: dict[MountHandle, int]) -> None:
        """Send ahead what would not fit the descriptors of one frame."""
        if len(mounts) > MAX_FDS - 20:
            await self._answered.wait()
        while len(mounts) > MAX_FDS - 20:
            some = [mounts.popitem() for _ in range(MAX_FDS - 20)]
            message: tuple[object, ...] = (-1, None, [], [handle for handle, _ in some], "ping")
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

    async def _abandon(self, before: anyio.Event) -> None:
        """The caller was cancelled: wait for the answer a moment, then give the worker up."""
        answered = False
        with anyio.move_on_after(CANCEL_GRACE_S, shield=True):
            await before.wait()
            try:
                if not self.alive:
                    return
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
        """End it at once (SIGKILL); its socket is closed when nobody waits for an answer."""
        self.alive = False
        self.child.signal(signal.SIGKILL)
        _linux.close_all(self._received)
        self._received = []
        self._channel.shutdown()
        self._close_if_dead()

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
