"""The story of a restore: create, bring up the tasks, barrier, revert, clean, verify; or undo it.

The order is CRIU's (PREPARE_NAMESPACES, RESTORE, restore_wait_other_tasks, revert, cleanup), with
the tasks opening their files at the same time. Each task holds its leases from before its first
open until the barrier, so a mount is made writable when the first task needs it and put back
after the last one has arrived. Whatever fails or is cancelled, the ledger and the leases undo
what was done, last things first, out of reach of further cancellation.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import anyio
import anyio.lowlevel

from ghostpool._apart import apart
from ghostpool._barrier import TaskBarrier
from ghostpool._consuming import consume
from ghostpool._createghosts import Creator, content_of
from ghostpool._errors import (
    BarrierBroken,
    RevertError,
    first_cause,
    leaves,
    reportable,
    without_echoes,
)
from ghostpool._fifos import FifoFiller
from ghostpool._followers import NOBODY, Events
from ghostpool._guard import Guard
from ghostpool._lease import LeaseStatistics, MountLeases
from ghostpool._ledger import Ledger
from ghostpool._mend import mend_command, recover_command
from ghostpool._model import MountHandle, Pid, RegId
from ghostpool._mountkernel import PoolMounts
from ghostpool._openfiles import Opener
from ghostpool._planned import Files, Plan, PlannedOpen, PlannedTask
from ghostpool._pool import WorkerPool
from ghostpool._restored import Restored
from ghostpool._slots import assign_slots
from ghostpool._sockets import SocketBinder
from ghostpool._unbroken import unbroken

log = logging.getLogger("ghostpool")
REVERT_S = 60.0
"""Deadline of putting mounts back, in seconds: longer than the pool insists on its own."""
UNDO_S = 60.0
"""Deadline of undoing, in seconds; only hung file systems come near it."""
UNDO_NAME_S = 0.5
"""Seconds that each name adds to it: a slow file system is not a hung one."""
_WEIGHT_BYTES = 1 << 16


class Restoration:
    """One run of a plan without refusals, whose tasks are brought up by whoever has them."""

    def __init__(
        self,
        plan: Plan,
        pool: WorkerPool,
        identities: Mapping[MountHandle, int],
        guard: Guard,
        *,
        keep: bool = False,
        consume_links: bool = False,
        files: Files = "held",
        own_owner: bool = False,
        events: Events = NOBODY,
    ) -> None:
        plan.check()
        self.plan = plan
        self.tasks: dict[int, PlannedTask] = {
            int(planned.task.pid): planned for planned in plan.tasks
        }
        self.restored: Restored = Restored(plan)
        self.barrier: TaskBarrier = TaskBarrier(self.tasks)
        self._keep = keep
        self._consumes = partial(consume, plan, pool, guard) if consume_links else None
        self._events = events
        self._kernel = PoolMounts(pool, plan.mounts, guard, events)
        self._kernel.identities.update(identities)
        self._leases: MountLeases[MountHandle] = MountLeases(
            self._kernel, reopen=False, revert_s=REVERT_S
        )
        self._service = AsyncExitStack()
        """Leases of mounts of which no clone can be made, from the first change to the last."""
        self._ledger = Ledger(pool, plan.mounts, guard, plan.links)
        slots = assign_slots(self._weights(), pool.jobs)
        self._creator = Creator(plan, pool, self._ledger, slots, events, own_owner=own_owner)
        self._fifos = FifoFiller(plan, pool, self._ledger, slots)
        self._sockets = SocketBinder(plan, pool, self.restored, files, own_owner=own_owner)
        self._opener = Opener(
            *(plan, pool, self._ledger, slots, self.restored, self._fifos, events),
            keep=keep,
            files=files,
        )
        self._by_file: dict[RegId, PlannedOpen] | None = None
        """Where each file is opened, once a task asks for what it has in common with others."""
        self._entered: set[int] = set()
        self._inside: dict[int, AsyncExitStack] = {}
        """The leases of the tasks that have not left their blocks."""
        self._left = anyio.Event()
        self._finishing = False

    def _weights(self) -> Iterator[tuple[tuple[int, int], int, int]]:
        for ghost in self.plan.ghosts.values():
            cost = 1 + content_of(ghost) // _WEIGHT_BYTES
            yield ghost.group, ghost.mount.namespace.target.index, cost
        for planned in self.plan.opens:
            yield planned.group, planned.opening.mount.namespace.target.index, 1

    def statistics(self) -> LeaseStatistics:
        """Numbers of the leases."""
        return self._leases.statistics()

    @asynccontextmanager
    async def running(self, *, alone: bool = False) -> AsyncIterator[None]:
        """The time from the first change to the end: `finish`, or everything is undone.

        Leaving the block by an exception undoes everything; so does leaving it before `finish`,
        which is BarrierBroken if it was not done in an orderly way. At the end the descriptors
        are closed. What failed in undoing comes out beside what made it necessary, in an
        ExceptionGroup. `alone`: the first cause comes out alone, as far as it goes.
        """
        error: BaseException | None = None
        try:
            try:
                await self._service.enter_async_context(self._leases.hold(self.plan.service_leases))
                await self._creator.create()
                await self._fifos.fill()
                await self._sockets.bind()
                yield
                if not self.restored.complete:
                    raise self._left_early()
            except BaseException as caught:
                if self.restored.complete:
                    raise  # it is the caller's own: there is nothing to undo any more
                error = await unbroken(partial(self._undone, caught))
            if error is not None:
                first = first_cause(error) if alone else without_echoes(error)
                if isinstance(self.barrier.cause, anyio.get_cancelled_exc_class()):
                    # What the other tasks say of it is only an echo of the caller's cancellation.
                    await self._cancelled_after(first)
                raise first
        finally:
            self._note_usage()
            await unbroken(self._close)

    @staticmethod
    async def _cancelled_after(error: BaseException) -> None:
        """Let a cancellation out in place of those who were told that the barrier is broken."""
        if all(isinstance(leaf, BarrierBroken) for leaf in leaves(error)):
            await anyio.lowlevel.checkpoint_if_cancelled()

    async def _close(self) -> None:
        self._fifos.close()
        # Each may be the last of a file, which goes with it, as long as that may be.
        content = sum(map(content_of, self.plan.ghosts.values())) if self.restored.fds else 0
        pieces = len(self.restored.fds) + content // _WEIGHT_BYTES
        await apart(self.restored.close, pieces)

    def _note_usage(self) -> None:
        self.restored.usage = self._leases.usage()
        self.restored.writable_attributes = self._kernel.writable_attributes

    # -- tasks ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def task(self, pid: int) -> AsyncIterator[PoolTask]:
        """Bring a task up: its mounts are leased inside the block, and its files can be opened.

        Leaving the block opens what is not open yet, arrives at the barrier and waits there for
        the other tasks. Leaving it by an exception, or cancelled, breaks the barrier.
        BarrierBroken if that has happened already. RuntimeError for a stranger, or a second time.
        """
        planned = self.tasks.get(pid)
        if planned is None:
            known = ", ".join(map(str, sorted(self.tasks)))
            raise RuntimeError(f"the images have no task {pid}; theirs: {known}")
        self.barrier.check()
        if pid in self._entered:
            raise RuntimeError(f"task {pid} is brought up a second time")
        self._entered.add(pid)
        leases = self._inside[pid] = AsyncExitStack()
        try:
            async with self.barrier.party(pid), leases:
                await leases.enter_async_context(self._leases.hold(planned.leases))
                self.barrier.check()
                files = PoolTask(self, planned)
                try:
                    yield files
                    await self._opener.open(pid, planned.opens)
                finally:
                    files.over = True
                self.barrier.check()
                log.debug("task %d has all its files open", pid)
                if self._events:
                    from ghostpool._events import TaskArrived

                    self._events.send(TaskArrived(task=pid))
                await self.barrier.arrive(pid)
        finally:
            del self._inside[pid]
            self._left.set()

    def has_entered(self, pid: int) -> bool:
        """Somebody has brought the task up, or is about to."""
        return pid in self._entered

    async def bring_up_all(self) -> None:
        """Bring every task up, at the same time, for those that have none of their own."""
        async with anyio.create_task_group() as group:
            for pid in self.tasks:
                group.start_soon(self._bring_up, pid)

    async def _bring_up(self, pid: int) -> None:
        async with self.task(pid):
            pass

    async def open_for(self, planned: PlannedTask) -> None:
        """Open what a task has, and what it shares with tasks that have not opened it yet."""
        pid = planned.task.pid
        self.barrier.check()
        opens = {planned_open.opening.file.id: planned_open for planned_open in planned.opens}
        if self._by_file is None:
            self._by_file = {one.opening.file.id: one for one in self.plan.opens}
        for reg in planned.held:
            shared = self._by_file.get(reg)
            if shared is not None:
                opens.setdefault(reg, shared)
        wanted = list(opens.values())
        foreign = set(self.plan.leases_for(self._opener.not_begun(wanted))) - set(planned.leases)
        if foreign:
            await self._inside[pid].enter_async_context(self._leases.hold(sorted(foreign)))
        await self._opener.open(pid, wanted)

    # -- the end --------------------------------------------------------------------------------

    async def finish(self, confirm: Callable[[], None] = lambda: None) -> None:
        """Wait until all tasks have left their blocks; then clean, verify, and put all back.

        BarrierBroken: a task failed. RuntimeError: a task was never brought up, or this was begun
        already. Whatever it raises, everything is undone at the end of `running`; but after a
        RevertError nothing is left to be done but what that says. `confirm`
        may raise when all is done, as the last chance to have it undone.
        """
        if self.restored.complete:
            raise RuntimeError("the restore is finished already")
        if not self.barrier.broken and len(self._entered) < len(self.tasks):
            pids = ", ".join(str(pid) for pid in self.tasks if pid not in self._entered)
            raise RuntimeError(f"nobody has brought up the tasks {pids}: enter their blocks first")
        if self._finishing:
            raise RuntimeError("finishing has been begun already")
        self._finishing = True
        while self._inside:
            self._left = anyio.Event()
            await self._left.wait()
        self.barrier.check()
        names = len(self._ledger)
        self.restored.left += await self._ledger.clear(keep=self._keep)
        self._tell_cleaned(names)
        await self._verify()
        confirm()
        # Only now are names that are to be kept no longer owed; it can not be half done.
        with anyio.move_on_after(UNDO_S, shield=True):
            await self._ledger.settle(kept=self._keep)
        self.restored.complete = True
        if self._consumes is not None:
            # It can not fail any more, but if somebody is killed: then others finish this.
            self.restored.consumed, left = await unbroken(self._consumes)
            self.restored.left += left
        await self._service.aclose()
        self._note_usage()

    def _tell_cleaned(self, names: int) -> None:
        if self._events:
            from ghostpool._events import Cleaned

            self._events.send(Cleaned(names=names))

    async def _verify(self) -> None:
        if not self._keep:
            await apart(self.restored.verify, len(self.restored.fds))

    @property
    def can_finish(self) -> bool:
        """All tasks have arrived, and nobody has begun to finish."""
        return self.barrier.passed and not self._finishing

    def _left_early(self) -> Exception:
        """Why a block that was left without an error has come to nothing."""
        cause = self.barrier.cause
        if isinstance(cause, Exception):
            return cause
        if cause is not None:  # a cancellation, which is over
            return BarrierBroken("a task was cancelled before all had arrived")
        names = ", ".join(map(str, self.barrier.missing))
        return BarrierBroken(
            f"left before all tasks had arrived (missing: {names})" if names else "never finished"
        )

    async def _undone(self, cause: BaseException) -> BaseException:
        """Take back what was done; the cause, and what could not be taken back. See `unbroken`."""
        log.info("undoing: %d names", len(self._ledger))
        self.barrier.break_(cause)
        failures: list[Exception] = []
        await self._close()
        # A task that is still in its block has lost its leases from here on, and one that
        # is about to enter it gets none.
        await self._kernel.no_more()
        for leases in [*self._inside.values()]:
            failures += await _closed(leases)
        names = len(self._ledger)
        limit_s = UNDO_S + UNDO_NAME_S * names
        try:
            with anyio.fail_after(limit_s):
                self.restored.left += await self._ledger.clear()
            self._tell_cleaned(names)
        except TimeoutError:
            problem = f"undoing did not end within {limit_s:.0f} s"
            failures.append(RevertError(problem, recover_command()))
        except Exception as error:  # noqa: BLE001  told at the end
            failures.append(error)
        # Names may have been removed by these.
        failures += await _closed(self._service)
        failures += await self._kernel.close(self._leases.revert_errors)
        failures += self._still_writable()
        if not failures:
            return cause
        return ExceptionGroup("undoing failed", [*failures, *reportable(cause)])

    def _still_writable(self) -> list[RevertError]:
        """Mounts that are left writable for a reason that does not say how to mend it."""
        return [
            RevertError(
                f"{self.plan.mounts[handle].label} may still be writable: {error!r}",
                mend_command(self.plan.mounts[handle]),
            )
            for handle, error in self._leases.revert_errors.items()
            if not isinstance(error, RevertError)
        ]


async def _closed(leases: AsyncExitStack) -> list[Exception]:
    """Give leases back; why that failed."""
    try:
        await leases.aclose()
    except Exception as error:  # noqa: BLE001  told by the caller
        return [error]
    return []


class PoolTask:
    """A task inside its block. Made by `GhostPool.task`."""

    def __init__(self, restoration: Restoration, planned: PlannedTask) -> None:
        self._restoration = restoration
        self.planned: PlannedTask = planned
        """What is known of it from the images and the plan."""
        self.over = False
        """Its block has been left."""

    @property
    def pid(self) -> Pid:
        """Its pid in the images."""
        return self.planned.task.pid

    def __repr__(self) -> str:
        return f"<task {self.pid}{', over' if self.over else ''}>"

    async def open_files(self) -> dict[int, int]:
        """Open the task's files; number in the task to descriptor here.

        The descriptors stay the pool's, which closes them when its block ends: pass them on, or
        duplicate them (`take_fds`). Numbers that share one were dup'ed. Positions are set. Asked
        again, it gives the same descriptors.

        Raises KernelError, VerificationError, WorkerDied for what went wrong, BarrierBroken if
        that was another task's affair, RuntimeError after the block. Cancellation waits for the
        batch that is under way; the barrier then breaks with the block.
        """
        if self.over:
            raise RuntimeError(f"the block of task {self.pid} has been left")
        await self._restoration.open_for(self.planned)
        return self._restoration.restored.of_task(self.planned)

    async def take_fds(self) -> dict[int, int]:
        """Like `open_files`, but each number has a descriptor of its own, which is the caller's.

        They are close-on-exec and above the standard ones; numbers that were dup'ed share an open
        file description still. RuntimeError if it is done twice; OSError (EMFILE): none was taken.
        """
        await self.open_files()
        return self._restoration.restored.take(self.planned)

    async def open_keys(self) -> dict[str, int]:
        """The same for what the task holds besides descriptors: key to descriptor here.

        Keys are `cwd`, `root`, `exe` and `map:<start>-<end>`, as in /proc/PID/maps; there are only
        those of ghosts. Each is open with the flags that it had: keys, and numbers, that share a
        descriptor had the same. A mapping is made of it anew; the offset is in the images.
        """
        if self.over:
            raise RuntimeError(f"the block of task {self.pid} has been left")
        await self._restoration.open_for(self.planned)
        return self._restoration.restored.of_keys(self.planned)

    async def take_keys(self) -> dict[str, int]:
        """Like `open_keys`, but each key has a descriptor of its own, as with `take_fds`."""
        await self.open_keys()
        return self._restoration.restored.take_keys(self.planned)
