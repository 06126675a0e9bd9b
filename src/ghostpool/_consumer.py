"""One consumer on the task socket: who it is, what it says, and whether it is still there.

Whoever connected is the consumer, for good: the kernel noted its user and process then, and gives a
pidfd of it. So its death is seen even if a child of it still holds the socket.
A message is one datagram of bounded length, received without descriptors: what a consumer sends
takes no more here than that, and nothing here blocks but what is awaited.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import anyio

from ghostpool._protocol import FLIGHT_STEP_S, rights

MAX_MESSAGE = 4096
"""Bytes that a message of a consumer may have."""
MAX_REASON = 1000
"""Characters of a reason that are passed on."""
SO_PEERPIDFD = 77
"""Linux 6.5: socket(7)."""
_UCRED = struct.Struct("3i")


class ConsumerLeft(Exception):
    """The consumer takes no part any more; the message says what it did."""


class Consumer:
    """A connection that was accepted; it is this object's from now on.

    ConsumerLeft: whoever connected has ended already.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._pidfd = -1
        connection.setblocking(False)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        self.pid, self.uid, _ = _UCRED.unpack(credentials)
        try:
            self._pidfd = _peer_pidfd(connection, self.pid)
        except OSError as error:
            connection.close()
            raise ConsumerLeft(f"can not be watched: {error.strerror}") from error

    def __repr__(self) -> str:
        return f"<Consumer, process {self.pid} of user {self.uid}>"

    async def wait_ended(self) -> None:
        """Wait for the end of the process that connected."""
        await anyio.wait_readable(self._pidfd)

    def left_nowait(self) -> str | None:
        """What it did, if it takes no part any more or has said something; None: it waits."""
        ended = select.poll()
        ended.register(self._pidfd, select.POLLIN)
        if ended.poll(0):
            return "ended"
        try:
            said = self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError:
            return "closed the connection"
        return "said something out of turn" if said else "closed the connection"

    async def receive(self) -> dict[str, Any]:
        """The next message. ConsumerLeft: it has closed, or does not keep to the protocol."""
        while True:
            try:
                # Without room for descriptors: the kernel closes those that come along.
                data, _, flags, _ = self._socket.recvmsg(MAX_MESSAGE)
                break
            except BlockingIOError:
                await anyio.wait_readable(self._socket)
            except OSError as error:
                raise ConsumerLeft("closed the connection") from error
        if not data:
            raise ConsumerLeft("closed the connection")
        if flags & socket.MSG_TRUNC:
            raise ConsumerLeft(f"sent a message of more than {MAX_MESSAGE} bytes")
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ConsumerLeft("sent something that is no JSON") from error
        if not isinstance(message, dict):
            raise ConsumerLeft("sent something that is no JSON object")
        return message

    async def send(self, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        """Send a message, which waits while the consumer has not taken those before it.

        ConsumerLeft: it has closed.
        """
        data = json.dumps(message).encode()
        while True:
            try:
                self._socket.sendmsg([data], rights([*fds]), socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                await anyio.wait_writable(self._socket)
            except OSError as error:
                # Without CAP_SYS_RESOURCE a user has no more descriptors in flight than
                # RLIMIT_NOFILE: unix(7).
                if error.errno != errno.ETOOMANYREFS:
                    raise ConsumerLeft("closed the connection") from error
                await anyio.sleep(FLIGHT_STEP_S)

    def part(self, message: Mapping[str, object]) -> None:
        """Send a last message, if there is room for it, and close. Parting twice is harmless."""
        if self._socket.fileno() < 0:
            return
        try:
            data = json.dumps(message).encode()
            self._socket.sendmsg([data], [], socket.MSG_NOSIGNAL)
            # Closing with something unread would reset the connection, and with it what was
            # just sent: from here on nothing comes in, and what has come is thrown away.
            self._socket.shutdown(socket.SHUT_RD)
            while self._socket.recv(1):
                pass
        except OSError:
            pass  # it has gone, or takes nothing: its end of the connection says the rest
        self.close()

    def close(self) -> None:
        """Close without a word."""
        self._socket.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def abort(reason: str, *, refused: bool = False) -> dict[str, object]:
    """The message that ends a connection before its time."""
    return {"type": "abort", "reason": shortened(reason), "refused": refused}


def shortened(text: str) -> str:
    """What somebody else wrote, in a length and an encoding that can be passed on."""
    if len(text) > MAX_REASON:
        text = text[: MAX_REASON - 1] + "…"
    return text.encode("utf-8", "replace").decode()


def _peer_pidfd(connection: socket.socket, pid: int) -> int:
    try:
        # Close-on-exec, as every pidfd is. ESRCH or ENODATA: it was reaped already.
        return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
    # Before Linux 6.5. Should the pid be another process's by now, that one is watched: the
    # consumer is gone then, which its closed connection says.
    return os.pidfd_open(pid)
