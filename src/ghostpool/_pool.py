"""The worker pool: at most `jobs` workers, each pinned in the namespace that its work is in.

A slot is the right to have one worker. Work is assigned to slots, not to workers: a worker that
was killed is replaced when its slot is used again, which is how its work gets undone. The pool
holds the mount descriptors; a worker is handed those it lacks with the request that needs them.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import shlex
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio

from ghostpool import _linux
from ghostpool._errors import KernelError, RevertError, WorkerDied
from ghostpool._model import MountHandle
from ghostpool._plan import PlannedMount
from ghostpool._process import ForkServer, Worker, WorkerFailure
from ghostpool._protocol import Failure
from ghostpool._targets import Target

log = logging.getLogger("ghostpool")
DEATH_S = 5.0
"""Seconds that are waited for a killed worker to be gone, which uninterruptible sleep delays."""
INSIST_S = 6.0
"""Seconds that one worker may take for undoing something, before another one is asked."""
INSIST = 3
"""How many workers may die of undoing one thing before it is given up."""
BUSY_S = 2.0
"""How long a revert that meets EBUSY is tried again: a lookup or an unlink in flight is over
after microseconds, an open file is not."""


_NOTHING = "nothing: the namespace was rebuilt for this run and ends with it"


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
        self._mount_setattr = mount_setattr
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
                self.peak_rss = max(self.peak_rss, await worker.stop() or 0)
                worker.kill()

    async def _worker(self, slot: int) -> Worker:
        async with self._locks[slot]:
            worker = self._slots[slot]
            if worker is not None and not worker.alive:
                # It may be in the middle of the system call that is to be undone.
                with anyio.move_on_after(DEATH_S, shield=True):
                    await worker.child.wait()
            if worker is None or not worker.alive:
                worker = await self._server.worker(mount_setattr=self._mount_setattr)
                self._slots[slot] = worker
                self.started += 1
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


def kernel_error(
    failure: Failure, mounts: Mapping[MountHandle, PlannedMount], advice: str | None = None
) -> KernelError:
    """A worker's failure with the mount and namespace named."""
    planned = mounts.get(MountHandle(failure.mount - failure.mount % 2))
    return KernelError(
        failure.errno,
        failure.step,
        failure.path.decode(errors="backslashreplace") or "the mount itself",
        mount=planned.mount.mountpoint.decode(errors="backslashreplace") if planned else None,
        namespace=planned.namespace.target.label if planned else None,
        advice=advice,
    )


