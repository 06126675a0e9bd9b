"""The task socket: consumers in any language take part in the task barrier of a pool.

SOCK_SEQPACKET, one JSON object a message, descriptors by SCM_RIGHTS; docs/task-socket.md has all
of it:

    consumer  {"type": "hello", "version": 1, "task": PID}
    server    {"type": "files", "files": [{"fd", "flags", "offset", "close_on_exec"}, …], "more"}
              with one descriptor for each file; as often as it takes
    consumer  {"type": "ready"}
    server    {"type": "released"}
    either    {"type": "abort", "reason": TEXT}, which is the end

A consumer is one of the pool's tasks from its hello on: that enters the task's block, its ready
leaves it, and whatever ends it in between breaks the barrier, as an exception in the block would.
How it is told the end (released, abort) is the pool's affair, which knows it last.
"""

from __future__ import annotations

import enum
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import anyio
import anyio.abc
import anyio.lowlevel

from ghostpool._barrier import TaskBarrier
from ghostpool._consumer import Consumer, ConsumerLeft, abort, shortened
from ghostpool._errors import BarrierBroken, ConsumerLost
from ghostpool._listener import Listener
from ghostpool._model import Descriptor
from ghostpool._needs import STRANGERS
from ghostpool._planned import Opening, Plan, PlannedKey, PlannedTask
from ghostpool._protocol import MAX_FDS

log = logging.getLogger("ghostpool")
VERSION = 1
HELLO_S = 30.0
"""Seconds that a connection may take for its hello."""
_AGAIN_S = 0.1
_NAMED = 10
"""Tasks that a message names before it counts the rest."""


class PooledTask(Protocol):
    """What the block of a task gives."""

    async def open_files(self) -> Mapping[int, int]: ...
    async def open_keys(self) -> Mapping[str, int]: ...


class Pool(Protocol):
    """As much of a `GhostPool` as is needed to serve its tasks."""

    @property
    def plan(self) -> Plan: ...
    @property
    def tasks(self) -> Mapping[int, PlannedTask]: ...
    def task(self, pid: int) -> AbstractAsyncContextManager[PooledTask]: ...
    def has_entered(self, pid: int) -> bool: ...


class Refused(Exception):
    """A hello that breaks nothing, and why it is refused."""


class Stage(enum.Enum):
    """How far a served task has come; the text is said of those that come no further."""

    AWAITED = "nobody has said hello for"
    FETCHING = "the consumer has not said ready for"
    ARRIVED = "arrived"


