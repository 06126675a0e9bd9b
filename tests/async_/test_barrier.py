"""The task barrier, on both event loops."""

from __future__ import annotations

from itertools import permutations

import anyio
import anyio.lowlevel
import pytest

from ghostpool._barrier import TaskBarrier
from ghostpool._errors import BarrierBroken

pytestmark = pytest.mark.anyio


class Failed(Exception):
    pass


async def expect_broken(barrier: TaskBarrier, party: str, cause: BaseException) -> None:
    with pytest.raises(BarrierBroken, match="did not reach the barrier") as caught:
        await barrier.arrive(party)
    assert caught.value.__cause__ is cause


async def test_nobody_passes_before_the_last_arrival() -> None:
    for order in permutations("xyz"):
        barrier = TaskBarrier("xyz")
        through: list[str] = []

        async def arrive(
            party: str, barrier: TaskBarrier = barrier, through: list[str] = through
        ) -> None:
            await barrier.arrive(party)
            through.append(party)

        async with anyio.create_task_group() as group:
            for number, party in enumerate(order):
                assert not through
                assert not barrier.passed
                assert barrier.waiting == tuple(sorted(order[:number]))
                assert barrier.missing == tuple(sorted(order[number:]))
                group.start_soon(arrive, party)
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
        assert sorted(through) == ["x", "y", "z"]
        assert barrier.passed
        assert barrier.waiting == barrier.missing == ()


async def test_single_party_does_not_wait() -> None:
    barrier = TaskBarrier(["x"])
    await barrier.arrive("x")
    assert barrier.passed


async def test_without_parties_it_is_passed() -> None:
    assert TaskBarrier([]).passed


async def test_who_waits_learns_that_it_broke() -> None:
    barrier = TaskBarrier("xyz")
    cause = Failed()
    async with anyio.create_task_group() as group:
        group.start_soon(expect_broken, barrier, "x", cause)
        group.start_soon(expect_broken, barrier, "z", cause)
        await anyio.wait_all_tasks_blocked()
        barrier.break_(cause)
    assert barrier.broken
    assert not barrier.passed
    assert barrier.missing == ("y",)
    assert barrier.waiting == ()


async def test_who_comes_later_learns_it_too_and_the_first_cause_stays() -> None:
    barrier = TaskBarrier("xy")
    cause = Failed()
    barrier.break_(cause)
    barrier.break_(ZeroDivisionError())
    await expect_broken(barrier, "x", cause)
    await expect_broken(barrier, "x", cause)
    assert barrier.cause is cause


async def test_message_names_who_is_missing_and_why() -> None:
    barrier = TaskBarrier([17, 23])
    barrier.break_(Failed("no space"))
    with pytest.raises(BarrierBroken, match=r"\(missing: 17, 23\): Failed\('no space'\)"):
        await barrier.arrive(23)


async def test_passed_stays_passed() -> None:
    barrier = TaskBarrier("x")
    await barrier.arrive("x")
    barrier.break_(Failed())
    barrier.check()
    assert barrier.passed
    assert not barrier.broken


async def test_misuse() -> None:
    with pytest.raises(ValueError, match="named twice"):
        TaskBarrier("xyx")
    barrier = TaskBarrier("xy")
    with pytest.raises(RuntimeError, match="'z' is no party"):
        await barrier.arrive("z")
    with pytest.raises(RuntimeError, match="'z' is no party"):
        async with barrier.party("z"):
            pytest.fail("a stranger came in")
    async with anyio.create_task_group() as group:
        group.start_soon(barrier.arrive, "x")
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="'x' arrives twice"):
            await barrier.arrive("x")
        assert not barrier.broken
        await barrier.arrive("y")
    with pytest.raises(RuntimeError, match="'x' arrives twice"):
        await barrier.arrive("x")