class PoolMounts:
    """The kernel side of leases: workers change the read-only bit of live mounts.

    Implements MountKernel over mount handles.
    """

    def __init__(self, pool: WorkerPool, mounts: Mapping[MountHandle, PlannedMount]) -> None:
        self._pool = pool
        self._mounts = mounts
        self.identities: dict[MountHandle, int] = {}
        """Unique id (or mnt_id, before Linux 6.8) that each mount had when it was found."""
        self.writable_attributes: dict[MountHandle, int] = {}
        """What the kernel said of each mount right after it was made writable."""
        self._found_writable: set[MountHandle] = set()
        """Mounts that were writable when they were leased: never to be made read-only."""

    def _by_target(self, mounts: Sequence[MountHandle]) -> dict[int, list[MountHandle]]:
        targets: dict[int, list[MountHandle]] = {}
        for handle in mounts:
            targets.setdefault(self._mounts[handle].namespace.target.index, []).append(handle)
        return targets

    async def make_writable(self, mounts: Sequence[MountHandle]) -> Sequence[bool | Exception]:
        """Clear the read-only bit of each; see MountKernel."""
        results: dict[MountHandle, bool | Exception] = {}
        for handle in mounts:
            log.debug("make writable: %s", self._mounts[handle].label)
        for target, handles in self._by_target(mounts).items():
            request = [(handle, self.identities[handle]) for handle in handles]
            try:
                answers, _ = await self._pool.call(
                    target % self._pool.jobs,
                    "make_writable",
                    request,
                    target=target,
                    mounts=handles,
                )
            except WorkerFailure as error:  # the namespace could not be entered
                raise kernel_error(error.failure, self._mounts) from error
            for handle, (changed, *rest) in zip(handles, answers, strict=True):
                if changed is None:
                    results[handle] = self._error(handle, *rest)
                else:
                    results[handle] = changed
                    if not changed:
                        self._found_writable.add(handle)
                    self.writable_attributes[handle] = rest[0]
        return [results[handle] for handle in mounts]

    def _error(self, handle: MountHandle, code: int, step: str) -> KernelError:
        advice = {
            errno.ESTALE: "another mount is there since the plan was made",
            errno.EINVAL: "the mount was taken off since the plan was made",
            errno.EPERM: "its read-only flag is locked in this mount namespace",
            errno.EROFS: "its superblock became read-only since the plan was made",
        }.get(code)
        return kernel_error(Failure(0, code, step, b"", handle), self._mounts, advice)

    async def make_read_only(self, mounts: Sequence[MountHandle]) -> Sequence[Exception | None]:
        """Set the read-only bit of each again, waiting a moment for busy ones."""
        results: dict[MountHandle, Exception | None] = {}
        for handle in mounts:
            log.debug("back to read-only: %s", self._mounts[handle].label)
        ours = [handle for handle in mounts if handle not in self._found_writable]
        results.update((handle, None) for handle in self._found_writable.intersection(mounts))
        for target, handles in self._by_target(ours).items():
            try:
                answers = await self._revert(target, handles)
            except (WorkerDied, WorkerFailure) as error:
                results.update((handle, self._not_reverted(handle, error)) for handle in handles)
                continue
            for handle, answer in answers.items():
                results[handle] = None if answer is None else self._revert_error(handle, *answer)
        return [results[handle] for handle in mounts]

    async def _revert(
        self, target: int, handles: list[MountHandle]
    ) -> dict[MountHandle, tuple[int, str] | None]:
        results: dict[MountHandle, tuple[int, str] | None] = {}
        pause = 0.001
        give_up = anyio.current_time() + BUSY_S
        while handles:
            answers, _ = await self._pool.insist(
                target % self._pool.jobs, "make_read_only", handles, target=target, mounts=handles
            )
            results.update(zip(handles, answers, strict=True))
            handles = [
                handle
                for handle in handles
                if (answer := results[handle]) is not None and answer[0] == errno.EBUSY
            ]
            if anyio.current_time() >= give_up:
                break
            if handles:
                await anyio.sleep(pause)
                pause = min(2 * pause, 0.1)
        return results

    def _not_reverted(self, handle: MountHandle, error: Exception) -> RevertError:
        planned = self._mounts[handle]
        problem = f"{planned.label} may still be writable: {error}"
        return RevertError(problem, mend_command(planned))

    def _revert_error(self, handle: MountHandle, code: int, step: str) -> Exception | None:
        planned = self._mounts[handle]
        if code in (errno.EINVAL, errno.ENOENT):
            return None  # taken off meanwhile: there is nothing left to put back
        reason = "somebody has a file open for writing on it" if code == errno.EBUSY else ""
        problem = f"{planned.label} stays writable: {step}: {os.strerror(code)}"
        if reason:
            problem += f" ({reason})"
        return RevertError(problem, mend_command(planned))


def mend_command(planned: PlannedMount) -> str:
    """What a user runs to make a mount read-only again, with every other flag restated."""
    enter = planned.namespace.target.enter
    if enter is None:
        return _NOTHING
    options = ",".join(["remount", "bind", "ro", *planned.mount.options()[1:]])
    return f"mount -N {enter} -o {options} {_quoted(planned.mount.mountpoint)}"


def remove_command(planned: PlannedMount, path: bytes, is_directory: bool) -> str:
    """What a user runs to remove a name that was left, given by its path inside the mount."""
    enter = planned.namespace.target.enter
    if enter is None:
        return _NOTHING
    tool = "rmdir" if is_directory else "rm -f"
    inside = planned.mount.mountpoint.rstrip(b"/") + b"/" + path
    if enter.isdecimal():
        return f"{tool} {_quoted(b'/proc/' + enter.encode() + b'/root' + inside)}"
    return f"nsenter --mount={shlex.quote(enter)} {tool} {_quoted(inside)}"


def _quoted(path: bytes) -> str:
    return shlex.quote(path.decode(errors="surrogateescape"))


__all__ = [
    "PoolMounts",
    "WorkerDied",
    "WorkerFailure",
    "WorkerPool",
    "kernel_error",
    "mend_command",
    "remove_command",
]
