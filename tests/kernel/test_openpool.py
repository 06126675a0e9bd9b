"""The library in programs of its users: their tasks, on both event loops and uvloop.

What the images describe is made here, so what comes back is known: every descriptor is read
through, and every namespace is compared with what it was.
"""

# ruff: noqa: PT012  what raises at the end of a pool's block is the block

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

import ghostpool
from ghostpool._linux import close_all
from ghostpool._mountkernel import PoolMounts
from tests.support.scene import LOOPS, Scene, look, read, scene

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.anyio]
NAMESPACES = 8
TASKS = 25
"""In each namespace."""


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    chosen: tuple[str, dict[str, Any]] = request.param
    return chosen


def open_numbers() -> set[str]:
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


async def test_a_restore_is_a_block(tmp_path: Path) -> None:
    """200 tasks over 8 namespaces: each takes what is its own, which outlives the block."""
    taken: dict[int, dict[int, int]] = {}
    with scene(tmp_path, NAMESPACES, TASKS) as made:
        before = open_numbers()
        async with ghostpool.restore(made.images, namespaces=made.namespaces, jobs=16) as restored:
            for task in restored.tasks.values():
                taken[task.pid] = await task.take_fds()
            with pytest.raises(RuntimeError, match="taken already"):
                await task.take_fds()
        try:
            assert {pid: read(fds) for pid, fds in taken.items()} == made.contents
            everything = [fd for fds in taken.values() for fd in fds.values()]
            assert len(everything) == len(set(everything)), "a descriptor has two owners"
            assert not any(os.get_inheritable(fd) for fd in everything)
            first = taken[1]
            os.lseek(first[3], 5, os.SEEK_SET)
            assert os.lseek(first[80], 0, os.SEEK_CUR) == 5  # one open file description
            os.lseek(first[4], 7, os.SEEK_SET)
            assert os.lseek(taken[2][90], 0, os.SEEK_CUR) == 7
        finally:
            for fds in taken.values():
                close_all(fds.values())
        assert open_numbers() == before
        assert restored.report.restored
        document = restored.report.document()
        assert {m["made_writable"]["task"] for m in document["mounts"]} == {1}


async def test_tasks_are_brought_up_by_their_program(tmp_path: Path) -> None:
    """200 at once: nobody leaves its block before the last has its files; then all is as before."""
    opened: set[int] = set()
    left: list[int] = []

    async def bring_up(pool: ghostpool.GhostPool, pid: int) -> None:
        async with pool.task(pid) as task:
            fds = await task.open_files()
            assert read(fds) == made.contents[pid]
            assert await task.open_files() == fds
            assert not left
            opened.add(pid)
        assert len(opened) == len(pool.tasks)
        left.append(pid)

    with scene(tmp_path, NAMESPACES, TASKS) as made:
        before = look(made.targets)
        descriptors = open_numbers()
        async with ghostpool.open_pool(made.images, namespaces=made.namespaces, jobs=16) as pool:
            assert made.targets[10].mountinfo() == before[10].mountinfo
            async with anyio.create_task_group() as tg:
                for pid in pool.tasks:
                    tg.start_soon(bring_up, pool, pid)
            report = await pool.finish()
            assert look(made.targets) == before
            assert (
                f"{pool!r}" == "<GhostPool 200 of 200 tasks arrived, 0 mounts writable, 0 leases>"
            )
            with pytest.raises(RuntimeError, match="finished already"):
                await pool.finish()
        assert report.restored
        assert sorted(left) == sorted(pool.tasks)
        assert {usage.made_writable for usage in report.usage.values()} == {1}
        assert open_numbers() == descriptors


async def test_mounts_are_writable_while_tasks_are_in_their_blocks(tmp_path: Path) -> None:
    """And only those of namespaces whose tasks are."""
    with scene(tmp_path, 2, 1) as made:

        def writable() -> list[bool]:
            return [target.is_writable(b"/data") for target in made.targets.values()]

        async with (
            ghostpool.open_pool(made.images, namespaces=made.namespaces) as pool,
            anyio.create_task_group() as tg,
        ):
            assert writable() == [False, False]

            async def second() -> None:
                async with pool.task(2):
                    assert writable() == [True, True]

            async with pool.task(1):
                assert writable() == [True, False]
                tg.start_soon(second)
        assert writable() == [False, False]


async def test_taken_in_the_block(tmp_path: Path) -> None:
    """What a task takes is its own, whatever becomes of the pool."""
    with scene(tmp_path, 1, 1) as made:
        async with ghostpool.open_pool(made.images, namespaces=made.namespaces) as pool:
            async with pool.task(1) as task:
                fds = await task.take_fds()
            with pytest.raises(RuntimeError, match="block of task 1 has been left"):
                await task.open_files()
        assert read(fds) == made.contents[1]
        close_all(fds.values())


