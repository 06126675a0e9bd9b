"""The worker pool: at most `jobs` workers, each pinned in the namespace that its work is in.

A slot is the right to have one worker. Work is assigned to slots, not to workers: a worker that
was killed is replaced when its slot is used again, which is how its work gets undone. The pool
holds the mount descriptors; a worker is handed those it lacks with the request that needs them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio

from ghostpool import _linux
from ghostpool._errors import WorkerDied, WorkerHung
from ghostpool._followers import NOBODY, Events
from ghostpool._memory import MemoryBound
from ghostpool._model import MountHandle
from ghostpool._planned import PlannedGhost
from ghostpool._pod import container_of
from ghostpool._process import Child, ForkServer
from ghostpool._targets import Target
from ghostpool._unbroken import unbroken
from ghostpool._unpacking import Unpacking
from ghostpool._workerclient import WorkerClient

log = logging.getLogger("ghostpool")
DEATH_S = 5.0
"""Seconds that are waited for a killed worker to be gone, which uninterruptible sleep delays."""
INSIST_S = 20.0
"""Seconds that one worker may take for undoing something, before another one is asked."""
INSIST_STALL_S = 6.0
"""Seconds without a sign of life that it may take: to ask another one does no harm."""
INSIST = 3
"""How many workers may die of undoing one thing before it is given up."""
_HEAVY = frozenset(
    (
        "mountinfo",
        "open_mounts",
        "clone",
        "look",
        "create",
        "open",
        "open_discarded",
    )
)
"""Requests that wait while the run is over its bound of memory."""
_NAMED = 3
"""Mounts that are named where a worker hangs."""


class WorkerPool:
    """Workers by slot. Made by `running`, which ends them."""

    def __init__(
        self,
        server: ForkServer,
        jobs: int,
        targets: Iterable[Target],
        *,
        mount_setattr: bool = True,
        devices: bool = False,
        memory: MemoryBound | None = None,
    ) -> None:
        self.jobs = jobs
        self._memory = memory
        self.mounts: dict[MountHandle, int] = {}
        """Descriptors of mounts, owned by the pool."""
        self.labels: dict[MountHandle, str] = {}
        """What people call the mounts, for messages."""
        self._server = server
        self._targets: dict[int, int] = {}
        self._target_labels: dict[int, str] = {}
        self.add_targets(targets)
        self.mount_setattr = mount_setattr
        self._devices = devices
        self._acting: dict[int, tuple[int, int]] = {}
        self._watch: Callable[[Child], Awaitable[None]] | None = None
        self.images: list[int] = []
        """Directory or archive that ghost images are read from, lent to requests that create; of a
        pod, one for each container."""
        self.contents: Unpacking | None = None
        """Where they come from instead, if the archive is packed."""
        self.devshm = -1
        """The archive of /dev/shm, likewise, if there is one."""
        self._slots: list[WorkerClient | None] = [None] * jobs
        self._locks = [anyio.Lock() for _ in range(jobs)]
        self._undead: list[tuple[int, Child]] = []
        self.events: Events = NOBODY
        self._entered: set[tuple[int, int]] = set()
        self.started: int = 0
        """Workers forked so far."""
        self.peak_rss: int = 0
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
        devices: bool = False,
        memory: MemoryBound | None = None,
    ) -> AsyncIterator[WorkerPool]:
        """A pool for the time of the block; at its end no worker and no descriptor is left.

        `devices`: workers may make them.
        """
        pool = cls(
            server, jobs, targets, mount_setattr=mount_setattr, devices=devices, memory=memory
        )
        try:
            yield pool
        finally:
            await unbroken(pool.stop)
            _linux.close_all(pool.mounts.values())
            pool.mounts.clear()

    def __repr__(self) -> str:
        alive = sum(1 for worker in self._slots if worker is not None and worker.alive)
        return f"<WorkerPool {alive} of {self.jobs} workers, {len(self.mounts)} mounts>"

    async def watch_with(self, watch: Callable[[Child], Awaitable[None]]) -> None:
        """Have `watch` told of every worker there is, and of each that is started later."""
        self._watch = watch
        for worker in self._slots:
            if worker is not None and worker.alive:
                await watch(worker.child)

    def add_targets(self, targets: Iterable[Target]) -> None:
        """Further namespaces that work may be done in."""
        self._targets.update((target.index, target.fd) for target in targets)
        self._target_labels.update((target.index, target.label) for target in targets)

    async def act_as(self, owners: Mapping[int, tuple[int, int]]) -> None:
        """By target: who owns what workers make there, where it can not be ghostpool's user.

        The workers that there are have given up for good what this takes: others replace them.
        """
        if owners:
            await self.stop()
            self._acting.update(owners)

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

    async def forget_mounts(self) -> None:
        """Close all mounts, and end the workers that have them: others will have their numbers."""
        await unbroken(self.stop)
        _linux.close_all(self.mounts.values())
        self.mounts.clear()
        self.labels.clear()

    async def _stop(self, slot: int) -> None:
        async with self._locks[slot]:
            worker, self._slots[slot] = self._slots[slot], None
            if worker is not None:
                try:
                    self.peak_rss = max(self.peak_rss, await worker.stop() or 0)
                finally:
                    worker.kill()  # cancelled or not: nobody else knows it any more

    async def _worker(self, slot: int, unwatched: bool) -> WorkerClient:
        """The slot's worker; see `call`."""
        async with self._locks[slot]:
            await self._bury(slot)
            worker = self._slots[slot]
            if worker is None and self._memory is not None and not self._memory.may_start():
                worker = self._slots[slot] = self._least_shared()
            if worker is None:
                worker = await WorkerClient.forked(
                    self._server,
                    mount_setattr=self.mount_setattr,
                    devices=self._devices,
                    acting=bool(self._acting),
                )
                self._slots[slot] = worker
                self.started += 1
                if self._watch is not None:
                    try:
                        await self._watch(worker.child)
                    except WorkerDied:
                        # Who watches is dead: the run fails, and is undone by such workers.
                        if not unwatched:
                            raise
                    except BaseException:
                        self._slots[slot] = None
                        worker.kill()  # nobody would see its end
                        raise
            return worker

    def _least_shared(self) -> WorkerClient | None:
        """The worker that serves the fewest slots: it takes one request after the other."""
        serving: dict[WorkerClient, int] = {}
        for worker in self._slots:
            if worker is not None and worker.alive:
                serving[worker] = serving.get(worker, 0) + 1
        return min(serving, key=lambda worker: serving[worker], default=None)

    async def _bury(self, slot: int) -> bool:
        """Wait a moment for the end of the slot's worker, if it was killed; whether it has ended.

        It may be in the middle of the system call that is to be undone.
        """
        worker = self._slots[slot]
        if worker is None or worker.alive:
            return True
        with anyio.move_on_after(DEATH_S, shield=True):
            await worker.child.wait()
        self._slots[slot] = None
        if worker.child.status is None:
            self._undead.append((slot, worker.child))
            log.info("%s was killed, but has not ended", worker.name)
            return False
        return True

    def undead(self, slot: int) -> list[Child]:
        """Workers of the slot that were killed and did not end in time. What they were in the
        middle of may still happen, until they have a status."""
        return [child for number, child in self._undead if number == slot]

    def by_images(self, ghosts: list[PlannedGhost]) -> Iterable[tuple[int, list[PlannedGhost]]]:
        """The same ghosts, those together whose contents are in the same images, and these."""
        if len(self.images) == 1:
            return ((self.images[0], ghosts),)
        own: dict[int, list[PlannedGhost]] = {}
        for planned in ghosts:
            images = self.images[container_of(planned.ghost.id) - 1]
            own.setdefault(images, []).append(planned)
        return own.items()

    async def call(
        self,
        slot: int,
        request: str,
        *arguments: object,
        target: int = -1,
        mounts: Iterable[MountHandle] = (),
        fds: Iterable[int] = (),
        deadline_s: float = math.inf,
        stall_s: float = math.inf,
        unwatched: bool = False,
        sent: Callable[[], object] = lambda: None,
    ) -> tuple[Any, list[int]]:
        """Have the slot's worker do one request in a target namespace.

        `sent` is called as soon as it has the request.

        WorkerFailure: an operation failed. WorkerDied: the worker ended. WorkerHung: it was
        killed, since it showed no sign of life for `stall_s` seconds, or those of all workers.
        `unwatched`: it is no matter that nobody is left to watch the worker.
        """
        handles = list(mounts)
        async with AsyncExitStack() as stack:
            if self._memory is not None and request in _HEAVY:
                await stack.enter_async_context(self._memory.turn())
            worker = await self._worker(slot, unwatched)
            try:
                answer = await worker.call(
                    request,
                    *arguments,
                    namespace=target,
                    acting=self._acting.get(target),
                    namespaces={target: self._targets[target]} if target >= 0 else {},
                    mounts={handle: self.mounts[handle] for handle in handles},
                    fds=fds,
                    deadline_s=deadline_s,
                    stall_s=stall_s,
                    sent=sent,
                )
            except WorkerHung as error:
                where = self._where(target, handles)
                raise WorkerHung(f"{error}, working on {where}") from error
            if self.events and target >= 0:
                self._note_entry(worker.child.pid, target)
            return answer

    def _note_entry(self, worker: int, target: int) -> None:
        if (worker, target) not in self._entered:
            from ghostpool._events import Entered

            self._entered.add((worker, target))
            self.events.send(Entered(worker=worker, target=self._target_labels[target]))

    def _where(self, target: int, handles: Sequence[MountHandle]) -> str:
        labels = {self.labels[handle]: None for handle in handles if handle in self.labels}
        if not labels:
            return self._target_labels.get(target, "no mount")
        more = f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else ""
        return ", ".join(list(labels)[:_NAMED]) + more

    async def insist(
        self,
        slot: int,
        request: str,
        *arguments: object,
        target: int = -1,
        mounts: Iterable[MountHandle] = (),
        deadline_s: float = INSIST_S,
    ) -> tuple[Any, list[int]]:
        """Like `call`, for what undoes things and may be done twice: a worker that dies of it is
        replaced, a few times over. But where not even SIGKILL ends one, others would only follow.
        """
        handles = list(mounts)
        for left in reversed(range(INSIST)):
            try:
                return await self.call(
                    slot,
                    request,
                    *arguments,
                    target=target,
                    mounts=handles,
                    deadline_s=deadline_s,
                    stall_s=INSIST_STALL_S,
                    unwatched=True,
                )
            except WorkerDied as error:
                if not left or not await self._has_ended(slot):
                    raise
                log.info("%s: tried again with another worker", error)
        raise AssertionError("the last try returns or raises")

    async def _has_ended(self, slot: int) -> bool:
        async with self._locks[slot]:
            return await self._bury(slot)

    def learned(self, slot: int, handles: Iterable[MountHandle]) -> None:
        """The slot's worker opened these mounts itself and needs not be handed them."""
        worker = self._slots[slot]
        if worker is not None:
            worker.learned(handles)
