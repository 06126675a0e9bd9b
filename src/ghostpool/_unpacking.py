"""The coordinator's side of the unpacker: contents out of a packed archive, as streams.

It is started when the first content is asked for, and is gone with the block. What it does wrong,
or that it has died, is one error; nothing else that it says matters, since its bytes go
into ghosts as the archive's would.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio

from ghostpool._channel import receive_some
from ghostpool._errors import RestoreError
from ghostpool._launch import execute, package_root
from ghostpool._model import Extent, Images
from ghostpool._protocol import rights
from ghostpool._reading import SILENCE_S, STOP_S, processor_s, why_it_ended
from ghostpool._said import LENGTH

GAP: Final = 64 << 20
"""Bytes to be passed over for which whoever waits for the next ones is not kept waiting."""
_BOOT: Final = "import sys; sys.path += {paths!r}; from ghostpool import _unpacker as u; u.main(3)"
_WHO: Final = "the process that unpacks the archive"
_MAX_ANSWER: Final = 1 << 16


class Unpacking:
    """Contents of the archive `archive`, a descriptor that is only borrowed."""

    def __init__(self, images: Images, archive: int) -> None:
        self._images = images
        self._archive = archive
        self._socket: socket.socket | None = None
        self._pid = -1
        self._pidfd = -1
        self._turn = anyio.Lock()

    @classmethod
    @asynccontextmanager
    async def running(cls, images: Images, archive: int) -> AsyncIterator[Unpacking]:
        """For the time of the block; at its end its process is gone."""
        unpacking = cls(images, archive)
        try:
            yield unpacking
        finally:
            with anyio.CancelScope(shield=True):
                await unpacking.stop()

    async def stream(self, extents: Sequence[Extent]) -> int:
        """A descriptor that gives the bytes of these extents, one after the other.

        It is there when the first byte is. RestoreError: the archive can not be unpacked any more.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                async with self._turn:
                    if self._socket is None:
                        await self._start()
                    runs = [(extent.position, extent.length) for extent in extents]
                    await self._say(runs, [theirs.fileno()])
                    await self._answer()
        except BaseException:
            ours.close()
            raise
        return ours.detach()

    async def problem(self) -> RestoreError | None:
        """What went wrong with it; None: nothing that it would have said by now."""
        with anyio.move_on_after(1):
            try:
                await self._answer()
            except RestoreError as error:
                return error
        return None

    async def stop(self) -> None:
        """End its process."""
        if self._socket is None:
            return
        self._socket.close()
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        with anyio.move_on_after(STOP_S):
            await anyio.wait_readable(self._pidfd)
        os.close(self._pidfd)
        try:
            os.waitpid(self._pid, os.WNOHANG)  # noqa: ASYNC222  it does not wait
        except ChildProcessError:
            pass  # it was asked for its status

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            paths = [package_root(), *filter(os.path.isabs, sys.path)]
            self._pid = execute(_BOOT.format(paths=paths), theirs.fileno(), null=(0, 1, 2))
        self._pidfd = os.pidfd_open(self._pid)
        ours.setblocking(False)
        self._socket = ours
        await self._say(self._images.unpacking, [self._archive])

    async def _say(self, value: Any, fds: list[int]) -> None:
        assert self._socket is not None
        body = json.dumps(value).encode()
        data = LENGTH.pack(len(body)) + body
        try:
            with anyio.fail_after(SILENCE_S):
                while data:
                    try:
                        sent = self._socket.sendmsg([data], rights(fds) if fds else ())
                        data, fds = data[sent:], []
                    except BlockingIOError:
                        await anyio.wait_writable(self._socket)
        except TimeoutError:
            raise self._error(f"has said nothing for {SILENCE_S:g} s") from None
        except ConnectionError:
            raise await self._died() from None

    async def _answer(self) -> None:
        """Wait until it is where it was sent."""
        while True:
            try:
                kind, value = await self._frame()
            except TimeoutError:
                raise self._error(f"has said nothing for {SILENCE_S:g} s") from None
            except (anyio.EndOfStream, ConnectionError):
                raise await self._died() from None
            except (ValueError, TypeError, RecursionError):
                raise self._error("makes no sense") from None
            if kind == "at":
                return
            if kind == "error":
                raise RestoreError(
                    f"{self._images.directory}: can not be unpacked: {str(value)[:1000]}"
                )

    async def _frame(self) -> tuple[Any, Any]:
        (length,) = LENGTH.unpack(await self._take(LENGTH.size))
        if length > _MAX_ANSWER:
            raise ValueError
        kind, value = json.loads(await self._take(length))
        return kind, value

    async def _take(self, length: int) -> bytes:
        assert self._socket is not None
        data = b""
        with anyio.fail_after(SILENCE_S):
            while len(data) < length:
                piece, _, _ = await receive_some(self._socket, length - len(data))
                data += piece
        return data

    async def _died(self) -> RestoreError:
        with anyio.move_on_after(STOP_S):
            await anyio.wait_readable(self._pidfd)
        return RestoreError(
            f"{self._images.directory}: "
            f"{why_it_ended(self._pidfd, _WHO, processor_s(self._archive))}"
        )

    def _error(self, what: str) -> RestoreError:
        return RestoreError(f"{self._images.directory}: {_WHO} {what}")


__all__ = ["GAP", "Unpacking"]