async def test_cancelling_one_who_waits_breaks_it_for_the_others() -> None:
    barrier = TaskBarrier("xyz")
    scope = anyio.CancelScope()
    broken: list[BarrierBroken] = []

    async def cancelled() -> None:
        with scope:
            await barrier.arrive("x")

    async def other() -> None:
        with pytest.raises(BarrierBroken, match="missing: z") as caught:
            await barrier.arrive("y")
        broken.append(caught.value)

    async with anyio.create_task_group() as group:
        group.start_soon(cancelled)
        group.start_soon(other)
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
    assert scope.cancelled_caught
    assert isinstance(broken[0].__cause__, anyio.get_cancelled_exc_class())


async def test_cancelled_last_task_does_not_let_the_others_pass() -> None:
    barrier = TaskBarrier("x")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await barrier.arrive("x")
    assert scope.cancelled_caught
    assert barrier.broken
    assert not barrier.passed


async def test_cancellation_after_the_last_arrival_breaks_nothing() -> None:
    """Between the last arrival and the moment when the waiting task runs again."""
    barrier = TaskBarrier("xy")
    scope = anyio.CancelScope()

    async def waits() -> None:
        with scope:
            await barrier.arrive("x")

    async with anyio.create_task_group() as group:
        group.start_soon(waits)
        await anyio.wait_all_tasks_blocked()
        barrier._arrived.add("y")
        barrier._over.set()
        scope.cancel()
    assert barrier.passed
    assert not barrier.broken


async def test_leaving_the_block_is_arriving() -> None:
    barrier = TaskBarrier("xy")
    log: list[str] = []

    async def task(party: str) -> None:
        async with barrier.party(party):
            log.append(f"{party} ready")
        log.append(f"{party} through")

    async with anyio.create_task_group() as group:
        group.start_soon(task, "x")
        await anyio.wait_all_tasks_blocked()
        assert log == ["x ready"]
        group.start_soon(task, "y")
    assert log[:2] == ["x ready", "y ready"]
    assert barrier.passed


async def test_arriving_inside_the_block_is_not_repeated_at_its_end() -> None:
    barrier = TaskBarrier("x")
    async with barrier.party("x"):
        await barrier.arrive("x")
        assert barrier.passed


async def test_block_that_swallows_the_break_does_not_pass() -> None:
    barrier = TaskBarrier("xy")

    async def swallows() -> None:
        async with barrier.party("x"):
            with pytest.raises(BarrierBroken, match="Failed"):
                await barrier.arrive("x")

    async def does_not_pass() -> None:
        with pytest.raises(BarrierBroken, match="Failed"):
            await swallows()

    async with anyio.create_task_group() as group:
        group.start_soon(does_not_pass)
        await anyio.wait_all_tasks_blocked()
        barrier.break_(Failed())


async def test_failing_in_the_block_breaks_the_barrier() -> None:
    barrier = TaskBarrier("xy")
    cause = Failed()
    with pytest.raises(Failed):
        async with barrier.party("x"):
            raise cause
    await expect_broken(barrier, "y", cause)


async def test_cancellation_in_the_block_breaks_the_barrier() -> None:
    barrier = TaskBarrier("xy")
    with anyio.move_on_after(0):
        async with barrier.party("x"):
            await anyio.sleep_forever()
    assert isinstance(barrier.cause, anyio.get_cancelled_exc_class())


async def test_broken_barrier_lets_nobody_start() -> None:
    barrier = TaskBarrier("xy")
    barrier.break_(Failed())
    with pytest.raises(BarrierBroken, match="Failed"):
        async with barrier.party("x"):
            pytest.fail("started in vain")


async def test_repr() -> None:
    barrier = TaskBarrier("xy")
    async with anyio.create_task_group() as group:
        group.start_soon(barrier.arrive, "x")
        await anyio.wait_all_tasks_blocked()
        assert repr(barrier) == "<TaskBarrier open, 1 of 2 arrived, 1 waiting>"
        await barrier.arrive("y")
    assert repr(barrier) == "<TaskBarrier passed, 2 of 2 arrived, 0 waiting>"
    barrier = TaskBarrier("xy")
    barrier.break_(Failed())
    assert repr(barrier) == "<TaskBarrier broken, 0 of 2 arrived, 0 waiting>"