class TaskServer:
    """Serves tasks of a pool on a listening socket.

    `run` ends when the barrier is passed or broken. The consumers then wait to be told how it all
    ended: call `released` when the mounts are back and the temporaries gone, and `aborted` when
    everything is undone; what comes after the first of the two calls has no effect.
    """

    def __init__(
        self,
        pool: Pool,
        barrier: TaskBarrier,
        listener: Listener,
        tasks: Iterable[int] | None = None,
    ) -> None:
        """`tasks`: pids in the images, all of them if None. RuntimeError for one that is not."""
        self._pool = pool
        self._barrier = barrier
        self._listener = listener
        self._openings = {p.opening.file.id: p.opening for p in pool.plan.opens}
        self._sockets = pool.plan.sockets
        self._stages = dict.fromkeys(pool.tasks if tasks is None else tasks, Stage.AWAITED)
        unknown = self._stages.keys() - pool.tasks.keys()
        if unknown:
            raise RuntimeError(f"no tasks of the images: {named(unknown)}")
        self._empty = {pid for pid in self._stages if not self._has_files(pid)}
        self._inside: set[int] = set()
        """Tasks whose blocks were entered here and have not been left."""
        self._left = anyio.Event()
        self._consumers: dict[int, _Fetching] = {}
        self._strangers: dict[Consumer, anyio.CancelScope] = {}
        self._loss: ConsumerLost | None = None

    def __repr__(self) -> str:
        return (
            f"<TaskServer on {self._listener.path}, {len(self._stages)} tasks, "
            f"{len(self.missing())} missing, {len(self._consumers)} consumers>"
        )

    @property
    def path(self) -> str:
        """Where consumers connect."""
        return self._listener.path

    @property
    def awaited(self) -> int:
        """How many tasks do not arrive by themselves, since they have descriptors."""
        return len(self._stages) - len(self._empty)

    def missing(self) -> dict[int, Stage]:
        """The served tasks that have not arrived, and how far they have come."""
        # Some may have been brought up by the program itself.
        missing = set(self._barrier.missing)
        return {pid: stage for pid, stage in self._stages.items() if pid in missing}

    def why_missing(self) -> str:
        """The same for people; "" if none is missing."""
        missing = self.missing()
        lines = []
        for stage in (Stage.AWAITED, Stage.FETCHING):
            pids = [pid for pid, reached in missing.items() if reached is stage]
            if pids:
                lines.append(f"{stage.value} task{'s' * (len(pids) > 1)} {named(pids)}")
        return "; ".join(lines)

    async def run(self) -> None:
        """Serve until the barrier is passed. The listener is closed at the end.

        ConsumerLost, in a group, if a consumer broke the barrier; BarrierBroken, in a group, if
        another task did. Cancelled, it breaks the barrier, as its tasks can not arrive any more.
        """
        try:
            async with anyio.create_task_group() as group:
                for pid in self._empty:
                    group.start_soon(self._arrive_alone, pid)
                group.start_soon(self._accept, group)
                try:
                    await self._barrier.wait_passed()
                except BarrierBroken:
                    if self._loss is not None and self._loss is self._barrier.cause:
                        raise self._loss from None
                    raise
                if self._inside:
                    await self._left.wait()
                group.cancel_scope.cancel()
        except BaseException as error:
            self._barrier.break_(error)
            raise
        finally:
            self._listener.close()

    def check(self) -> None:
        """ConsumerLost for one that has left since `run` ended, while it waited to be released."""
        for pid, fetching in self._consumers.items():
            left = None if pid in self._empty else fetching.consumer.left_nowait()
            if left is not None:
                raise ConsumerLost(pid, fetching.consumer.pid, left)

    def released(self) -> None:
        """Tell the consumers that everything is as it was, and close. Never waits."""
        self._part({"type": "released"})

    def aborted(self, reason: str) -> None:
        """Tell the consumers that everything was undone, and why, and close. Never waits."""
        self._part(abort(reason))

    def _part(self, message: Mapping[str, object]) -> None:
        for fetching in self._consumers.values():
            fetching.consumer.part(message)

    # -- who comes ------------------------------------------------------------------------------

    async def _accept(self, group: anyio.abc.TaskGroup) -> None:
        listener = self._listener.socket
        while True:
            # Whoever floods the socket must not keep the event loop to itself.
            await anyio.lowlevel.checkpoint()
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
            try:
                consumer = Consumer(connection)
            except ConsumerLeft:
                continue
            if consumer.uid not in (0, os.geteuid()):
                consumer.part(abort(f"user {consumer.uid} is not served", refused=True))
                continue
            # The oldest goes, so that no flood of them keeps others out.
            while len(self._strangers) >= STRANGERS:
                oldest = next(iter(self._strangers))
                self._strangers.pop(oldest).cancel()
            scope = anyio.CancelScope(deadline=anyio.current_time() + HELLO_S)
            self._strangers[consumer] = scope
            group.start_soon(self._attend, consumer, scope)

    async def _attend(self, consumer: Consumer, scope: anyio.CancelScope) -> None:
        fetching = await self._hello(consumer, scope)
        if fetching is None:
            return
        log.debug("task %d is fetched by process %d", fetching.pid, consumer.pid)
        async with anyio.create_task_group() as group:
            group.start_soon(self._listen, fetching)
            group.start_soon(self._watch, fetching)
            if fetching.pid in self._empty:
                # It has arrived, or is about to, whatever this one does.
                await self._fetch(fetching, {}, {})
                await anyio.sleep_forever()
            self._inside.add(fetching.pid)
            async with self._pool.task(fetching.pid) as task:
                await self._fetch(fetching, await task.open_files(), await task.open_keys())
                self._stages[fetching.pid] = Stage.ARRIVED
            self._leave(fetching.pid)
            group.cancel_scope.cancel()

    async def _hello(self, consumer: Consumer, scope: anyio.CancelScope) -> _Fetching | None:
        """The first message of `consumer`, which is gone if it is not taken in."""
        fetching = None
        reason = "this restore is over"
        try:
            with scope:
                fetching = self._admit(consumer, await consumer.receive())
            if fetching is None:
                late = consumer in self._strangers
                reason = f"no hello within {HELLO_S:g} s" if late else "too many connections"
        except ConsumerLeft as left:
            reason = f"expected hello, but the consumer {left}"
        except Refused as refusal:
            reason = str(refusal)
        finally:
            self._strangers.pop(consumer, None)
            if fetching is None:
                consumer.part(abort(reason, refused=True))
        return fetching

    def _admit(self, consumer: Consumer, message: Mapping[str, Any]) -> _Fetching:
        version, pid = message.get("version"), message.get("task")
        # True is 1, and 1.0 too.
        if message.get("type") != "hello" or type(version) is not int or version != VERSION:
            raise Refused(f"this server speaks version {VERSION} and expects hello")
        if type(pid) is not int or pid not in self._stages:
            raise Refused(
                f"no task {shortened(repr(pid))[:40]} here, but {named(self._stages) or 'none'}"
            )
        if pid in self._consumers:
            raise Refused(f"task {pid} has another consumer")
        if pid not in self._empty and self._pool.has_entered(pid):
            raise Refused(f"task {pid} is brought up by the program itself")
        if self._barrier.broken:
            raise Refused("this restore is being undone")
        if pid not in self._empty:
            self._stages[pid] = Stage.FETCHING
        self._consumers[pid] = fetching = _Fetching(pid, consumer)
        return fetching

    # -- a consumer that was taken in -----------------------------------------------------------

    def _has_files(self, pid: int) -> bool:
        held = self._pool.tasks[pid].held
        return any(reg in self._openings or reg in self._sockets for reg in held)

    async def _arrive_alone(self, pid: int) -> None:
        if self._pool.has_entered(pid):
            return
        self._inside.add(pid)
        async with self._pool.task(pid):
            self._stages[pid] = Stage.ARRIVED
        self._leave(pid)

    def _leave(self, pid: int) -> None:
        self._inside.discard(pid)
        if not self._inside:
            self._left.set()

    async def _fetch(
        self, fetching: _Fetching, files: Mapping[int, int], keys: Mapping[str, int]
    ) -> None:
        """Send the files and wait for the ready, as long as it takes."""
        planned = self._pool.tasks[fetching.pid]
        rows: list[Descriptor | PlannedKey] = [
            row for row in planned.task.descriptors if row.number in files
        ]
        rows += [row for row in planned.keys if row.key in keys]
        try:
            for start in range(0, len(rows) or 1, MAX_FDS):
                some = rows[start : start + MAX_FDS]
                fds = [
                    keys[row.key] if isinstance(row, PlannedKey) else files[row.number]
                    for row in some
                ]
                documents = [self._row(row, fd) for row, fd in zip(some, fds, strict=True)]
                more = start + MAX_FDS < len(rows)
                message = {"type": "files", "files": documents, "more": more}
                await fetching.consumer.send(message, fds)
                fetching.sent = not more
                # The turn of others: this one may have many.
                await anyio.lowlevel.checkpoint()
        except ConsumerLeft as left:
            self._lose(fetching, left)
        await fetching.ready.wait()

    def _row(self, row: Descriptor | PlannedKey, fd: int) -> dict[str, object]:
        opening = self._openings.get(row.reg_id)
        document: dict[str, object] = {
            "fd": row.number,
            "flags": opening.file.flags if opening else self._sockets[row.reg_id].flags,
            "offset": _offset(opening, fd) if opening else None,
        }
        if isinstance(row, PlannedKey):
            # Who does not know keys has it at a number that the task does not use.
            return document | {"close_on_exec": False, "key": row.key}
        return document | {"close_on_exec": row.close_on_exec}

    async def _listen(self, fetching: _Fetching) -> None:
        """Hear what comes after the hello: one ready, or the end."""
        try:
            while True:
                message = await fetching.consumer.receive()
                kind = message.get("type")
                if kind == "abort":
                    reason = shortened(str(message.get("reason")))
                    raise ConsumerLeft(f"aborted ({reason})")
                if kind != "ready" or not fetching.sent or fetching.ready.is_set():
                    raise ConsumerLeft(f"said {shortened(repr(kind))[:40]} out of turn")
                fetching.ready.set()
        except ConsumerLeft as left:
            self._lose(fetching, left)

    async def _watch(self, fetching: _Fetching) -> None:
        await fetching.consumer.wait_ended()
        self._lose(fetching, ConsumerLeft("ended"))

    def _lose(self, fetching: _Fetching, left: ConsumerLeft) -> None:
        """Break the barrier, which ends `run`; nobody misses this consumer if it is passed."""
        loss = ConsumerLost(fetching.pid, fetching.consumer.pid, str(left))
        self._barrier.break_(loss)
        if self._barrier.cause is loss:
            self._loss = loss


class _Fetching:
    """A consumer that was taken in, and how far it is."""

    def __init__(self, pid: int, consumer: Consumer) -> None:
        self.pid = pid
        self.consumer = consumer
        self.sent = False
        """It was sent all of its files."""
        self.ready = anyio.Event()


def _offset(opening: Opening, fd: int) -> int | None:
    """Where the next read begins; None where that means nothing."""
    mode = opening.ghost.mode
    if opening.flags & os.O_PATH or not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        return None
    # Not lseek(2): it would wait for whoever shares the open file and is reading just now.
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        return int(file.readline().removeprefix(b"pos:"))


def named(pids: Iterable[int]) -> str:
    """Some pids, for people."""
    known = sorted(pids)
    more = f" and {len(known) - _NAMED} more" if len(known) > _NAMED else ""
    return ", ".join(map(str, known[:_NAMED])) + more
