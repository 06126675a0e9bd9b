"""The story of a restore: create, open, barrier, revert, clean, verify; or undo it all.

The order is CRIU's (PREPARE_NAMESPACES, RESTORE, restore_wait_other_tasks, revert, cleanup), with
the tasks opening their files at the same time. Each task holds its leases from before its first
open until the barrier, so a mount is made writable when the first task needs it and put back
after the last one has arrived. Whatever fails or is cancelled, the ledger and the leases undo
what was done, last things first, out of reach of further cancellation.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio

from ghostpool import _linux
from ghostpool._barrier import TaskBarrier
from ghostpool._errors import (
    RestoreError,
    RevertError,
    VerificationError,
    first_cause,
    reportable,
)
from ghostpool._guard import Guard
from ghostpool._lease import MountLeases, MountUsage
from ghostpool._ledger import Ledger
from ghostpool._mend import kernel_error, left_behind, mend_command, recover_command
from ghostpool._model import MountHandle, RegId
from ghostpool._mountkernel import PoolMounts
from ghostpool._paths import join, relative_to, text
from ghostpool._planned import Plan, PlannedGhost, PlannedOpen, PlannedTask
from ghostpool._pool import WorkerPool
from ghostpool._protocol import (
    Created,
    CreateOp,
    Failure,
    Opened,
    OpenOp,
    Placed,
    PlaceOp,
)
from ghostpool._slots import assign_slots
from ghostpool._workerclient import WorkerFailure

log = logging.getLogger("ghostpool")
REVERT_S = 60.0
"""Deadline of putting mounts back, in seconds: longer than the pool insists on its own."""
UNDO_S = 60.0
"""Deadline of undoing, in seconds; only hung file systems come near it."""
UNDO_NAME_S = 0.5
"""Seconds that each name adds to it: a slow file system is not a hung one."""
_CREATE_BATCH = 256
_CREATE_BYTES = 8 << 20
_OPEN_BATCH = 128
_WEIGHT_BYTES = 1 << 16

_T = TypeVar("_T")
Progress = Callable[[str, int], None]
"""Called with the name of a phase and how many pieces of it were just done."""


def silent(phase: str, done: int) -> None:
    """Progress that nobody follows."""


class Restored:
    """What a restore gives: one descriptor for each reg file, until `close`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.fds: dict[RegId, int] = {}
        self.usage: dict[MountHandle, MountUsage] = {}
        self.writable_attributes: Mapping[MountHandle, int] = {}
        """Attributes of each leased mount while it was writable, as the kernel gave them."""
        self.left: list[str] = []
        """What could not be removed because somebody else uses it now, for people."""

    def of_task(self, planned: PlannedTask) -> dict[int, int]:
        """Number in the task to descriptor here; numbers that share one were dup'ed."""
        return {
            descriptor.number: self.fds[descriptor.reg_id]
            for descriptor in planned.task.descriptors
            if descriptor.reg_id in self.fds
        }

    def close(self) -> None:
        """Close every descriptor, which frees the ghosts that nobody else holds."""
        _linux.close_all(self.fds.values())
        self.fds.clear()


