"""The bound of memory: who waits, who goes on, and that somebody always does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import anyio
import anyio.lowlevel
import pytest

from ghostpool import _memory
from ghostpool._errors import PlanError
from ghostpool._memory import WORKER_BYTES, MemoryBound

pytestmark = pytest.mark.anyio

LIMIT = 100 << 20
MIB = 1 << 20
COORDINATOR, SERVER, WORKER = 1, 2, 3


class Machine:
    """What the processes take, as the test says."""

    def __init__(self, **sizes: int) -> None:
        self.sizes: dict[int, int] = {COORDINATOR: 40 * MIB, SERVER: 8 * MIB}
        self.measured = 0

    def pids(self) -> list[int]:
        return list(self.sizes)

    def measure(self, pids: Iterable[int]) -> Mapping[int, int]:
        self.measured += 1
        return {pid: self.sizes[pid] for pid in pids}

    def bound(self) -> MemoryBound:
        return MemoryBound(LIMIT, self.pids, self.measure)


class Work:
    """Counts who is at work."""

    def __init__(self, bound: MemoryBound) -> None:
        self.bound = bound
        self.now = self.most = self.done = 0
        self._begun = anyio.Event()

    async def until(self, count: int) -> None:
        """Wait until so many are at work."""
        while self.now < count:
            await self._begun.wait()

    async def one(self, go: anyio.Event | None = None) -> None:
        async with self.bound.turn():
            self.now += 1
            self.most = max(self.most, self.now)
            self._begun.set()
            self._begun = anyio.Event()
            await (go.wait() if go is not None else anyio.lowlevel.checkpoint())
            self.now -= 1
            self.done += 1


@pytest.fixture(autouse=True)
def _measure_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "SAMPLE_S", 0.005)


async def test_under_the_bound_nobody_waits() -> None:
    work = Work(Machine().bound())
    go = anyio.Event()
    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(work.one, go)
        await work.until(10)
        go.set()
    assert work.done == 10


async def test_over_the_bound_one_goes_on_after_the_other() -> None:
    """Never two at a time, and all of them in the end, though it stays over."""
    machine = Machine()
    machine.sizes[WORKER] = LIMIT
    work = Work(machine.bound())
    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(work.one)
    assert (work.done, work.most) == (10, 1)


async def test_who_waits_goes_on_when_there_is_room() -> None:
    machine = Machine()
    machine.sizes[WORKER] = LIMIT
    work = Work(machine.bound())
    go = anyio.Event()
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(work.one, go)
        await anyio.sleep(0.05)
        assert work.now == 1
        machine.sizes[WORKER] = MIB
        await work.until(4)
        go.set()
    assert work.done == 4
    assert work.bound.peak == 148 * MIB


async def test_cancelled_waiter_leaves_nothing() -> None:
    machine = Machine()
    machine.sizes[WORKER] = LIMIT
    work = Work(machine.bound())
    go = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(work.one, go)
        await work.until(1)
        with anyio.move_on_after(0.03):
            await work.one()
        assert work.done == 0
        go.set()
    await work.one()
    assert work.done == 2


async def test_measured_now_and_then_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "SAMPLE_S", 30.0)
    machine = Machine()
    work = Work(machine.bound())
    for _ in range(100):
        await work.one()
    assert machine.measured == 1


async def test_workers_start_while_there_is_room() -> None:
    """Those that were started since the last measurement count, too."""
    machine = Machine()
    bound = machine.bound()
    await bound.check()
    room = LIMIT - 48 * MIB
    assert [bound.may_start() for _ in range(20)].count(True) == room // WORKER_BYTES
    machine.sizes[WORKER] = 20 * MIB
    await bound.check()
    # 32 MiB are left, and a worker is known to take 20.
    assert [bound.may_start() for _ in range(5)] == [True] + 4 * [False]


async def test_too_small_a_bound_is_refused_with_what_is_needed() -> None:
    machine = Machine()
    machine.sizes[WORKER] = 27 * MIB
    with pytest.raises(PlanError, match=r"--memory-limit 100M: this run needs 113M with a single"):
        await machine.bound().check()
    machine.sizes[WORKER] = 26 * MIB
    await machine.bound().check()
