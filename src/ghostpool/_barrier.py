"""The task barrier: nobody goes on before every task of the image has arrived.

What CRIU's restore_wait_other_tasks does for its stages: a mount is put back only after the
last file of the last task is open. A task that fails or is cancelled before that breaks the
barrier, so that the others are told at once instead of waiting for it forever.
Once passed, the barrier stays passed; once broken, it stays broken, for the first cause.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable, Iterable
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel

from ghostpool._errors import BarrierBroken


class TaskBarrier:
    """A barrier for named parties, each of which arrives once; for tasks of one event loop.

    Parties are whatever can be hashed. Nobody is let go before the last of them has arrived. It is
    open until it is passed or broken, and stays that: who comes to a broken barrier, however late,
    gets BarrierBroken at once. There is no time limit but the caller's own cancel scopes. Without
    any party it is passed from the start. ValueError if a party is named twice.
    """

    def __init__(self, parties: Iterable[Hashable]) -> None:
        self._parties = tuple(parties)
        self._arrived: set[Hashable] = set()
        self._waiting: set[Hashable] = set()
        self._cause: BaseException | None = None
        self._over = anyio.Event()
        if len(set(self._parties)) != len(self._parties):
            raise ValueError("a party is named twice")

    @property
    def passed(self) -> bool:
        """All parties have arrived."""
        return self._cause is None and len(self._arrived) == len(self._parties)

    @property
    def broken(self) -> bool:
        """A party failed, or was cancelled, before all had arrived."""
        return self._cause is not None

    @property
    def cause(self) -> BaseException | None:
        """What broke the barrier."""
        return self._cause

    @property
    def waiting(self) -> tuple[Hashable, ...]:
        """Who waits in `arrive` now, in the order of the constructor."""
        return tuple(party for party in self._parties if party in self._waiting)

    @property
    def missing(self) -> tuple[Hashable, ...]:
        """Who has not arrived (before the barrier broke), in the order of the constructor."""
        return tuple(party for party in self._parties if party not in self._arrived)

    def __repr__(self) -> str:
        state = "passed" if self.passed else "broken" if self.broken else "open"
        return (
            f"<TaskBarrier {state}, {len(self._arrived)} of {len(self._parties)} arrived, "
            f"{len(self._waiting)} waiting>"
        )

    async def arrive(self, party: Hashable) -> None:
        """Wait until all parties have arrived.

        BarrierBroken, chained to the cause, if one failed instead, before or after this arrival.
        RuntimeError for a stranger and for a party that arrives twice. Being cancelled in here
        breaks the barrier for all the others, unless the last of them arrives at the same time.
        """
        self._require(party)
        if party in self._arrived:
            raise RuntimeError(f"{party!r} arrives twice")
        self.check()
        try:
            await anyio.lowlevel.checkpoint_if_cancelled()
            self._arrived.add(party)
            if self.passed:
                self._over.set()
                await anyio.lowlevel.cancel_shielded_checkpoint()
                return
            self._waiting.add(party)
            await self._over.wait()
        except BaseException as error:
            self.break_(error)
            raise
        finally:
            self._waiting.discard(party)
        self.check()

    async def wait_passed(self) -> None:
        """Wait for the others without being a party. BarrierBroken if one of them failed."""
        if not self.passed:
            await self._over.wait()
        self.check()

    def check(self) -> None:
        """Raise BarrierBroken, chained to the cause, if the barrier is broken."""
        if self._cause is not None:
            names = ", ".join(str(party) for party in self.missing) or "none"
            raise BarrierBroken(
                f"another task did not reach the barrier (missing: {names}): {self._cause!r}"
            ) from self._cause

    def break_(self, cause: BaseException) -> None:
        """Send BarrierBroken to all who wait and all who arrive later.

        Without effect on a barrier that is passed, or broken by somebody else already.
        """
        if not self.passed and self._cause is None:
            self._cause = cause
            self._over.set()

    @asynccontextmanager
    async def party(self, party: Hashable) -> AsyncIterator[None]:
        """Arrive at the end of the block, unless it has arrived itself, and wait there.

        Leaving by an exception or a cancellation breaks the barrier with it. BarrierBroken at
        once if the barrier is broken already: there is no use in starting.

        What has to outlive the barrier, as a lease does, goes around the arrival:

            async with barrier.party(task), leases.hold(mounts):
                ...
                await barrier.arrive(task)
        """
        self._require(party)
        self.check()
        try:
            yield
        except BaseException as error:
            self.break_(error)
            raise
        if party in self._arrived:
            self.check()
        else:
            await self.arrive(party)

    def _require(self, party: Hashable) -> None:
        if party not in self._parties:
            raise RuntimeError(f"{party!r} is no party of this barrier")


__all__ = ["TaskBarrier"]
