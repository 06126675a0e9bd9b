"""Mount leases: who keeps a mount writable, and when it turns read-only again.

The first lease on a mount makes it writable, further ones only count, the last release puts
it back. `LeaseTable` decides that without an await; `MountLeases` does it, through a
`MountKernel` whose calls are shielded and bounded: once a change was asked for, its outcome
must be known, or nobody knows what there is to undo.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Generic, NoReturn, Protocol, TypeVar

import anyio
import anyio.lowlevel

from ghostpool._errors import RestoreError
from ghostpool._lease_table import (
    Acquired,
    LeaseState,
    LeaseStatistics,
    LeaseTable,
    M,
    MountUsage,
)
from ghostpool._unbroken import unbroken

_M_contra = TypeVar("_M_contra", bound=Hashable, contravariant=True)
_T = TypeVar("_T")

REVERT_S = 30.0
"""Seconds that one kernel call may take, retries of a busy mount included."""


class MountKernel(Protocol[_M_contra]):
    """What leases need from the outside; one call serves many mounts, as one message does.

    An answer has one item per mount, in the order of the question. A call that raises instead
    (its worker died) leaves the state of all its mounts unknown.
    """

    async def make_writable(self, mounts: Sequence[_M_contra], /) -> Sequence[bool | Exception]:
        """Clear the read-only bit: True if it was set, False if the mount already was writable.

        An Exception says that this one mount failed, and is as it was.
        """
        ...

    async def make_read_only(self, mounts: Sequence[_M_contra], /) -> Sequence[Exception | None]:
        """Set the bit again where `make_writable` cleared it; may be asked twice.

        EBUSY is retried in here; an Exception says that the mount is still writable. A mount
        that was writable before the first `make_writable` must be left alone: after a worker
        died in that call, leases ask for such a mount too, as they can not know.
        """
        ...


class _Change:
    """A kernel call under way on one mount, for those who wait for its end."""

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.error: Exception | None = None


class MountLeases(Generic[M]):
    """Leases on mounts, for concurrent tasks of one event loop; on live mounts by `open_leases`.

    The first lease on a mount makes it writable, further ones only count, and the last one that
    ends puts it back. Mounts are called by whatever can be hashed and `kernel` knows.

    `revert_s` bounds each kernel call, in seconds, since cancellation can not. With `reopen` false,
    a mount that was put back once is not opened a second time: a lease on it is BarrierBroken.
    `clock` gives seconds and never goes back.
    """

    def __init__(
        self,
        kernel: MountKernel[M],
        *,
        revert_s: float = REVERT_S,
        reopen: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kernel = kernel
        self._revert_s = revert_s
        self._table: LeaseTable[M] = LeaseTable(clock, reopen=reopen)
        self._changes: dict[M, _Change] = {}

    @asynccontextmanager
    async def hold(self, mounts: Iterable[M]) -> AsyncIterator[None]:
        """Keep all of `mounts` writable inside the block; one that is named twice counts once.

        Raises the kernel's error for the first mount that can not be made writable, after
        all others were let go; TimeoutError if the kernel does not answer in `revert_s`;
        BarrierBroken without `reopen`. A mount that can not be put back at the end raises
        the kernel's error for it; an exception of the block is kept beside it in an
        ExceptionGroup. Only a cancellation gives way to the error alone: asyncio's scopes can
        not take a Cancelled out of a group, and the scope still is cancelled.

        Cancelled before the block, it has changed nothing, or puts it back; waiting for the change
        of another task ends at once. The changes themselves are shielded.
        """
        wanted = tuple(dict.fromkeys(mounts))
        held: list[M] = []
        await anyio.lowlevel.checkpoint()  # a cancelled task must not open anything
        try:
            await self._acquire(wanted, held)
            await anyio.lowlevel.checkpoint_if_cancelled()  # it may have come under the shield
            yield
        except BaseException as error:
            failures = [one for one in await self._release(held) if one is not error]
            if not failures:
                raise
            raise_besides(error, failures)
        else:
            failures = await self._release(held)
            if failures:
                raise one_of(failures)

    @property
    def revert_errors(self) -> dict[M, Exception]:
        """Mounts that are still writable because their last revert failed, and why."""
        return self._table.revert_errors

    def usage(self) -> dict[M, MountUsage]:
        """What each mount went through so far."""
        return self._table.usage()

    def statistics(self) -> LeaseStatistics:
        """Numbers over all mounts, as of now."""
        return self._table.statistics()

    def __repr__(self) -> str:
        return f"<MountLeases {self._table.describe()}>"

    async def _acquire(self, mounts: tuple[M, ...], held: list[M]) -> None:
        """Lease `mounts`; `held` grows with every count that the caller has to give back.

        Nobody can wait in a circle here: what is waited for are kernel calls, never holders.
        """
        while mounts:
            step = self._table.acquire(mounts)
            held += step.ready + step.open + step.join
            # Fetched before the first await: later the mount may be in another change already.
            joined = [self._changes[mount] for mount in step.join]
            blocked = [self._changes[mount] for mount in step.blocked]
            if step.open:
                await self._open(step.open)
            for change in joined:
                await change.done.wait()
                if change.error is not None:
                    raise change.error
            for change in blocked:
                await change.done.wait()
            mounts = step.blocked

    async def _open(self, mounts: tuple[M, ...]) -> None:
        self._begin(mounts)
        outcomes: Sequence[bool | Exception]
        try:
            outcomes = await self._call("make_writable", self._kernel.make_writable, mounts)
        except BaseException as error:
            known = _for_others(error)
            for mount in mounts:
                self._table.opened(mount, known, unknown=True)
                self._end(mount, known)
            raise
        errors = []
        for mount, outcome in zip(mounts, outcomes, strict=True):
            self._table.opened(mount, outcome)
            failed = outcome if isinstance(outcome, Exception) else None
            self._end(mount, failed)
            if failed is not None:
                errors.append(failed)
        if errors:
            raise errors[0]

    async def _release(self, held: list[M]) -> list[Exception]:
        """Give back the leases; the errors of those mounts that could not be put back."""
        mounts = self._table.release(held)
        if not mounts:
            return []
        self._begin(mounts)
        outcomes: Sequence[Exception | None]
        try:
            outcomes = await self._call("make_read_only", self._kernel.make_read_only, mounts)
        except BaseException as error:
            known = _for_others(error)
            for mount in mounts:
                self._table.closed(mount, known)
                self._end(mount, None)
            if known is error:
                return [known]
            raise
        for mount, failed in zip(mounts, outcomes, strict=True):
            self._table.closed(mount, failed)
            self._end(mount, None)  # who waits here wants to open; a failed revert is no obstacle
        return [failed for failed in outcomes if failed is not None]

    async def _call(
        self,
        name: str,
        call: Callable[[Sequence[M]], Awaitable[Sequence[_T]]],
        mounts: tuple[M, ...],
    ) -> Sequence[_T]:
        async def bounded() -> Sequence[_T]:
            with anyio.move_on_after(self._revert_s):
                answer = await call(mounts)
                if len(answer) != len(mounts):
                    raise RuntimeError(f"{name}: {len(answer)} answers for {len(mounts)} mounts")
                return answer
            names = ", ".join(str(mount) for mount in mounts)
            raise TimeoutError(f"{name} of {names}: no answer within {self._revert_s:g} s")

        return await unbroken(bounded)

    def _begin(self, mounts: tuple[M, ...]) -> None:
        for mount in mounts:
            self._changes[mount] = _Change()

    def _end(self, mount: M, error: Exception | None) -> None:
        change = self._changes.pop(mount)
        change.error = error
        change.done.set()


def _for_others(error: BaseException) -> Exception:
    """`error` as other tasks get to see it: an interruption of one is not theirs to raise."""
    if isinstance(error, Exception):
        return error
    other = RestoreError(f"the change of a mount was interrupted: {error!r}")
    other.__cause__ = error
    return other


def raise_besides(error: BaseException, failures: list[Exception]) -> NoReturn:
    """Raise what keeps mounts from being put back, beside what ended the block before."""
    if isinstance(error, anyio.get_cancelled_exc_class()):
        raise one_of(failures) from error
    group = BaseExceptionGroup("failed, and mounts could not be put back", [error, *failures])
    raise group from None


def one_of(failures: list[Exception]) -> Exception:
    """The only failure, or a group of them."""
    if len(failures) == 1:
        return failures[0]
    return ExceptionGroup("mounts could not be put back", failures)


__all__ = [
    "REVERT_S",
    "Acquired",
    "LeaseState",
    "LeaseStatistics",
    "LeaseTable",
    "MountKernel",
    "MountLeases",
    "MountUsage",
]
