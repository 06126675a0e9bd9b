"""The worker pool: at most `jobs` workers, each pinned in the namespace that its work is in.

A slot is the right to have one worker. Work is assigned to slots, not to workers: a worker that
was killed is replaced when its slot is used again, which is how its work gets undone. The pool
holds the mount descriptors; a worker is handed those it lacks with the request that needs them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio

from ghostpool import _linux
from ghostpool._errors import WorkerDied
from ghostpool._model import MountHandle
from ghostpool._process import Child, ForkServer, Worker
from ghostpool._targets import Target

log = logging.getLogger("ghostpool")
DEATH_S = 5.0
"""Seconds that are waited for a killed worker to be gone, which uninterruptible sleep delays."""
INSIST_S = 6.0
"""Seconds that one worker may take for undoing something, before another one is asked."""
INSIST = 3
"""How many workers may die of undoing one thing before it is given up."""


class WorkerPool:
    """Workers by slot. Made by `running`, which ends them."""

    def __init__(
        self,
        server: ForkServer,
        jobs: int,
        targets: Sequence[Target],
        *,
        mount_setattr: bool = True,
    ) -> None:
        self.jobs = jobs
        self.mounts: dict[MountHandle, int] = {}
        """Descriptors of mounts, owned by the pool."""
        self._server = server
        self._targets = {target.index: target.fd for target in targets}
        self.mount_setattr = mount_setattr
        self._watch: Callable[[Child], Awaitable[None]] | None = None
        self._images = -1
        self._slots: list[Worker | None] = [None] * jobs
        self._locks = [anyio.Lock() for _ in range(jobs)]
        self.started = 0
        """Workers forked so far."""
        self.peak_rss = 0
        """Largest resident set of a worker that has ended, in bytes."""

    @classmethod
    @asynccontextmanager
    async def running(
        cls,
        server: ForkServer,
        jobs: int,
        targets: Sequence[Target],
        *,
        mount_setattr: bool = True,
    ) -> AsyncIterator[WorkerPool]:
        """A pool for the time of the block; at its end no worker and no descriptor is left."""
        pool = cls(server, jobs, targets, mount_setattr=mount_setattr)
        try:
            yield pool
        finally:
            with anyio.CancelScope(shield=True):
                await pool.stop()
            _linux.close_all(pool.mounts.values())
            pool.mounts.clear()

    def __repr__(self) -> str:
        alive = sum(1 for worker in self._slots if worker is not None and worker.alive)
        return f"<WorkerPool {alive} of {self.jobs} workers, {len(self.mounts)} mounts>"

    def set_images(self, directory_fd: int) -> None:
        """The directory that ghost images are read from; stays the caller's."""
        self._images = directory_fd

    async def watch_with(self, watch: Callable[[Child], Awaitable[None]]) -> None:
        """Have `watch` told of every worker there is, and of each that is started later."""
        self._watch = watch
        for worker in self._slots:
            if worker is not None and worker.alive:
                await watch(worker.child)

    def watch_nobody(self) -> None:
        """Nobody is told any more."""
        self._watch = None

    def target_fd(self, target: int) -> int:
        """Descriptor of a target namespace."""
        return self._targets[target]

    async def stop(self) -> None:
        """End all workers; they can be started again by the next call."""
        async with anyio.create_task_group() as group:
            for slot in range(self.jobs):
                if self._slots[slot] is not None:
                    group.start_soon(self._stop, slot)

    async def _stop(self, slot: int) -> None:
        async with self._locks[slot]:
            worker, self._slots[slot] = self._slots[slot], None
            if worker is not None:
                try:
                    self.peak_rss = max(self.peak_rss, await worker.stop() or 0)
                finally:
                    worker.kill()  # cancelled or not: nobody else knows it any more

    async def _worker(self, slot: int) -> Worker:
        async with self._locks[slot]:
            worker = self._slots[slot]
            if worker is not None and not worker.alive:
                # It may be in the middle of the system call that is to be undone.
                with anyio.move_on_after(DEATH_S, shield=True):
                    await worker.child.wait()
            if worker is None or not worker.alive:
                worker = await self._server.worker(mount_setattr=self.mount_setattr)
                self._slots[slot] = worker
                self.started += 1
                if self._watch is not None:
                    await self._watch(worker.child)
                if self._images >= 0:
                    await worker.call("images", fds=[self._images])
            return worker

    async def call(
        self,
        slot: int,
        request: str,
        *arguments: object,
        target: int = -1,
        mounts: Iterable[MountHandle] = (),
        fds: Iterable[int] = (),
        deadline_s: float = math.inf,
    ) -> tuple[Any, list[int]]:
        """Have the slot's worker do one request in a target namespace.

        WorkerFailure: an operation failed. WorkerDied: the worker ended or hung.
        """
        worker = await self._worker(slot)
        return await worker.call(
            request,
            *arguments,
            namespace=target,
            namespaces={target: self._targets[target]} if target >= 0 else {},
            mounts={handle: self.mounts[handle] for handle in mounts},
            fds=fds,
            deadline_s=deadline_s,
        )

    async def insist(
        self,
        slot: int,
        request: str,
        *arguments: object,
        target: int = -1,
        mounts: Iterable[MountHandle] = (),
    ) -> tuple[Any, list[int]]:
        """Like `call`, for what undoes things and may be done twice: a worker that dies of it is
        replaced, a few times over."""
        handles = list(mounts)
        for _ in range(INSIST - 1):
            try:
                return await self.call(
                    slot,
                    request,
                    *arguments,
                    target=target,
                    mounts=handles,
                    deadline_s=INSIST_S,
                )
            except WorkerDied as error:
                log.info("%s: tried again with another worker", error)
        return await self.call(
            slot, request, *arguments, target=target, mounts=handles, deadline_s=INSIST_S
        )

    def learned(self, slot: int, handles: Iterable[MountHandle]) -> None:
        """The slot's worker opened these mounts itself and needs not be handed them."""
        worker = self._slots[slot]
        if worker is not None:
            worker.learned(handles)
