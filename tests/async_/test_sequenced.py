"""Leases and barrier under trio's own tools: a chosen order, and a clock that jumps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from ghostpool._barrier import TaskBarrier
from ghostpool._errors import BarrierBroken
from ghostpool._lease import MountLeases, MountUsage
from ghostpool.testing import Call, FakeKernel, Stage

pytestmark = pytest.mark.trio


async def hold_once(leases: MountLeases[str], mounts: str) -> None:
    async with leases.hold(mounts):
        pass


async def expect_missing(barrier: TaskBarrier, party: str) -> None:
    with pytest.raises(BarrierBroken, match=r"missing: z\): Cancelled"):
        await barrier.arrive(party)


async def test_window_spans_first_request_to_last_revert(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def hook(call: Call, stage: Stage, mounts: Sequence[str]) -> None:
        await trio.sleep(1)

    leases = MountLeases(FakeKernel("a", hook), clock=trio.current_time)
    async with leases.hold("a"):
        await trio.sleep(10)
        assert leases.usage()["a"] == MountUsage(1, 1, False, 12)
    await trio.sleep(100)
    assert leases.usage()["a"] == MountUsage(1, 1, True, 14)
    await hold_once(leases, "a")
    assert leases.usage()["a"] == MountUsage(1, 2, True, 18)


async def test_deadline_is_that_of_one_call(autojump_clock: trio.testing.MockClock) -> None:
    """A slow body, and other calls before it, do not use the deadline up."""

    async def hook(call: Call, stage: Stage, mounts: Sequence[str]) -> None:
        await trio.sleep(4)

    kernel = FakeKernel("a", hook)
    leases = MountLeases(kernel, revert_s=9)
    async with leases.hold("a"):
        await trio.sleep(1000)
    assert kernel.log == [("rw", "a"), ("ro", "a")]
    assert not leases.revert_errors


async def test_deadline_ends_a_call_when_it_says(autojump_clock: trio.testing.MockClock) -> None:
    async def hook(call: Call, stage: Stage, mounts: Sequence[str]) -> None:
        if call == "make_writable":
            await trio.sleep_forever()

    start = trio.current_time()
    with pytest.raises(TimeoutError, match="within 7 s"):
        await hold_once(MountLeases(FakeKernel("a", hook), revert_s=7), "a")
    assert trio.current_time() - start == 7


async def test_eight_tasks_leave_in_another_order_than_they_came() -> None:
    order = trio.testing.Sequencer()
    kernel = FakeKernel("a")
    leases = MountLeases(kernel)

    async def task(number: int) -> None:
        async with order(number):
            holding = leases.hold("a")
            await holding.__aenter__()
        async with order(8 + (number + 5) % 8):
            assert kernel.log == [("rw", "a")]
            await holding.__aexit__(None, None, None)

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(task, number)
    assert kernel.log == [("rw", "a"), ("ro", "a")]
    assert leases.usage()["a"].leases == 8


async def test_entering_is_a_checkpoint_even_where_nothing_is_to_be_done() -> None:
    leases = MountLeases(FakeKernel("a"))
    async with leases.hold("a"):
        with trio.testing.assert_checkpoints():
            await hold_once(leases, "a")


async def test_time_limit_names_who_is_missing(autojump_clock: trio.testing.MockClock) -> None:
    barrier = TaskBarrier("xyz")

    async def late() -> None:
        with trio.move_on_after(60):
            async with barrier.party("z"):
                await trio.sleep(3600)

    with trio.fail_after(61):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(late)
            nursery.start_soon(expect_missing, barrier, "x")
            nursery.start_soon(expect_missing, barrier, "y")
    assert barrier.missing == ("z",)


async def test_arriving_is_a_checkpoint_for_the_last_one_too() -> None:
    barrier = TaskBarrier("x")
    with trio.testing.assert_checkpoints():
        await barrier.arrive("x")
