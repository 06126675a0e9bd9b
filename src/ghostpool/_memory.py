"""A bound on the memory of a whole run: while it is over that, further work waits.

What the coordinator and its children take together is their PSS, in which a page that several
share counts once. It is measured before work is begun, a few times a second at most. Work that was
begun goes on, and one piece of it always may be, so nothing waits for itself; what undoes things
is never held back. A worker that would go beyond the bound is not started: another one does its
work as well.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread

from ghostpool._errors import PlanError

SAMPLE_S = 0.1
"""Seconds between two measurements, at the least."""
WORKER_BYTES = 4 << 20
"""What a worker is taken for as long as none has been measured."""
_MARGIN = 1.1
"""What is asked for is a little more than what was seen: the next run differs."""

Measure = Callable[[Iterable[int]], Mapping[int, int]]


class MemoryBound:
    """The bound of one run: `limit` bytes for the processes that `pids` names.

    The first two are coordinator and fork server, the rest workers and what is like them.
    """

    def __init__(
        self, limit: int, pids: Callable[[], list[int]], measure: Measure | None = None
    ) -> None:
        self.limit = limit
        self.peak: int = 0
        """Most bytes seen so far."""
        self._pids = pids
        self._measure = measure or pss_of
        self._seen: Mapping[int, int] = {}
        self._at = float("-inf")
        self._starting = 0
        """Workers that were started since what was seen."""
        self._busy = 0
        self._changed = anyio.Event()
        self._measuring = anyio.Lock()

    def __repr__(self) -> str:
        return f"<MemoryBound {self.used} of {self.limit} bytes, {self._busy} at work>"

    @property
    def used(self) -> int:
        """Bytes, by the last measurement."""
        return sum(self._seen.values())

    @property
    def _worker_bytes(self) -> int:
        return max([self._seen[pid] for pid in self._pids()[2:] if pid in self._seen], default=0)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Do a piece of work: at once if there is room, else when nobody else does any."""
        await self._look()
        while self.used > self.limit and self._busy:
            with anyio.move_on_after(SAMPLE_S):
                await self._changed.wait()
            await self._look()
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self._changed.set()
            self._changed = anyio.Event()

    def may_start(self) -> bool:
        """Whether there is room for one more worker; if so, it is taken."""
        one = self._worker_bytes or WORKER_BYTES
        if self.used + (self._starting + 1) * one > self.limit:
            return False
        self._starting += 1
        return True

    async def check(self) -> None:
        """PlanError: not even one worker and a guardian fit, beside coordinator and fork server."""
        await self._look(now=True)
        own = sum(self._seen.get(pid, 0) for pid in self._pids()[:2])
        need = own + 2 * (self._worker_bytes or WORKER_BYTES)
        if need > self.limit:
            raise PlanError(
                f"--memory-limit {_mebibytes(self.limit)}: this run needs "
                f"{_mebibytes(int(need * _MARGIN))} with a single worker"
            )

    async def _look(self, now: bool = False) -> None:
        async with self._measuring:
            if not now and anyio.current_time() - self._at < SAMPLE_S:
                return
            before = self._starting
            # In a thread: the memory map of a process that hangs may be locked.
            self._seen = await anyio.to_thread.run_sync(
                self._measure, self._pids(), abandon_on_cancel=True
            )
            self._starting -= before
            self._at = anyio.current_time()
            self.peak = max(self.peak, self.used)


def pss_of(pids: Iterable[int]) -> dict[int, int]:
    """PSS of each process that is there, in bytes."""
    import psutil  # only who sets a bound pays for it

    found = {}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            try:
                found[pid] = int(process.memory_full_info().pss)
            except psutil.AccessDenied:
                # Of a worker, to whom is not root: what it has alone is all that is told.
                told = process.memory_info()
                found[pid] = int(told.rss - told.shared)
        except psutil.Error:
            continue  # it has ended
    return found


def _mebibytes(size: int) -> str:
    return f"{-(-size >> 20)}M"