async def test_a_shared_file_is_opened_by_whoever_asks_first(tmp_path: Path) -> None:
    """Task 2 has a file of task 1, which opens nothing before task 2 is done."""
    with scene(tmp_path, 2, 1) as made:
        async with ghostpool.open_pool(made.images, namespaces=made.namespaces) as pool:
            done = anyio.Event()

            async def first() -> None:
                async with pool.task(1) as task:
                    await done.wait()
                    assert read(await task.open_files()) == made.contents[1]

            async with anyio.create_task_group() as tg, pool.task(2) as task:
                tg.start_soon(first)
                assert read(await task.open_files()) == made.contents[2]
                done.set()


class Mine(Exception):
    """Raised by a program in its own block."""


@pytest.mark.parametrize("opened", [False, True])
async def test_an_exception_in_a_task_breaks_the_barrier(tmp_path: Path, opened: bool) -> None:
    """For everybody, those who come late too; then everything is undone, and the cause told."""
    outcomes: dict[int, type[Exception]] = {}

    async def bring_up(pool: ghostpool.GhostPool, pid: int) -> None:
        try:
            async with pool.task(pid) as task:
                if pid != 3 or opened:
                    await task.open_files()
                if pid == 3:
                    raise Mine
        except (Mine, ghostpool.BarrierBroken) as error:
            outcomes[pid] = type(error)

    with scene(tmp_path, 2, 2) as made:
        before, descriptors = look(made.targets), open_numbers()
        with pytest.raises(ExceptionGroup) as caught:
            async with ghostpool.open_pool(made.images, namespaces=made.namespaces) as pool:
                async with anyio.create_task_group() as tg:
                    for pid in (1, 2, 3):
                        tg.start_soon(bring_up, pool, pid)
                with pytest.raises(ghostpool.BarrierBroken, match="did not reach"):
                    async with pool.task(4):
                        pytest.fail("a late arrival must not get in")
                with pytest.raises(ghostpool.BarrierBroken, match="did not reach"):
                    await pool.finish()
        assert [type(error) for error in caught.value.exceptions] == [Mine]
        broken = ghostpool.BarrierBroken
        assert outcomes == {1: broken, 2: broken, 3: Mine}
        assert look(made.targets) == before
        assert open_numbers() == descriptors


async def test_an_exception_of_the_program_undoes_everything(tmp_path: Path) -> None:
    with scene(tmp_path, 2, 2) as made:
        before = look(made.targets)
        with pytest.raises(ExceptionGroup) as caught:
            async with ghostpool.open_pool(made.images, namespaces=made.namespaces):
                raise Mine
        assert [type(error) for error in caught.value.exceptions] == [Mine]
        assert look(made.targets) == before


async def test_the_group_of_a_task_group_stays_as_it_is(tmp_path: Path) -> None:
    """The others are cancelled, so there is one error in it."""

    async def bring_up(pool: ghostpool.GhostPool, pid: int) -> None:
        async with pool.task(pid):
            if pid == 2:
                raise Mine

    with scene(tmp_path, 2, 2) as made:
        with pytest.raises(ExceptionGroup) as caught:
            async with (
                ghostpool.open_pool(made.images, namespaces=made.namespaces) as pool,
                anyio.create_task_group() as tg,
            ):
                for pid in pool.tasks:
                    tg.start_soon(bring_up, pool, pid)
        assert [type(error) for error in caught.value.exceptions] == [Mine]


async def test_left_early(tmp_path: Path) -> None:
    """Without an error too: what is not finished is undone, and that is said."""
    with scene(tmp_path, 1, 2) as made:
        before = look(made.targets)
        with pytest.raises(ExceptionGroup) as caught:
            async with ghostpool.open_pool(made.images, namespaces=made.namespaces) as pool:
                with pytest.raises(RuntimeError, match="nobody has brought up the tasks 1, 2"):
                    await pool.finish()
                with pytest.raises(RuntimeError, match="the images have no task 7; theirs: 1, 2"):
                    async with pool.task(7):
                        pytest.fail("there is none")
        assert caught.group_contains(ghostpool.BarrierBroken, match="missing: 1, 2")
        assert look(made.targets) == before


async def test_who_is_in_its_block_when_the_pools_ends_has_no_lease_any_more(
    tmp_path: Path,
) -> None:
    """A task that outlives the pool, which the block structure forbids, keeps nothing writable."""
    with scene(tmp_path, 1, 2) as made:
        before = look(made.targets)
        entered, over = anyio.Event(), anyio.Event()

        async def outlive(pool: ghostpool.GhostPool) -> None:
            with pytest.raises(ghostpool.BarrierBroken, match="did not reach"):
                async with pool.task(1) as task:
                    entered.set()
                    await over.wait()
                    assert look(made.targets) == before
                    await task.open_files()

        async with anyio.create_task_group() as tg:
            with pytest.raises(ExceptionGroup):
                async with ghostpool.open_pool(made.images, namespaces=made.namespaces) as pool:
                    tg.start_soon(outlive, pool)
                    await entered.wait()
                    assert made.targets[10].is_writable(b"/data")
            over.set()


