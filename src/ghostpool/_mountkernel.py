"""The kernel side of leases: workers change the read-only bit of live mounts, a batch at a time."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Collection, Mapping, Sequence

import anyio

from ghostpool._errors import BarrierBroken, KernelError, RevertError, WorkerDied
from ghostpool._followers import NOBODY, Events
from ghostpool._guard import Guard, Owed
from ghostpool._mend import describe_holders, kernel_error, mend_command
from ghostpool._model import MountHandle
from ghostpool._mountwork import GONE
from ghostpool._paths import text
from ghostpool._planned import PlannedMount
from ghostpool._pool import WorkerPool
from ghostpool._protocol import Failure
from ghostpool._workerclient import WorkerFailure

log = logging.getLogger("ghostpool")
BUSY_S = 2.0
"""How long a revert that meets EBUSY is tried again: a lookup or an unlink in flight is over
after microseconds, an open file is not."""


async def revert(
    pool: WorkerPool, target: int, handles: Sequence[MountHandle]
) -> dict[MountHandle, tuple[int, str] | None]:
    """Set the read-only bit of mounts of one namespace, waiting a moment for busy ones.

    By mount None, or errno and system call of the failure.
    """
    results: dict[MountHandle, tuple[int, str] | None] = {}
    pause = 0.001
    give_up = anyio.current_time() + BUSY_S
    while handles:
        answers, _ = await pool.insist(
            target % pool.jobs, "make_read_only", handles, target=target, mounts=handles
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


class PoolMounts:
    """The kernel side of leases: workers change the read-only bit of live mounts.

    Implements MountKernel over mount handles.
    """

    def __init__(
        self,
        pool: WorkerPool,
        mounts: Mapping[MountHandle, PlannedMount],
        guard: Guard,
        events: Events = NOBODY,
    ) -> None:
        self._pool = pool
        self._guard = guard
        self._events = events
        self._mounts = mounts
        self.identities: dict[MountHandle, int] = {}
        """Unique id (or mnt_id, before Linux 6.8) that each mount had when it was found."""
        self.writable_attributes: dict[MountHandle, int] = {}
        """What the kernel said of each mount right after it was made writable."""
        self._making = 0
        self._none_made = anyio.Event()
        self._no_more = self._closed = False
        self._changed: set[MountHandle] = set()
        """Mounts that we made writable, or may have, and have not put back."""
        self._found_writable = {handle for handle in mounts if not mounts[handle].mount.read_only}
        """Mounts that somebody else made writable: never to be made read-only."""

    def _by_target(self, mounts: Sequence[MountHandle]) -> dict[int, list[MountHandle]]:
        targets: dict[int, list[MountHandle]] = {}
        for handle in mounts:
            targets.setdefault(self._mounts[handle].namespace.target.index, []).append(handle)
        return targets

    async def make_writable(self, mounts: Sequence[MountHandle]) -> Sequence[bool | Exception]:
        """Clear the read-only bit of each; see MountKernel. BarrierBroken after `no_more`."""
        if self._no_more:
            raise BarrierBroken("everything is being put back")
        self._making += 1
        try:
            return await self._make_writable(mounts)
        finally:
            self._making -= 1
            self._none_made.set()

    async def no_more(self) -> None:
        """Make no mount writable any more; returns when none is about to become so."""
        self._no_more = True
        while self._making:
            self._none_made = anyio.Event()
            await self._none_made.wait()

    async def _make_writable(self, mounts: Sequence[MountHandle]) -> Sequence[bool | Exception]:
        results: dict[MountHandle, bool | Exception] = {}
        for handle in mounts:
            log.debug("make writable: %s", self._mounts[handle].label)
        for target, handles in self._by_target(mounts).items():
            request = [(handle, self.identities[handle]) for handle in handles]
            await self._guard.owe([Owed(_key(handle), target, handle) for handle in handles])
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
            except BaseException:
                # Found writable the next time, they count as ours.
                self._changed.update(self._read_only(handles))
                raise
            for handle, (changed, *rest) in zip(handles, answers, strict=True):
                if changed is None:
                    results[handle] = self._error(handle, *rest)
                else:
                    results[handle] = changed
                    if changed:
                        self._changed.add(handle)
                        self._found_writable.discard(handle)
                        self._tell(handle, writable=True)
                    elif handle not in self._changed:
                        self._found_writable.add(handle)
                    self.writable_attributes[handle] = rest[0]
        untouched = [_key(h) for h in mounts if results[h] is not True and h not in self._changed]
        if untouched:
            await self._guard.settle(untouched)
        return [results[handle] for handle in mounts]

    def _tell(self, handle: MountHandle, *, writable: bool) -> None:
        if not self._events:
            return
        from ghostpool._events import MountWritable, Reverted

        kind = MountWritable if writable else Reverted
        planned = self._mounts[handle]
        self._events.send(
            kind(
                target=planned.namespace.target.label,
                mountpoint=text(planned.mount.mountpoint),
                mount_id=planned.mount.mnt_id,
            )
        )

    def _read_only(self, mounts: Sequence[MountHandle]) -> list[MountHandle]:
        """Those that nobody else made writable."""
        return [handle for handle in mounts if handle not in self._found_writable]

    def _error(self, handle: MountHandle, code: int, step: str) -> KernelError:
        advice = {
            errno.ESTALE: "another mount is there since it was found",
            errno.EINVAL: "the mount was taken off since it was found",
            errno.ENOENT: "the mount was taken off since it was found",
            errno.EPERM: "its read-only flag is locked in this mount namespace",
            errno.EROFS: "its superblock became read-only since it was found",
        }.get(code)
        return kernel_error(Failure(0, code, step, b"", handle), self._mounts, advice)

    async def make_read_only(self, mounts: Sequence[MountHandle]) -> Sequence[Exception | None]:
        """Set the read-only bit of each again, waiting a moment for busy ones.

        After `close` nothing is done: whatever became of them was told by that.
        """
        if self._closed:
            return [None for _ in mounts]
        results: dict[MountHandle, Exception | None] = {}
        for handle in mounts:
            log.debug("back to read-only: %s", self._mounts[handle].label)
        ours = self._read_only(mounts)
        results.update((handle, None) for handle in self._found_writable.intersection(mounts))
        for target, handles in self._by_target(ours).items():
            try:
                answers = await revert(self._pool, target, handles)
            except (WorkerDied, WorkerFailure) as error:
                results.update((handle, self._not_reverted(handle, error)) for handle in handles)
                continue
            for handle, answer in answers.items():
                if answer is None:
                    results[handle] = None
                else:
                    results[handle] = await self._revert_error(handle, *answer)
        put_back = [handle for handle in ours if results[handle] is None]
        for handle in put_back:
            if handle in self._changed:
                self._tell(handle, writable=False)
        # Writable once more, it is by somebody else's doing, or by a change of ours to come.
        self._changed.difference_update(put_back)
        await self._guard.settle([_key(handle) for handle in put_back])
        return [results[handle] for handle in mounts]

    async def close(self, tried: Collection[MountHandle] = ()) -> list[Exception]:
        """Put back what is writable by our doing, or may be, whoever leased it; why mounts stay so.

        Nothing is changed any more after that. `tried` are left as they are.
        """
        await self.no_more()
        left = [handle for handle in self._changed if handle not in tried]
        answers = await self.make_read_only(left)
        self._closed = True
        return [answer for answer in answers if answer is not None]

    def _not_reverted(self, handle: MountHandle, error: Exception) -> RevertError:
        planned = self._mounts[handle]
        problem = f"{planned.label} may still be writable: {error}"
        return RevertError(problem, mend_command(planned))

    async def _revert_error(self, handle: MountHandle, code: int, step: str) -> Exception | None:
        planned = self._mounts[handle]
        if code in GONE:
            return None
        problem = f"{planned.label} stays writable: {step}: {os.strerror(code)}"
        if code == errno.EBUSY:
            problem += "; held for writing by " + await describe_holders(planned.mount.mnt_id)
        return RevertError(problem, mend_command(planned))


def _key(handle: MountHandle) -> tuple[str, int]:
    return ("mount", handle)