class Restoration:
    """One run of a plan without refusals."""

    def __init__(
        self,
        plan: Plan,
        pool: WorkerPool,
        identities: Mapping[MountHandle, int],
        guard: Guard,
        *,
        keep: bool = False,
        hold: bool = True,
        own_owner: bool = False,
        progress: Progress = silent,
    ) -> None:
        plan.check()
        self._plan = plan
        self._pool = pool
        self._keep = keep
        self._hold = hold
        self._own_owner = own_owner
        self._progress = progress
        self._kernel = PoolMounts(pool, plan.mounts, guard)
        self._kernel.identities.update(identities)
        self._leases: MountLeases[MountHandle] = MountLeases(
            self._kernel, reopen=False, revert_s=REVERT_S
        )
        self._barrier = TaskBarrier(planned.task.pid for planned in plan.tasks)
        self._ledger = Ledger(pool, plan.mounts, guard)
        self._slots = assign_slots(self._weights(), pool.jobs)
        self.restored = Restored(plan)

    def _weights(self) -> Iterator[tuple[tuple[int, int], int, int]]:
        for ghost in self._plan.ghosts.values():
            cost = 1 + sum(e.length for e in ghost.ghost.extents) // _WEIGHT_BYTES
            yield ghost.group, ghost.mount.namespace.target.index, cost
        for planned in self._plan.opens:
            yield planned.group, planned.opening.mount.namespace.target.index, 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Restored]:
        """Restore, and hold the descriptors for the time of the block.

        RestoreError: it failed and everything was undone. RevertError: something could not be
        undone. The first cause comes out alone; if undoing failed too, in an ExceptionGroup.
        """
        error: BaseException | None = None
        try:
            try:
                async with self._leases.hold(self._plan.service_leases):
                    await self._run()
            except BaseException as caught:  # noqa: BLE001  raised again below
                error = self._with_reverts(caught)
            finally:
                self.restored.usage = self._leases.usage()
                self.restored.writable_attributes = self._kernel.writable_attributes
            if error is not None:
                raise error
            yield self.restored
        finally:
            self.restored.close()

    def _with_reverts(self, caught: BaseException) -> BaseException:
        """The cause; and if a mount is left writable for whatever reason, that with its mend."""
        unnamed = [
            RevertError(
                f"{self._plan.mounts[handle].label} may still be writable: {error!r}",
                mend_command(self._plan.mounts[handle]),
            )
            for handle, error in self._leases.revert_errors.items()
            if not isinstance(error, RevertError)
        ]
        if unnamed:
            return first_cause(BaseExceptionGroup("not reverted", [*unnamed, caught]))
        return first_cause(caught)

    async def _run(self) -> None:
        try:
            await self._create()
            await self._open()
            await self._clean()
            self._verify()
            # Only now are names that are to be kept no longer owed; it can not be half done.
            with anyio.move_on_after(UNDO_S, shield=True):
                await self._ledger.settle(kept=self._keep)
        except BaseException as error:
            await self._undo(error)
            raise

    # -- create ---------------------------------------------------------------------------------

    async def _create(self) -> None:
        by_slot: dict[int, list[PlannedGhost]] = {}
        for planned in self._plan.ghosts.values():
            by_slot.setdefault(self._slots[planned.group], []).append(planned)
        async with anyio.create_task_group() as group:
            for slot, ghosts in by_slot.items():
                group.start_soon(self._create_in_slot, slot, ghosts)

    async def _create_in_slot(self, slot: int, ghosts: list[PlannedGhost]) -> None:
        # What the plan saw may have been replaced since: look directories up anew.
        await self._pool.call(slot, "forget_directories")
        ghosts.sort(key=lambda planned: planned.mount.namespace.target.index)
        for batch in _batches(ghosts, _CREATE_BATCH, _content, _CREATE_BYTES):
            await self._create_batch(slot, batch)
        # An outer directory has its name before an inner one is moved into it.
        directories = sorted((g for g in ghosts if g.final), key=lambda g: g.depth)
        for planned in directories:
            await self._place(slot, planned)

    async def _create_batch(self, slot: int, ghosts: Sequence[PlannedGhost]) -> None:
        await self._ledger.creating(ghosts, slot)
        request = [tuple(self._create_op(planned)) for planned in ghosts]
        try:
            answers, _ = await self._pool.call(
                slot,
                "create",
                request,
                target=ghosts[0].mount.namespace.target.index,
                mounts={planned.mount.service for planned in ghosts},
                fds=[self._pool.images],
            )
        except WorkerFailure as error:
            for planned, fields in zip(ghosts, error.failure.done, strict=False):
                self._ledger.created(planned, Created(*fields))
            raise self._failed(
                error.failure, ghosts[max(0, error.failure.at)].ghost.file
            ) from error
        for planned, fields in zip(ghosts, answers, strict=True):
            self._ledger.created(planned, Created(*fields))
        log.debug("created %d ghosts", len(ghosts))
        self._progress("create", len(ghosts))

    def _create_op(self, planned: PlannedGhost) -> CreateOp:
        ghost = planned.ghost
        return CreateOp(
            mount=planned.mount.service,
            directory=planned.directory,
            name=planned.name,
            mode=ghost.mode,
            uid=os.geteuid() if self._own_owner else ghost.uid,
            gid=os.getegid() if self._own_owner else ghost.gid,
            times=planned.times_ns,
            rdev=ghost.rdev or 0,
            target=ghost.target or b"",
            image=os.fsencode(ghost.file),
            size=ghost.size,
            extents=tuple((e.offset, e.length, e.position) for e in ghost.extents),
        )

    async def _place(self, slot: int, planned: PlannedGhost) -> None:
        await self._ledger.placing(planned)
        created = self._ledger.result(planned.ghost.id)
        operation = PlaceOp(
            planned.mount.service,
            planned.directory,
            planned.name,
            planned.parents,
            planned.final,
            created.device,
            created.inode,
        )
        try:
            (fields,), _ = await self._pool.call(
                slot,
                "place",
                [tuple(operation)],
                target=planned.mount.namespace.target.index,
                mounts=[planned.mount.service],
            )
        except WorkerFailure as error:
            raise self._failed(error.failure, planned.ghost.file) from error
        self._ledger.placed(planned, Placed(*fields))

    # -- open -----------------------------------------------------------------------------------

    async def _open(self) -> None:
        async with anyio.create_task_group() as group:
            for planned in self._plan.tasks:
                group.start_soon(self._bring_up, planned)

    async def _bring_up(self, planned: PlannedTask) -> None:
        pid = planned.task.pid
        async with self._barrier.party(pid), self._leases.hold(planned.leases):
            by_slot: dict[int, list[PlannedOpen]] = {}
            for opening in planned.opens:
                by_slot.setdefault(self._slots[opening.group], []).append(opening)
            async with anyio.create_task_group() as group:
                for slot, opens in by_slot.items():
                    group.start_soon(self._open_in_slot, slot, opens)
            log.debug("task %d has all its files open", pid)
            self._progress("arrive", 1)
            await self._barrier.arrive(pid)

    async def _open_in_slot(self, slot: int, opens: list[PlannedOpen]) -> None:
        opens.sort(key=lambda planned: planned.opening.mount.namespace.target.index)
        for batch in _batches(opens, _OPEN_BATCH):
            await self._open_batch(slot, batch)

    async def _open_batch(self, slot: int, opens: Sequence[PlannedOpen]) -> None:
        await self._ledger.linking(opens, slot)
        operations = [self._open_op(planned) for planned in opens]
        handles = {MountHandle(op.link) for op in operations}
        handles |= {MountHandle(op.live) for op in operations}
        try:
            answers, fds = await self._pool.call(
                slot,
                # Whoever wants them when they are kept has the names.
                "open" if self._hold else "open_kept",
                [tuple(operation) for operation in operations],
                target=opens[0].opening.mount.namespace.target.index,
                mounts=handles,
            )
        except WorkerFailure as error:
            name = text(opens[max(0, error.failure.at)].opening.file.name)
            raise self._failed(error.failure, name) from error
        if self._hold:
            ids = (planned.opening.file.id for planned in opens)
            self.restored.fds.update(zip(ids, fds, strict=True))
        for planned, fields in zip(opens, answers, strict=True):
            opened = Opened(*fields)
            self.restored.left += [left_behind(planned.opening.mount, path) for path in opened.left]
        if not self._keep:
            await self._ledger.unlinked(opens)
        self._progress("open", len(opens))

    def _open_op(self, planned: PlannedOpen) -> OpenOp:
        opening = planned.opening
        placed = self._plan.ghosts[opening.ghost.id]
        created = self._ledger.result(opening.ghost.id)
        operation = OpenOp(
            link=planned.link,
            temp_directory=b"",
            temp_name=b"",
            link_directory=b"",
            live=opening.mount.handle,
            live_directory=opening.site.directory,
            names=planned.names,
            flags=opening.flags,
            position=-1 if opening.file.position is None else opening.file.position,
            device=created.device,
            inode=created.inode,
            mode=opening.ghost.mode,
            size=self._size_to_check(opening.file.size, opening.ghost.mode),
            keep=self._keep,
        )
        if placed.final:
            # Directories have their name already, and it is found inside the file system.
            place = join(placed.mount.root, placed.final_directory)
            return operation._replace(
                live_directory=relative_to(place, opening.mount.root),
                names=(self._ledger.final_name(opening.ghost.id),),
            )
        return operation._replace(
            temp_directory=relative_to(placed.place, planned.link_root),
            temp_name=placed.name,
            link_directory=relative_to(opening.site.path, planned.link_root),
        )

    @staticmethod
    def _size_to_check(size: int | None, mode: int) -> int:
        # A directory's size is the file system's own affair.
        return -1 if size is None or not stat.S_ISREG(mode) else size

    # -- after the barrier ----------------------------------------------------------------------

    async def _clean(self) -> None:
        self.restored.left += await self._ledger.clear(keep=self._keep)
        self._progress("clean", 1)

    def _verify(self) -> None:
        """After everything: no name is left of any ghost (or one, if it was to be kept)."""
        if self._keep:
            return
        for planned in self._plan.opens:
            fd = self.restored.fds[planned.opening.file.id]
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                # Not every file system counts a directory's links down to zero.
                gone = os.readlink(f"/proc/self/fd/{fd}").endswith(" (deleted)")
            else:
                gone = status.st_nlink == 0
            if not gone:
                raise VerificationError(
                    f"{text(planned.opening.file.name)}: still has {status.st_nlink} names "
                    "after the restore: another process has linked it"
                )

    async def _undo(self, cause: BaseException) -> None:
        """Take back what was done; raises only if that fails, together with the cause."""
        log.info("undoing: %d names", len(self._ledger))
        with anyio.CancelScope(shield=True):
            self.restored.close()
            limit_s = UNDO_S + UNDO_NAME_S * len(self._ledger)
            try:
                with anyio.fail_after(limit_s):
                    self.restored.left += await self._ledger.clear()
            except TimeoutError:
                late = RevertError(f"undoing did not end within {limit_s:.0f} s", recover_command())
                raise ExceptionGroup("undoing failed", [late, *reportable(cause)]) from None
            except Exception as error:  # noqa: BLE001  raised again, with its cause
                raise ExceptionGroup("undoing failed", [error, *reportable(cause)]) from None

    def _failed(self, failure: Failure, subject: str) -> RestoreError:
        if failure.at < 0:
            return kernel_error(failure, self._plan.mounts)
        if failure.errno:
            return kernel_error(failure, self._plan.mounts, f"while restoring {subject}")
        return VerificationError(
            f"{subject}: restored file differs in its {failure.step} "
            f"({text(failure.path)} on its mount)"
        )


def _content(planned: PlannedGhost) -> int:
    return sum(extent.length for extent in planned.ghost.extents)


def _batches(
    items: Sequence[_T],
    most: int,
    weigh: Callable[[_T], int] = lambda item: 0,
    limit: int = 1,
) -> Iterator[list[_T]]:
    """Split into runs of at most `most` items that weigh `limit` together, or of one item."""
    batch: list[_T] = []
    weight = 0
    for item in items:
        own = weigh(item)
        if batch and (len(batch) >= most or weight + own > limit):
            yield batch
            batch, weight = [], 0
        batch.append(item)
        weight += own
    if batch:
        yield batch