async def test_who_is_about_to_be_leased_when_the_pools_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change is under way: it is waited for, and undone, before the block is left."""
    making = anyio.Event()
    make = PoolMounts._make_writable

    async def making_it(self: PoolMounts, mounts: Any) -> Any:
        making.set()
        await anyio.sleep(0.05)
        return await make(self, mounts)

    monkeypatch.setattr(PoolMounts, "_make_writable", making_it)
    with scene(tmp_path, 1, 2) as made:
        before = look(made.targets)

        async def outlive(pool: ghostpool.GhostPool) -> None:
            with pytest.raises(ghostpool.BarrierBroken, match="did not reach"):
                async with pool.task(1):
                    pytest.fail("it got in")

        async with anyio.create_task_group() as tg:
            with pytest.raises(ExceptionGroup):
                async with ghostpool.open_pool(made.images, namespaces=made.namespaces) as pool:
                    tg.start_soon(outlive, pool)
                    await making.wait()
                    raise Mine
            assert look(made.targets) == before
        assert look(made.targets) == before


async def test_finishing_is_begun_once(tmp_path: Path) -> None:
    """By one; and if it was cancelled, the block undoes everything."""

    async def bring_up(pool: ghostpool.GhostPool, pid: int) -> None:
        async with pool.task(pid):
            await may_leave.wait()

    async def finish(pool: ghostpool.GhostPool) -> None:
        async with anyio.create_task_group() as tg:
            for pid in pool.tasks:
                tg.start_soon(bring_up, pool, pid)
            await anyio.wait_all_tasks_blocked()
            with anyio.CancelScope() as scope:
                tg.start_soon(second, pool, scope)
                await pool.finish()
            may_leave.set()

    async def second(pool: ghostpool.GhostPool, scope: anyio.CancelScope) -> None:
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="begun already"):
            await pool.finish()
        scope.cancel()

    with scene(tmp_path, 1, 2) as made:
        may_leave = anyio.Event()
        before = look(made.targets)
        with pytest.raises(ExceptionGroup) as caught:
            async with ghostpool.open_pool(made.images, namespaces=made.namespaces) as pool:
                await finish(pool)
        assert caught.group_contains(ghostpool.BarrierBroken, match="never finished")
        assert look(made.targets) == before


async def test_nothing_can_be_taken_afterwards(tmp_path: Path) -> None:
    with scene(tmp_path, 1, 1) as made:
        async with ghostpool.restore(made.images, namespaces=made.namespaces) as restored:
            pass
        with pytest.raises(RuntimeError, match="has been left"):
            await restored.tasks[1].take_fds()


@pytest.mark.parametrize(
    ("options", "error"),
    [({"job": 3}, TypeError), ({"keep": True}, TypeError)]
    + [({name: -1}, ValueError) for name in ("jobs", "stall_s", "max_size", "memory_limit")],
)
async def test_arguments_that_make_no_sense(
    options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(iter(options))):
        async with ghostpool.open_pool("nowhere", **options):
            pytest.fail("it was accepted")


async def test_serving_beside_tasks_of_the_program(tmp_path: Path) -> None:
    """What is brought up here is not served; serving ends when all have arrived."""
    answers: list[dict[str, Any]] = []

    async def ask(path: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.setblocking(False)
            connection.connect(path)
            connection.send(b'{"type": "hello", "version": 1, "task": 1}')
            await anyio.wait_readable(connection)
            answers.append(json.loads(connection.recv(4096)))

    with scene(tmp_path / "images", 1, 2) as made:
        path = str(tmp_path / "socket")
        async with ghostpool.open_pool(made.images, namespaces=made.namespaces) as pool:
            async with anyio.create_task_group() as tg:
                await tg.start(partial(pool.serve, path))
                async with anyio.create_task_group() as both:
                    for pid in pool.tasks:
                        both.start_soon(bring_up_when_asked, pool, pid, partial(ask, path))
            report = await pool.finish()
        assert report.restored
        assert {answer["type"] for answer in answers} == {"abort"}
        assert all(answer["refused"] for answer in answers)


async def bring_up_when_asked(
    pool: ghostpool.GhostPool, pid: int, ask: Callable[[], Awaitable[None]]
) -> None:
    async with pool.task(pid):
        if pid == 1:
            await ask()


async def test_serving_that_is_cancelled_breaks_the_barrier(tmp_path: Path) -> None:
    """Its tasks can not arrive any more."""
    with scene(tmp_path / "images", 1, 2) as made, pytest.raises(ExceptionGroup):
        async with (
            ghostpool.open_pool(made.images, namespaces=made.namespaces) as pool,
            anyio.create_task_group() as tg,
        ):
            tg.start_soon(bring_up_broken, pool, 1)
            await anyio.wait_all_tasks_blocked()
            with anyio.move_on_after(0.01):
                await pool.serve(str(tmp_path / "socket"), tasks=[2])


async def bring_up_broken(pool: ghostpool.GhostPool, pid: int) -> None:
    with pytest.raises(ghostpool.BarrierBroken, match="did not reach"):
        async with pool.task(pid):
            pass


class CancelAt:
    """Cancels a scope when a kind of event happens, inside whatever sends it."""

    def __init__(self, kind: type[ghostpool.Event], scope: anyio.CancelScope) -> None:
        self._kind = kind
        self._scope = scope
        self.happened = False

    def send_nowait(self, event: ghostpool.Event) -> None:
        if isinstance(event, self._kind):
            self.happened = True
            self._scope.cancel()


@pytest.mark.parametrize(
    "kind",
    [
        ghostpool.Planned,
        ghostpool.Entered,
        ghostpool.GhostCreated,
        ghostpool.MountWritable,
        ghostpool.FileOpened,
        ghostpool.TaskArrived,
        ghostpool.Reverted,
        ghostpool.Cleaned,
    ],
)
@pytest.mark.parametrize("own_tasks", [False, True])
async def test_cancelled_anywhere(
    tmp_path: Path, kind: type[ghostpool.Event], own_tasks: bool
) -> None:
    """The caller's scope ends it, with everything as before and nothing left open."""

    async def bring_up(pool: ghostpool.GhostPool, pid: int) -> None:
        async with pool.task(pid) as task:
            await task.open_files()

    with scene(tmp_path, 2, 2) as made:
        before, descriptors = look(made.targets), open_numbers()
        with anyio.CancelScope() as scope:
            sink = CancelAt(kind, scope)
            if own_tasks:
                async with ghostpool.open_pool(
                    made.images, namespaces=made.namespaces, events=sink
                ) as pool:
                    async with anyio.create_task_group() as tg:
                        for pid in pool.tasks:
                            tg.start_soon(bring_up, pool, pid)
                    await pool.finish()
            else:
                async with ghostpool.restore(made.images, namespaces=made.namespaces, events=sink):
                    await checkpoint()
                    pytest.fail("it went on")
        assert sink.happened
        assert scope.cancelled_caught or kind is ghostpool.Cleaned
        assert look(made.targets) == before
        assert open_numbers() == descriptors


