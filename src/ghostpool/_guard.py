"""The coordinator's side of the guardian: what is owed is told before it is changed.

One message for each batch of changes, as for the workers. A guardian that died fails the restore,
which is then undone by the coordinator itself; telling it that something is settled is best effort,
since undoing twice is harmless.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Hashable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import anyio

from ghostpool._errors import WorkerDied
from ghostpool._model import MountHandle
from ghostpool._pool import WorkerPool
from ghostpool._process import STOP_S, Child, ForkServer, Worker, WorkerFailure
from ghostpool._protocol import RemoveOp


class Owed(NamedTuple):
    """How to undo one change: a mount to make read-only, or names to remove."""

    key: tuple[str, int]
    target: int
    mount: MountHandle
    removals: tuple[RemoveOp, ...] = ()
    """Empty: the mount itself is owed."""


class Guard:
    """A running guardian."""

    def __init__(self, worker: Worker, pool: WorkerPool) -> None:
        self._worker = worker
        self._pool = pool

    @classmethod
    @asynccontextmanager
    async def running(cls, server: ForkServer, pool: WorkerPool) -> AsyncIterator[Guard]:
        """A guardian for the time of the block, which has settled everything by its end."""
        worker = await server.worker("guardian", mount_setattr=pool.mount_setattr)
        guard = cls(worker, pool)
        try:
            await pool.watch_with(guard.watch)
            yield guard
        finally:
            pool.watch_nobody()
            with anyio.CancelScope(shield=True):
                # What is still owed now could not be undone, and the user has been told.
                await guard.settle(None)
                await worker.stop()
                worker.kill()
                with anyio.move_on_after(STOP_S):
                    await worker.child.wait()

    async def watch(self, child: Child) -> None:
        """A worker whose end the guardian must see before it undoes anything."""
        if child.pidfd < 0:
            return  # it has ended already
        pidfd = os.dup(child.pidfd)
        try:
            await self._worker.call("watch", fds=[pidfd])
        finally:
            os.close(pidfd)

    async def owe(self, records: Sequence[Owed]) -> None:
        """Returns when the guardian knows. WorkerDied: it is gone, so nothing may be changed."""
        if not records:
            return
        request = [
            (
                record.key,
                "names" if record.removals else "mount",
                record.target,
                [tuple(removal) for removal in record.removals] or record.mount,
            )
            for record in records
        ]
        targets = {record.target: self._pool.target_fd(record.target) for record in records}
        mounts = {record.mount: self._pool.mounts[record.mount] for record in records}
        await self._worker.call("owe", request, namespaces=targets, mounts=mounts)

    async def settle(self, keys: Iterable[Hashable] | None) -> None:
        """These are undone, or were never done; None: everything is."""
        try:
            await self._worker.call("settle", None if keys is None else list(keys))
        except (WorkerDied, WorkerFailure):
            pass  # it has nothing to undo then, or finds nothing to do
