"""A pool without a kernel below it, and consumers on an event loop, for tests of the task socket.

The barrier is the real one, and so are the descriptors: of one file, at whatever numbers the tasks
are to have. `FakePool.log` tells what happened in which order.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio

from ghostpool._barrier import TaskBarrier
from ghostpool._model import (
    Descriptor,
    Ghost,
    GhostId,
    Images,
    MountHandle,
    NsId,
    Pid,
    RegFile,
    RegId,
    Task,
)
from ghostpool._planned import (
    LinkedBy,
    OpenedAt,
    Opening,
    Plan,
    PlannedMount,
    PlannedOpen,
    PlannedTask,
)
from ghostpool._protocol import take_rights

FLAGS = os.O_RDWR | os.O_APPEND
_SPACE = socket.CMSG_SPACE(253 * 4)


def planned(
    pid: int, numbers: Iterable[int], mode: int = stat.S_IFREG | 0o600, flags: int = FLAGS
) -> PlannedTask:
    """A task with a ghost at each of the numbers, odd ones close-on-exec."""
    descriptors = []
    opens = []
    for number in numbers:
        reg_id = RegId(pid * 100_000 + number)
        descriptors.append(Descriptor(number, reg_id, bool(number % 2)))
        file = RegFile(reg_id, flags, None, b"gone", None, None, mode)
        ghost = Ghost(GhostId(reg_id), mode, 0, 0, None, None, 0, ())
        at = OpenedAt(cast("PlannedMount", None), b"", flags, fifo=stat.S_ISFIFO(mode))
        by = LinkedBy(MountHandle(0), b"", 0, (0, 0))
        opens.append(PlannedOpen(Opening(file, ghost, at), by))
    task = Task(Pid(pid), Pid(0), NsId(10), tuple(descriptors))
    return PlannedTask(task, tuple(opens), ())


class FakePool:
    """As much of a pool as a task server needs; all numbers of all tasks lead to one open file."""

    def __init__(self, fd: int, *tasks: PlannedTask) -> None:
        self._fd = fd
        self.tasks: Mapping[int, PlannedTask] = {planned.task.pid: planned for planned in tasks}
        self.plan = Plan(cast("Images", None), b"", tasks=list(tasks))
        self.barrier = TaskBarrier(self.tasks)
        self.log: list[tuple[str, int]] = []
        self.opening: Callable[[int], Awaitable[object]] = lambda pid: anyio.lowlevel.checkpoint()
        """Awaited before the files of a task are given out."""
        self.leaving: Callable[[int], Awaitable[object]] = lambda pid: anyio.lowlevel.checkpoint()
        """Awaited after the barrier, as putting mounts back is."""

    @asynccontextmanager
    async def task(self, pid: int) -> AsyncIterator[FakeTask]:
        """The block of a task: its end is the barrier."""
        self.log.append(("entered", pid))
        try:
            async with self.barrier.party(pid):
                yield FakeTask(self, pid)
                self.log.append(("arrived", pid))
            await self.leaving(pid)
        except BaseException:
            self.log.append(("failed", pid))
            raise
        self.log.append(("passed", pid))

    def has_entered(self, pid: int) -> bool:
        return ("entered", pid) in self.log

    def done(self, what: str) -> list[int]:
        """Of which tasks the log says so, in order."""
        return [pid for said, pid in self.log if said == what]


class FakeTask:
    def __init__(self, pool: FakePool, pid: int) -> None:
        self._pool = pool
        self._pid = pid

    async def open_files(self) -> dict[int, int]:
        await self._pool.opening(self._pid)
        descriptors = self._pool.tasks[self._pid].task.descriptors
        return {descriptor.number: self._pool._fd for descriptor in descriptors}

    async def open_keys(self) -> dict[str, int]:
        return {key.key: self._pool._fd for key in self._pool.tasks[self._pid].keys}


class Client:
    """A consumer that says what it is told to."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.socket.connect(path)
        except OSError:
            self.socket.close()
            raise
        self.socket.setblocking(False)

    def say(self, message: object) -> None:
        """Send a message, bytes as they are."""
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        self.socket.send(data)

    def hello(self, task: object, **changes: object) -> None:
        self.say({"type": "hello", "version": 1, "task": task, **changes})

    async def hear(self) -> dict[str, Any]:
        """The next message, with the number of its descriptors; {} for the end."""
        while True:
            try:
                data, ancillary, flags, _ = self.socket.recvmsg(1 << 16, _SPACE)
                break
            except BlockingIOError:
                await anyio.wait_readable(self.socket)
        fds = take_rights(ancillary, flags)
        for fd in fds:
            os.close(fd)
        answer: dict[str, Any] = json.loads(data) if data else {}
        return {**answer, "descriptors": len(fds)} if fds else answer

    async def fetch(self, task: int) -> list[dict[str, Any]]:
        """Say hello, and take all the files."""
        self.hello(task)
        files: list[dict[str, Any]] = []
        more = True
        while more:
            message = await self.hear()
            assert message["type"] == "files", message
            assert message.get("descriptors", 0) == len(message["files"])
            files += message["files"]
            more = message["more"]
        return files

    def hears_nothing(self) -> bool:
        """Neither a message nor the end has come."""
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        self.socket.close()