async def test_several_restores_in_one_program(tmp_path: Path) -> None:
    """At once, each in namespaces of its own; the process's limits are as before at the end."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with scene(tmp_path / "one", 2, 3) as one, scene(tmp_path / "two", 2, 3) as two:

        async def once(made: Scene) -> None:
            async with ghostpool.restore(made.images, namespaces=made.namespaces) as restored:
                await checkpoint()
                assert restored.report.restored

        async with anyio.create_task_group() as tg:
            tg.start_soon(once, one)
            tg.start_soon(once, two)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


async def test_a_refusal_is_a_plan_error_in_a_group(tmp_path: Path) -> None:
    with scene(tmp_path, 1, 1) as made:
        with pytest.raises(ExceptionGroup) as caught:
            async with ghostpool.open_pool(made.images, namespaces={10: os.getpid()}):
                pytest.fail("the host's own mounts are never remounted")
        assert caught.group_contains(ghostpool.PlanError)


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("anyio_backend", LOOPS[1:])
async def test_cancelled_by_asyncio_itself(tmp_path: Path, times: int) -> None:
    """Task.cancel() knows no scopes, and may come again while everything is undone."""
    with scene(tmp_path, 2, 4) as made:
        before, descriptors = look(made.targets), open_numbers()

        async def hold() -> None:
            async with (
                ghostpool.open_pool(made.images, namespaces=made.namespaces) as pool,
                asyncio.TaskGroup() as group,
            ):
                for pid in pool.tasks:
                    group.create_task(enter(pool, pid))

        async def enter(pool: ghostpool.GhostPool, pid: int) -> None:
            async with pool.task(pid) as task:
                await task.open_files()
                entered.append(pid)
                if len(entered) == 8:
                    all_in.set()
                await asyncio.sleep(60)

        entered: list[int] = []
        all_in = asyncio.Event()
        running = asyncio.create_task(hold())
        await all_in.wait()
        assert made.targets[10].is_writable(b"/data")
        for _ in range(times):
            running.cancel()
            await asyncio.sleep(0.002)
        with pytest.raises(asyncio.CancelledError):
            await running
        assert look(made.targets) == before
        assert open_numbers() == descriptors
