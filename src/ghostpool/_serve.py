"""Serving descriptors on a UNIX socket, for consumers that fetch them when they are ready.

SOCK_SEQPACKET, one JSON object a message, descriptors by SCM_RIGHTS:

    consumer  {"type": "hello", "version": 1, "task": PID}
    server    {"type": "files", "files": [{"fd", "flags", "close_on_exec"}, …], "more": bool}
              with one descriptor for each file; as often as it takes
    consumer  {"type": "ready"}
    server    {"type": "released"}          or, at any time, {"type": "abort", "reason": TEXT}

One task's descriptors go to one consumer once: they are let go when it has said "ready". One that
takes them and never says so leaves its task owed, to be fetched again: it may be dead.
Who may connect is decided by the user of the other end, as the kernel noted it at its connect,
never by its pid.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from ghostpool._listener import Listener
from ghostpool._planned import PlannedTask
from ghostpool._protocol import MAX_FDS, rights
from ghostpool._restored import Restored
from ghostpool._run import Delivery, Prepared

log = logging.getLogger("ghostpool")
VERSION = 1
ANSWER_S = 30.0
"""Seconds that a consumer may take for each of its messages."""
_AGAIN_S = 0.1
_UCRED = struct.Struct("3i")


class Refused(Exception):
    """A consumer is sent away, with this reason."""


def serve(listener: Listener, announce: Callable[[str], None]) -> Delivery:
    """Hold the descriptors until every task that has some has fetched them.

    `announce` is called with a line that names the socket.
    """

    async def deliver(run: Prepared, restored: Restored) -> None:
        server = _Server(run, restored)
        announce(f"serving {len(server.owed)} tasks on {listener.path}")
        if not server.owed:
            return
        async with anyio.create_task_group() as group:
            group.start_soon(server.accept, listener.socket, group)
            await server.done.wait()
            group.cancel_scope.cancel()

    return deliver


class _Server:
    def __init__(self, run: Prepared, restored: Restored) -> None:
        self._restored = restored
        self._report = run.report
        self._tasks = {int(planned.task.pid): planned for planned in run.plan.tasks}
        self.owed = {pid for pid, task in self._tasks.items() if restored.of_task(task)}
        """Tasks that have not fetched yet."""
        self._claimed: set[int] = set()
        self.done = anyio.Event()

    async def accept(self, listener: socket.socket, group: Any) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                await anyio.wait_readable(listener)
                continue
            except OSError as error:
                # It has gone again; or there are no descriptors left, which time may mend.
                log.info("a consumer could not be accepted: %s", error)
                await anyio.sleep(_AGAIN_S)
                continue
            connection.setblocking(False)
            group.start_soon(self._attend, connection)

    async def _attend(self, connection: socket.socket) -> None:
        with connection:
            try:
                with anyio.fail_after(ANSWER_S):
                    pid = await self._hello(connection)
                async with self._claim(pid) as planned:
                    with anyio.fail_after(ANSWER_S):
                        await self._send_files(connection, planned)
                        if (await _receive(connection)).get("type") != "ready":
                            raise Refused("expected ready")
                    self.owed.discard(pid)
                    self._report.delivered += 1
                await _send(connection, {"type": "released"})
            except Refused as refusal:
                await _abort(connection, str(refusal))
            except (OSError, ValueError, RecursionError):
                pass  # a consumer that is gone, too slow, or talks nonsense: its task stays owed
        if not self.owed:
            self.done.set()

    async def _hello(self, connection: socket.socket) -> int:
        # Read first: closing a socket with something unread in it would lose the refusal.
        message = await _receive(connection)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, uid, _ = _UCRED.unpack(credentials)
        if uid not in (0, os.geteuid()):
            raise Refused(f"user {uid} is not served")
        if message.get("type") != "hello" or message.get("version") != VERSION:
            raise Refused(f"this server speaks version {VERSION} and expects hello")
        pid = message.get("task")
        if not isinstance(pid, int) or pid not in self._tasks:
            known = ", ".join(map(str, sorted(self._tasks)))
            raise Refused(f"the images have no task {pid}; theirs: {known}")
        return pid

    @asynccontextmanager
    async def _claim(self, pid: int) -> AsyncIterator[PlannedTask]:
        planned = self._tasks[pid]
        if pid in self._claimed:
            raise Refused(f"the descriptors of task {pid} are being fetched by another consumer")
        if pid not in self.owed and self._restored.of_task(planned):
            raise Refused(f"the descriptors of task {pid} have been fetched already")
        self._claimed.add(pid)
        try:
            yield planned
        finally:
            self._claimed.discard(pid)

    async def _send_files(self, connection: socket.socket, planned: PlannedTask) -> None:
        descriptors = self._restored.of_task(planned)
        rows = [
            {
                "fd": descriptor.number,
                "flags": self._restored.plan.images.files[descriptor.reg_id].flags,
                "close_on_exec": descriptor.close_on_exec,
            }
            for descriptor in planned.task.descriptors
            if descriptor.number in descriptors
        ]
        for start in range(0, len(rows) or 1, MAX_FDS):
            some = rows[start : start + MAX_FDS]
            message = {"type": "files", "files": some, "more": start + MAX_FDS < len(rows)}
            await _send(connection, message, [descriptors[int(row["fd"])] for row in some])


async def _send(connection: socket.socket, message: object, fds: list[int] | None = None) -> None:
    data = json.dumps(message).encode()
    while True:
        try:
            connection.sendmsg([data], rights(fds or []), socket.MSG_NOSIGNAL)
            return
        except BlockingIOError:
            await anyio.wait_writable(connection)


async def _abort(connection: socket.socket, reason: str) -> None:
    try:
        with anyio.fail_after(ANSWER_S):
            await _send(connection, {"type": "abort", "reason": reason, "refused": True})
    except OSError:
        pass


async def _receive(connection: socket.socket) -> dict[str, Any]:
    while True:
        try:
            data = connection.recv(1 << 16)
            break
        except BlockingIOError:
            await anyio.wait_readable(connection)
    if not data:
        raise ConnectionResetError("the consumer is gone")
    message = json.loads(data)
    if not isinstance(message, dict):
        raise Refused("a message is a JSON object")
    return message
