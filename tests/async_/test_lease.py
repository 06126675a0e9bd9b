"""Mount leases over the fake kernel: each promise of `MountLeases`, on both event loops."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import anyio
import anyio.lowlevel
import pytest

from ghostpool._errors import BarrierBroken, KernelError, RestoreError, WorkerDied
from ghostpool._lease import LeaseState, MountLeases, MountUsage
from ghostpool._linux import Attr
from ghostpool.testing import Call, FakeKernel, Stage

pytestmark = pytest.mark.anyio


class Hang:
    """A hook that stops one stage of one kind of call until it is told to go on.

    For a few seconds only: the call is shielded, so a test that failed would wait for it.
    """

    def __init__(self, call: Call, stage: Stage) -> None:
        self.at = (call, stage)
        self.reached = anyio.Event()
        self.go_on = anyio.Event()

    async def __call__(self, call: Call, stage: Stage, mounts: Sequence[str]) -> None:
        if (call, stage) == self.at:
            self.reached.set()
            with anyio.move_on_after(3):
                await self.go_on.wait()


def dies_at(call: Call, stage: Stage) -> FakeKernel[str]:
    async def hook(now: Call, at: Stage, mounts: Sequence[str]) -> None:
        if (now, at) == (call, stage):
            raise WorkerDied("the worker died")

    return FakeKernel("ab", hook)


async def hold_once(leases: MountLeases[str], mounts: str) -> None:
    async with leases.hold(mounts):
        pass


def assert_idle(leases: MountLeases[str], kernel: FakeKernel[str]) -> None:
    assert leases.statistics().leases == 0
    assert leases.statistics().owed == 0
    assert not kernel.changed


async def test_second_lease_does_not_remount() -> None:
    kernel = FakeKernel("a")
    leases = MountLeases(kernel)
    async with leases.hold("a"):
        async with leases.hold("a"):
            assert kernel.is_writable("a")
        assert kernel.is_writable("a")
    assert kernel.log == [("rw", "a"), ("ro", "a")]
    assert_idle(leases, kernel)


async def test_one_call_serves_all_mounts_of_a_task() -> None:
    kernel = FakeKernel("abc")
    await hold_once(MountLeases(kernel), "abcb")
    assert kernel.calls == [("make_writable", ("a", "b", "c")), ("make_read_only", ("a", "b", "c"))]


async def test_only_the_read_only_bit_changes() -> None:
    flags = Attr.RDONLY | Attr.NOSUID | Attr.NODEV | Attr.NOATIME
    kernel = FakeKernel({"a": flags})
    async with MountLeases(kernel).hold("a"):
        assert kernel.flags["a"] == flags & ~Attr.RDONLY
    assert kernel.flags["a"] == flags


async def test_writable_mount_is_left_alone() -> None:
    kernel = FakeKernel({"a": 0, "b": Attr.RDONLY})
    leases = MountLeases(kernel)
    await hold_once(leases, "ab")
    assert kernel.log == [("rw", "b"), ("ro", "b")]
    assert kernel.calls[-1] == ("make_read_only", ("b",))
    assert leases.usage()["a"] == MountUsage(1, 0, True, 0.0)


async def test_holders_of_an_opening_mount_wait_for_that_change() -> None:
    hang = Hang("make_writable", "end")
    kernel = FakeKernel("a", hang)
    leases = MountLeases(kernel)
    inside: list[bool] = []

    async def task() -> None:
        async with leases.hold("a"):
            inside.append(kernel.is_writable("a"))
            await anyio.wait_all_tasks_blocked()

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(task)
        await hang.reached.wait()
        await anyio.wait_all_tasks_blocked()
        assert repr(leases) == "<MountLeases 1 mounts (1 opening), 8 leases>"
        assert not inside
        hang.go_on.set()
    assert inside == [True] * 8
    assert kernel.log == [("rw", "a"), ("ro", "a")]
    assert leases.usage()["a"].leases == 8


@pytest.mark.parametrize("stage", ["start", "end"])
async def test_change_under_way_outlives_the_cancellation_of_its_holder(stage: Stage) -> None:
    """The body does not run, and what the change did is undone."""
    hang = Hang("make_writable", stage)
    kernel = FakeKernel("a", hang)
    leases = MountLeases(kernel)
    async with anyio.create_task_group() as group:
        group.start_soon(hold_once, leases, "a")
        await hang.reached.wait()
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.wait_all_tasks_blocked()
            assert leases.statistics().states == {LeaseState.OPENING: 1}
            hang.go_on.set()
    assert kernel.log == [("rw", "a"), ("ro", "a")]
    assert_idle(leases, kernel)


async def test_cancelled_task_opens_nothing() -> None:
    kernel = FakeKernel("a")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await hold_once(MountLeases(kernel), "a")
    assert scope.cancelled_caught
    assert not kernel.calls


async def test_cancellation_under_the_shield_keeps_the_body_from_running() -> None:
    kernel = FakeKernel("a")
    scope = anyio.CancelScope()

    async def hook(call: Call, stage: Stage, mounts: Sequence[str]) -> None:
        scope.cancel()

    kernel.hook = hook
    with scope:
        async with MountLeases(kernel).hold("a"):
            pytest.fail("the body ran")
    assert scope.cancelled_caught
    assert kernel.log == [("rw", "a"), ("ro", "a")]


async def test_holder_cancelled_while_it_waits_gives_its_count_back() -> None:
    hang = Hang("make_writable", "start")
    kernel = FakeKernel("a", hang)
    leases = MountLeases(kernel)
    waiter = anyio.CancelScope()

    async def wait() -> None:
        with waiter:
            await hold_once(leases, "a")

    async def hold() -> None:
        async with leases.hold("a"):
            assert leases.statistics().leases == 1

    async with anyio.create_task_group() as group:
        group.start_soon(hold)
        await hang.reached.wait()
        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert leases.statistics().leases == 2
        waiter.cancel()
        await anyio.wait_all_tasks_blocked()
        assert waiter.cancelled_caught
        assert leases.statistics().leases == 1
        hang.go_on.set()
    assert kernel.log == [("rw", "a"), ("ro", "a")]


async def test_one_refused_mount_lets_go_of_the_others() -> None:
    kernel = FakeKernel("abc")
    kernel.fail("make_writable", "b", errno.EPERM)
    kernel.fail("make_writable", "c", errno.EINVAL)
    leases = MountLeases(kernel)
    with pytest.raises(KernelError, match=r"^b.* EPERM"):
        await hold_once(leases, "abc")
    assert kernel.log == [("rw", "a"), ("ro", "a")]
    assert_idle(leases, kernel)


async def test_everybody_who_waited_gets_the_error() -> None:
    hang = Hang("make_writable", "start")
    kernel = FakeKernel("a", hang)
    kernel.fail("make_writable", "a", errno.EPERM)
    leases = MountLeases(kernel)
    errors: list[BaseException] = []

    async def task() -> None:
        with pytest.raises(KernelError, match="EPERM") as caught:
            await hold_once(leases, "a")
        errors.append(caught.value)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(task)
        await hang.reached.wait()
        await anyio.wait_all_tasks_blocked()
        hang.go_on.set()
    assert len(errors) == 3
    assert len(set(map(id, errors))) == 1
    assert kernel.calls == [("make_writable", ("a",))]
    await hold_once(leases, "a")
    assert kernel.log == [("rw", "a"), ("ro", "a")]


async def test_refused_mount_and_failed_revert_are_both_reported() -> None:
    kernel = FakeKernel("ab")
    kernel.fail("make_writable", "b", errno.EPERM)
    kernel.fail("make_read_only", "a", errno.EBUSY)
    leases = MountLeases(kernel)
    with pytest.raises(ExceptionGroup) as caught:
        await hold_once(leases, "ab")
    assert [getattr(error, "errno", 0) for error in caught.value.exceptions] == [
        errno.EPERM,
        errno.EBUSY,
    ]
    assert leases.revert_errors == {"a": caught.value.exceptions[1]}
    assert kernel.changed == {"a"}


@pytest.mark.parametrize("stage", ["start", "end"])
async def test_mounts_of_a_dead_worker_are_put_back_in_case_it_had_changed_them(
    stage: Stage,
) -> None:
    kernel = dies_at("make_writable", stage)
    leases = MountLeases(kernel)
    with pytest.raises(WorkerDied, match="the worker died"):
        await hold_once(leases, "ab")
    assert kernel.calls[-1] == ("make_read_only", ("a", "b"))
    assert_idle(leases, kernel)


async def test_dead_worker_does_not_cost_a_writable_mount_its_writability() -> None:
    kernel = FakeKernel({"a": 0}, dies_at("make_writable", "start").hook)
    leases = MountLeases(kernel)
    with pytest.raises(WorkerDied, match="the worker died"):
        await hold_once(leases, "a")
    assert kernel.is_writable("a")
    assert_idle(leases, kernel)


async def test_others_see_an_interruption_as_an_error_of_their_own_kind() -> None:
    """KeyboardInterrupt in the task that makes the call is not raised a second time elsewhere."""

    class Interrupt(BaseException):
        pass

    hang = Hang("make_writable", "end")

    async def hook(call: Call, stage: Stage, mounts: Sequence[str]) -> None:
        await hang(call, stage, mounts)
        if call == "make_writable" and stage == "end":
            raise Interrupt

    kernel = FakeKernel("a", hook)
    leases = MountLeases(kernel)

    async def interrupted() -> None:
        with pytest.raises(Interrupt):
            await hold_once(leases, "a")

    async def waiting() -> None:
        with pytest.raises(RestoreError, match="was interrupted"):
            await hold_once(leases, "a")

    async with anyio.create_task_group() as group:
        group.start_soon(interrupted)
        await hang.reached.wait()
        group.start_soon(waiting)
        await anyio.wait_all_tasks_blocked()
        hang.go_on.set()
    assert kernel.log == [("rw", "a"), ("ro", "a")]
    assert_idle(leases, kernel)


async def test_kernel_that_does_not_answer_is_given_up() -> None:
    kernel = FakeKernel("a", Hang("make_writable", "end"))
    leases = MountLeases(kernel, revert_s=0.02)
    with pytest.raises(TimeoutError, match=r"make_writable of a: no answer within 0\.02 s"):
        await hold_once(leases, "a")
    assert kernel.log == [("rw", "a"), ("ro", "a")]
    assert_idle(leases, kernel)


async def test_revert_that_hangs_is_loud() -> None:
    kernel = FakeKernel("a", Hang("make_read_only", "start"))
    leases = MountLeases(kernel, revert_s=0.02)
    with pytest.raises(TimeoutError, match="make_read_only of a") as caught:
        await hold_once(leases, "a")
    assert leases.revert_errors == {"a": caught.value}
    assert leases.statistics().owed == 1
    assert not leases.usage()["a"].reverted


async def test_failed_reverts_are_raised_by_the_hold_that_released() -> None:
    kernel = FakeKernel("abc")
    for mount in "ab":
        kernel.fail("make_read_only", mount, errno.EBUSY)
    leases = MountLeases(kernel)
    with pytest.raises(ExceptionGroup) as caught:
        await hold_once(leases, "abc")
    assert tuple(leases.revert_errors.values()) == caught.value.exceptions
    assert kernel.changed == set(leases.revert_errors) == {"a", "b"}


async def test_failed_revert_does_not_hide_the_error_of_the_body() -> None:
    kernel = FakeKernel("a")
    busy = KernelError(errno.EBUSY, "mount_setattr", "/srv")
    kernel.fail("make_read_only", "a", busy)
    body = ZeroDivisionError()
    with pytest.raises(ExceptionGroup) as caught:
        async with MountLeases(kernel).hold("a"):
            raise body
    assert caught.value.exceptions == (body, busy)


async def test_failed_revert_is_not_lost_in_a_cancellation() -> None:
    kernel = FakeKernel("a")
    kernel.fail("make_read_only", "a", errno.EBUSY)
    leases = MountLeases(kernel)

    async def cancelled_inside() -> None:
        async with leases.hold("a"):
            scope.cancel()
            await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        with pytest.raises(KernelError, match="EBUSY") as caught:
            await cancelled_inside()
        assert isinstance(caught.value.__cause__, anyio.get_cancelled_exc_class())
        await anyio.lowlevel.checkpoint()
        pytest.fail("no longer cancelled")
    assert scope.cancelled_caught


async def test_next_hold_makes_up_for_a_failed_revert() -> None:
    kernel = FakeKernel("a")
    kernel.fail("make_read_only", "a", errno.EBUSY)
    leases = MountLeases(kernel)
    with pytest.raises(KernelError, match="EBUSY"):
        await hold_once(leases, "a")
    await hold_once(leases, "a")
    assert kernel.log == [("rw", "a"), ("ro", "a")]
    assert leases.usage()["a"].made_writable == 1
    assert not leases.revert_errors
    assert_idle(leases, kernel)


@pytest.mark.parametrize("stage", ["start", "end"])
async def test_revert_is_shielded(stage: Stage) -> None:
    hang = Hang("make_read_only", stage)
    kernel = FakeKernel("a", hang)
    leases = MountLeases(kernel)
    async with anyio.create_task_group() as group:
        group.start_soon(hold_once, leases, "a")
        await hang.reached.wait()
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.wait_all_tasks_blocked()
            assert leases.statistics().states == {LeaseState.CLOSING: 1}
            hang.go_on.set()
    assert kernel.log == [("rw", "a"), ("ro", "a")]
    assert_idle(leases, kernel)


async def test_mount_being_put_back_is_waited_for_and_opened_again() -> None:
    hang = Hang("make_read_only", "start")
    kernel = FakeKernel("ab", hang)
    leases = MountLeases(kernel)
    async with anyio.create_task_group() as group:
        group.start_soon(hold_once, leases, "a")
        await hang.reached.wait()
        group.start_soon(hold_once, leases, "ab")
        await anyio.wait_all_tasks_blocked()
        assert kernel.log == [("rw", "a"), ("rw", "b")]
        hang.go_on.set()
    changes = [change for change, mount in kernel.log if mount == "a"]
    assert changes == ["rw", "ro", "rw", "ro"]
    assert leases.usage()["a"].made_writable == 2
    assert_idle(leases, kernel)


async def test_waiting_for_a_revert_can_be_cancelled() -> None:
    hang = Hang("make_read_only", "start")
    kernel = FakeKernel("a", hang)
    leases = MountLeases(kernel)
    async with anyio.create_task_group() as group:
        group.start_soon(hold_once, leases, "a")
        await hang.reached.wait()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as inner:
                inner.start_soon(hold_once, leases, "a")
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
        assert leases.statistics().leases == 0
        hang.go_on.set()
    assert kernel.log == [("rw", "a"), ("ro", "a")]


async def test_without_reopening_a_mount_changes_once() -> None:
    kernel = FakeKernel("ab")
    leases = MountLeases(kernel, reopen=False)
    await hold_once(leases, "a")
    with pytest.raises(BarrierBroken, match="mount a was put back"):
        await hold_once(leases, "ba")
    assert kernel.log == [("rw", "a"), ("ro", "a")]
    assert_idle(leases, kernel)


async def test_kernel_that_answers_for_too_few_mounts_is_not_believed() -> None:
    class Short(FakeKernel[str]):
        async def make_writable(self, mounts: Sequence[str], /) -> list[bool | Exception]:
            return (await super().make_writable(mounts))[:1]

    kernel = Short("ab")
    leases = MountLeases(kernel)
    with pytest.raises(RuntimeError, match="1 answers for 2 mounts"):
        await hold_once(leases, "ab")
    assert_idle(leases, kernel)


async def test_unknown_mount_is_the_kernels_to_refuse() -> None:
    with pytest.raises(KernelError, match="EINVAL"):
        await hold_once(MountLeases(FakeKernel("a")), "z")


async def test_holding_nothing_asks_nothing() -> None:
    kernel = FakeKernel("a")
    leases = MountLeases(kernel)
    await hold_once(leases, "")
    assert not kernel.calls
    assert repr(leases) == "<MountLeases 0 mounts (none used), 0 leases>"
