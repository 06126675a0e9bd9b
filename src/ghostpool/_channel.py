"""Frames over a socket on an event loop; the children's end is _protocol.BlockingChannel."""

from __future__ import annotations

import errno
import marshal
import socket
from typing import Any

import anyio

from ghostpool import _linux
from ghostpool._protocol import (
    FLIGHT_S,
    FLIGHT_STEP_S,
    HEADER,
    MAX_FRAME,
    encode,
    rights,
    take_rights,
)

_CMSG_SPACE = socket.CMSG_SPACE(253 * 4)


async def receive_some(
    end: socket.socket, most: int, space: int = 0
) -> tuple[bytes, list[tuple[int, int, bytes]], int]:
    """At least one byte of a stream, what came with it in `space` bytes, and the flags.

    Descriptors for which there is no space are closed by the kernel. anyio.EndOfStream when the
    other end has closed.
    """
    while True:
        try:
            data, ancillary, flags, _ = end.recvmsg(most, space, socket.MSG_CMSG_CLOEXEC)
            break
        except BlockingIOError:
            await anyio.wait_readable(end)
        except ConnectionError:
            raise anyio.EndOfStream from None
    if not data:
        raise anyio.EndOfStream
    return data, ancillary, flags


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
        await self.send_frame(encode(message, fds or []), fds)

    async def send_frame(self, frame: tuple[bytes, bytes], fds: list[int] | None = None) -> None:
        """The same for a message that is encoded already, with as many descriptors."""
        header, body = frame
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
        data, ancillary, flags = await receive_some(self._socket, most, space)
        self._fds += take_rights(ancillary, flags)
        return data

    def shutdown(self) -> None:
        """End of the stream for whoever waits here or there; `close` is still to come."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended

    def close(self) -> None:
        """Close at once; closing twice is harmless."""
        self._socket.close()
        _linux.close_all(self._fds)
        self._fds = []
