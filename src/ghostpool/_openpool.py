"""A pool of ghosts for programs whose own tasks decide when each of them opens its files.

The block structure is the contract: nothing goes on after the pool's block, whatever ended it.
Signals, time limits and cancellation are the program's own.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from types import MappingProxyType
from typing import Unpack

import anyio
from anyio.abc import TaskStatus

from ghostpool._launch import launch
from ghostpool._lease_table import LeaseStatistics
from ghostpool._listener import Listener
from ghostpool._planned import Plan, PlannedTask
from ghostpool._report import Report
from ghostpool._request import Options, request_of
from ghostpool._restore import PoolTask
from ghostpool._run import Session, prepared_to_restore


class GhostPool:
    """Ghosts that wait for their tasks. Made by `open_pool`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._restoration = session.restoration
        self.tasks: Mapping[int, PlannedTask] = MappingProxyType(self._restoration.tasks)
        """The tasks of the images by their pids there, those without any ghost too."""

    @property
    def plan(self) -> Plan:
        """What is done; without refusals."""
        return self._restoration.plan

    def __repr__(self) -> str:
        numbers = self.statistics()
        arrived = len(self.tasks) - len(self._restoration.barrier.missing)
        return (
            f"<GhostPool {arrived} of {len(self.tasks)} tasks arrived, {numbers.owed} mounts "
            f"writable, {numbers.leases} leases>"
        )

    def statistics(self) -> LeaseStatistics:
        """Numbers of the leases on mounts, at this moment."""
        return self._restoration.statistics()

    def task(self, pid: int) -> AbstractAsyncContextManager[PoolTask]:
        """Bring up the task with this pid in the images, in a block.

        At the beginning the read-only mounts that the task needs become writable, unless another
        task has them so already. Leaving the block opens what was not asked for, arrives at the
        barrier, and waits there until all tasks have; then the mounts are put back. So each task
        needs an asynchronous task of its own: one after the other, the first would wait forever.

        Leaving the block by an exception, or cancelled, breaks the barrier: the blocks of the
        others end in BarrierBroken, and so does entering a further one. KernelError, WorkerDied
        and the like say what could not be done; RevertError that a mount could not be put back.
        RuntimeError for a pid that the images do not have, and for a second time.
        """
        return self._restoration.task(pid)

    async def serve(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        tasks: Iterable[int] | None = None,
        task_status: TaskStatus[str] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Have processes in any language bring up `tasks` (pids; None: all) on a UNIX socket.

            await group.start(functools.partial(pool.serve, "/run/agent/tasks", tasks=[7, 9]))

        A consumer is one of the pool's tasks from its hello on, as if its block had been entered
        here; the protocol is in docs/task-socket.md. Tasks without a ghost arrive by themselves.
        `path`: where the socket is to be, in a directory where others can not replace it; None: in
        the run directory, by a random name. That it listens, and where, is what `start` of a task
        group gives. This returns when all tasks, not only these, have arrived; the consumers are
        released by `finish`, and told at the end of the pool's block if everything was undone.

        PlanError if the socket can not be made. ConsumerLost, in a group, if a consumer was gone
        before that, BarrierBroken, in a group, if another task failed: either way the barrier is
        broken. So it is if this is cancelled. RuntimeError for a pid that the images do not have.
        """
        run_dir = self._session.run.request.run_dir
        listener = Listener(None if path is None else os.fspath(path), run_dir)
        try:
            await self._session.serve(
                listener, tasks, started=lambda server: task_status.started(server.path)
            )
        finally:
            listener.close()

    async def finish(self) -> Report:
        """Wait until all tasks have left their blocks, and conclude; what was done.

        When this returns the mounts are as they were, the temporary names are gone, no ghost has a
        name, and no worker is left; the descriptors stay until the pool's block ends.
        BarrierBroken if a task failed, VerificationError if somebody else gave a ghost a name.
        Cancelled, or after an error, the pool's block undoes everything; but RevertError means
        that the files are restored and a mount or name needs you. RuntimeError if a task was never
        brought up, or when it is finished already.
        """
        await self._session.finish()
        return self._session.run.report

    async def _conclude(self) -> None:
        """The block was left without an error."""
        if self._restoration.can_finish:
            await self.finish()


@asynccontextmanager
async def open_pool(
    images: str | os.PathLike[str], **options: Unpack[Options]
) -> AsyncIterator[GhostPool]:
    """Create the ghosts of the image directory `images`, and bring up its tasks in the block.

        async with ghostpool.open_pool("img/", namespaces={11: 4242}) as pool:
            async with anyio.create_task_group() as group:
                for pid in pool.tasks:
                    group.start_soon(bring_up, pool, pid)
            report = await pool.finish()

    When the block begins, the ghosts exist under temporary names, on private clones of their
    mounts, and no mount that others see has changed. At its end the mounts are as they were and
    every temporary name is gone: by `finish`, which is done for you if all tasks have arrived, or
    by undoing everything, which an exception, a cancellation, and leaving before all have arrived
    (BarrierBroken) do. Undoing can not be cancelled, and takes as long as the file systems do, at
    most a minute, and half a second for each name. SIGKILL of this process has the guardian undo
    it.

    Errors come out in an ExceptionGroup: PlanError (nothing was touched), RestoreError (undone),
    RevertError (something needs you, `command` says what to do), and what was raised in the block.
    A cancellation comes out as such. No signal handler is installed; RLIMIT_NOFILE is raised to
    the hard limit meanwhile. Of two runs that work on one mount at the same time, one may fail
    (EROFS), with everything undone. Needs CAP_SYS_ADMIN over the namespaces; see also `Options`.
    """
    request = request_of(images, options)
    with grouped():
        async with (
            prepared_to_restore(request, launch(), Report()) as run,
            run.restoring() as session,
        ):
            pool = GhostPool(session)
            yield pool
            await pool._conclude()


@contextmanager
def grouped() -> Iterator[None]:
    """Whatever goes wrong comes out in a group, as from a task group, for `except*`."""
    try:
        yield
    except ExceptionGroup:
        raise
    except Exception as error:  # noqa: BLE001  raised again
        raise ExceptionGroup("the restore failed", [error]) from None


__all__ = ["GhostPool", "open_pool"]
