"""Leases and barrier under every interleaving, not under some.

Tasks stop at gates. A run lets one of them through at a time, waits until nothing moves any
more, and notes which choices there were; every alternative not taken becomes a run of its own,
until none is left. A choice may also be a fault: the step fails, the kernel refuses it, its
worker dies, the task is cancelled. Where schedules are too many, those that have led to the
same state share their continuations: each choice in each state is still made once.
"""

from __future__ import annotations

import asyncio
import errno
import random
import sys
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Container,
    Hashable,
    Iterable,
    MutableSequence,
    Sequence,
)
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import NamedTuple

import anyio
import pytest
import sniffio
import trio.testing

from ghostpool._barrier import TaskBarrier
from ghostpool._errors import BarrierBroken, KernelError, WorkerDied
from ghostpool._lease import Acquired, LeaseState, LeaseTable, MountLeases
from ghostpool.testing import Call, FakeKernel, Stage


async def settle() -> None:
    """Return when every other task of the event loop waits for something."""
    if sniffio.current_async_library() == "trio":
        await trio.testing.wait_all_tasks_blocked()
        return
    ready = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]
    while ready:  # noqa: ASYNC110  # there is no event for "nothing moves"
        await asyncio.sleep(0)


CALLER: ContextVar[str] = ContextVar("CALLER")
"""Which task of the scenario runs: a kernel call parks as the task that makes it."""


class Choice(NamedTuple):
    action: str
    task: str
    step: str


class StepFailed(Exception):
    """What a step raises when a schedule makes it fail."""


State = Hashable
"""All that the rest of a run can depend on."""


class Run:
    """One schedule: the choices of `prefix`, then the first one possible each time."""

    def __init__(
        self, prefix: Sequence[int], faults: int, known: Container[State] | None = None
    ) -> None:
        self.trail: list[tuple[State, int, int]] = []
        """State, number of the choice made in it, how many there were."""
        self.end: State = None
        """The state of `known` after which the gates were left open."""
        self.choices: list[Choice] = []
        self.faults: list[Choice] = []
        self.scopes: dict[str, anyio.CancelScope] = {}
        self.outcome: dict[str, BaseException | None] = {}
        self._prefix = prefix
        self._known = known
        self._faults_left = faults
        self._parked: dict[str, tuple[str, tuple[str, ...], anyio.Event]] = {}
        self._verdict: dict[str, str] = {}
        self._failing: dict[str, str] = {}

    async def gate(self, task: str, step: str, *faults: str) -> str:
        """Wait for the turn of `task`; "go" or one of `faults`, which the caller brings about."""
        if self.end is not None:
            return "go"
        event = anyio.Event()
        self._failing[task] = type(sys.exc_info()[1]).__name__
        self._parked[task] = (step, faults, event)
        try:
            await event.wait()
        finally:
            self._parked.pop(task, None)
        return self._verdict.pop(task)

    async def task(self, name: str, body: Callable[[str], Awaitable[None]]) -> None:
        error: BaseException | None = None
        CALLER.set(name)
        with self.scopes[name]:
            try:
                await body(name)
            except BaseException as caught:
                error = caught
                if not isinstance(caught, Exception):
                    raise
            finally:
                self.outcome[name] = error

    def _options(self) -> list[Choice]:
        options = [Choice("go", task, step) for task, (step, _, _) in sorted(self._parked.items())]
        if not self._faults_left:
            return options
        for task, (step, faults, _) in sorted(self._parked.items()):
            options += [Choice(fault, task, step) for fault in faults]
        for task, scope in sorted(self.scopes.items()):
            if task not in self.outcome and not scope.cancel_called:
                step = self._parked[task][0] if task in self._parked else "wait"
                options.append(Choice("cancel", task, step))
        return options

    def _state(self) -> State:
        tasks = []
        for task, scope in sorted(self.scopes.items()):
            if task in self.outcome:
                tasks.append((task, "ended", type(self.outcome[task]).__name__, False))
            else:
                step = self._parked[task][0] if task in self._parked else "wait"
                tasks.append((task, step, self._failing.get(task, ""), scope.cancel_called))
        return tuple(tasks), self._faults_left, tuple(fault.action for fault in self.faults)

    async def drive(self, check: Callable[[], None], more: Callable[[], State]) -> None:
        """Make choices until all tasks have ended.

        `check` asserts what must hold after each one; `more` is what else there is to the state.
        """
        while True:
            await settle()
            check()
            if len(self.outcome) == len(self.scopes):
                return
            hanging = set(self.scopes) - set(self.outcome)
            assert self._parked, f"{hanging} hang"
            options = self._options()
            depth = len(self.trail)
            state: State = (self._state(), more()) if self._known is not None else None
            if depth < len(self._prefix):
                index = self._prefix[depth]
            elif self._known is not None and state in self._known:
                self.leave_gates_open(state)
                continue
            else:
                index = 0
            self.trail.append((state, index, len(options)))
            choice = options[index]
            self.choices.append(choice)
            if choice.action != "go":
                self._faults_left -= 1
                self.faults.append(choice)
            if choice.action == "cancel":
                self.scopes[choice.task].cancel()
            else:
                self._verdict[choice.task] = choice.action
                self._parked.pop(choice.task)[2].set()

    def leave_gates_open(self, state: State) -> None:
        """Let all tasks run to their ends."""
        self.end = state
        for task, (_, _, event) in self._parked.items():
            self._verdict[task] = "go"
            event.set()


class Explored(NamedTuple):
    runs: int
    schedules: int
    """Different sequences of choices that the runs stand for."""


async def explore(
    scenario: Callable[[Run], Awaitable[None]], *, faults: int, merge: bool
) -> Explored:
    """Run `scenario` under every schedule with at most `faults` faults.

    With `merge`, choices are made in each state only by the first run that got there.
    """
    untried: list[tuple[int, ...]] = [()]
    graph: dict[State, dict[int, State]] = {}
    runs = 0
    root: State = None
    while untried:
        prefix = untried.pop()
        run = Run(prefix, faults, graph if merge else None)
        try:
            await scenario(run)
        except BaseException as error:
            error.add_note(f"schedule: {[' '.join(choice) for choice in run.choices]}")
            raise
        runs += 1
        path = tuple(index for _, index, _ in run.trail)
        for depth in range(len(prefix), len(path)):
            untried += [(*path[:depth], other) for other in range(1, run.trail[depth][2])]
        if merge:
            root = run.trail[0][0]
            following = [state for state, _, _ in run.trail[1:]] + [run.end]
            for (state, index, _), after in zip(run.trail, following, strict=True):
                target = graph.setdefault(state, {}).setdefault(index, after)
                assert target == after, "the state does not tell what happens next"
    if not merge:
        return Explored(runs, runs)
    paths: dict[State, int] = {None: 1}

    def count(state: State) -> int:
        if state not in paths:
            paths[state] = sum(count(target) for target in graph[state].values())
        return paths[state]

    return Explored(runs, count(root))


class NotedTable(LeaseTable[str]):
    """Keeps what each task was told: what it waits for is part of the state."""

    def __init__(self, *, reopen: bool) -> None:
        super().__init__(lambda: 0.0, reopen=reopen)
        self.told: dict[str, tuple[Acquired[str], ...]] = {}

    def acquire(self, mounts: Iterable[str]) -> Acquired[str]:
        step = super().acquire(mounts)
        self.told[CALLER.get()] = (*self.told.get(CALLER.get(), ()), step)
        return step


class Restore:
    """Tasks that lease mounts, open their files, meet at the barrier and let go."""

    def __init__(
        self, run: Run, tasks: dict[str, str], *, kernel_steps: bool = False, barrier: bool = True
    ) -> None:
        self.run = run
        self.tasks = tasks
        self.kernel = FakeKernel(
            sorted(set("".join(tasks.values()))), self._step_kernel if kernel_steps else None
        )
        self.table = NotedTable(reopen=not barrier)
        self.leases = MountLeases(self.kernel)
        self.leases._table = self.table
        self.barrier = TaskBarrier(tasks) if barrier else None
        self.opening: set[str] = set()
        self.holding: set[str] = set()
        self.opened: set[str] = set()

    async def __call__(self) -> None:
        async with anyio.create_task_group() as group:
            for name in self.tasks:
                self.run.scopes[name] = anyio.CancelScope()
                group.start_soon(self.run.task, name, self._task)
            try:
                await self.run.drive(self.check, self.state)
            except BaseException:
                self.run.leave_gates_open("failed")  # some wait behind a shield
                raise
        self.check_end()

    async def _task(self, name: str) -> None:
        async with self._party(name):
            if await self.run.gate(name, "acquire", "fail") == "fail":
                await self._refuse(name)
            async with self.leases.hold(self.tasks[name]):
                self.holding.add(name)
                self.opening.add(name)
                self.check()
                try:
                    await self._open_and_arrive(name)
                finally:
                    self.opening.discard(name)
                    with anyio.CancelScope(shield=True):
                        verdict = await self.run.gate(name, "release", "fail")
                    self.holding.discard(name)
                    if verdict == "fail":
                        raise StepFailed(name)

    async def _refuse(self, name: str) -> None:
        """Let the kernel refuse a mount of `name`, or the step fail where none is to be changed."""
        for mount in self.tasks[name]:
            if self.kernel.flags[mount] and not self.table.count(mount):
                self.kernel.fail("make_writable", mount, errno.EPERM)
                return
        raise StepFailed(name)

    async def _open_and_arrive(self, name: str) -> None:
        if await self.run.gate(name, "open", "fail") == "fail":
            raise StepFailed(name)
        for mount in self.tasks[name]:
            assert self.kernel.is_writable(mount), "opened through a read-only mount"
            if self.barrier is not None:
                assert ("ro", mount) not in self.kernel.log, "opened after the revert"
        self.opened.add(name)
        self.opening.discard(name)
        if self.barrier is None:
            return
        if await self.run.gate(name, "arrive", "fail") == "fail":
            raise StepFailed(name)
        await self.barrier.arrive(name)
        assert self.opened == set(self.tasks), "passed the barrier before the last task was ready"

    @asynccontextmanager
    async def _party(self, name: str) -> AsyncIterator[None]:
        if self.barrier is None:
            yield
        else:
            async with self.barrier.party(name):
                yield

    async def _step_kernel(self, call: Call, stage: Stage, mounts: Sequence[str]) -> None:
        step = f"{call} {stage} {' '.join(mounts)}"
        if await self.run.gate(CALLER.get(), step, "die") == "die":
            raise WorkerDied(step)

    def check(self) -> None:
        """What holds at any moment."""
        for name in self.holding:
            for mount in self.tasks[name]:
                assert self.kernel.is_writable(mount), f"{name} holds {mount}"
        assert self.opening <= self.holding
        reverted = any(change == "ro" for change, _ in self.kernel.log)
        if self.barrier is not None and reverted:
            assert self.barrier.passed or self.run.faults, "reverted before the last arrival"
        for mount in self.kernel.flags:
            changes = [change for change, of in self.kernel.log if of == mount]
            expected = ["rw", "ro"] * len(changes)
            assert changes == expected[: len(changes)], f"changes of {mount}: {changes}"
            if self.barrier is not None:
                assert len(changes) <= 2, f"changes of {mount}: {changes}"

    def state(self) -> State:
        settled = self.holding | set(self.run.outcome)
        return (
            tuple(
                (mount, entry.state, entry.count, entry.owed, entry.was_closing, repr(entry.error))
                for mount, entry in sorted(self.table._entries.items())
            ),
            tuple((task, self.table.told.get(task)) for task in self.tasks if task not in settled),
            frozenset(self.kernel.changed if self.barrier is None else self.kernel.log),
            frozenset(self.opened),
            None if self.barrier is None else (repr(self.barrier), self.barrier.missing),
        )

    def check_end(self) -> None:
        """What holds when all tasks have ended."""
        self.check()
        numbers = self.leases.statistics()
        assert numbers.leases == 0, (numbers, self.run.outcome)
        assert self.kernel.changed <= set(self.leases.revert_errors)
        if not any("make_read_only" in fault.step for fault in self.run.faults):
            assert not self.kernel.changed
            assert numbers.owed == 0
            idle = {LeaseState.READ_ONLY, LeaseState.FAILED}
            assert set(numbers.states) <= idle, numbers
        if not self.run.faults:
            assert not any(self.run.outcome.values())
            if self.barrier is not None:
                for mount, use in self.leases.usage().items():
                    users = [name for name, mounts in self.tasks.items() if mount in mounts]
                    assert (use.leases, use.made_writable, use.reverted) == (len(users), 1, True)
        elif self.barrier is not None and not self.barrier.passed:
            assert all(self.run.outcome.values()), "a task went past a broken barrier"
        allowed = (StepFailed, BarrierBroken, KernelError, WorkerDied)
        for error in self.run.outcome.values():
            if isinstance(error, Exception):
                leaves = [error] if not isinstance(error, ExceptionGroup) else error.exceptions
                assert all(isinstance(leaf, allowed) for leaf in leaves), repr(error)


THREE_TASKS = {"x": "a", "y": "ab", "z": "b"}
TWO_TASKS = {"x": "a", "y": "a"}


@pytest.fixture(autouse=True)
def repeatable_scheduling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule is replayed by its choices, so trio must not shuffle what runs between them."""

    class InOrder(random.Random):
        def shuffle(self, x: MutableSequence[object]) -> None:
            del x

    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr(trio._core._run, "_r", InOrder())


async def explore_restore(
    tasks: dict[str, str],
    *,
    faults: int,
    merge: bool = True,
    kernel_steps: bool = True,
    barrier: bool = True,
) -> Explored:
    async def scenario(run: Run) -> None:
        await Restore(run, tasks, kernel_steps=kernel_steps, barrier=barrier)()

    return await explore(scenario, faults=faults, merge=merge)


@pytest.mark.long
@pytest.mark.trio
async def test_every_interleaving_of_three_tasks_and_two_mounts() -> None:
    """All 9!/(3!3!3!) orders of acquire, open and arrive, times all orders of release."""
    explored = await explore_restore(THREE_TASKS, faults=0, merge=False, kernel_steps=False)
    assert explored == (1680 * 6, 1680 * 6)


@pytest.mark.trio
async def test_any_task_fails_or_is_cancelled_at_any_step() -> None:
    """The same with one step failing, refused by the kernel, or one task cancelled anywhere."""
    explored = await explore_restore(THREE_TASKS, faults=1, kernel_steps=False)
    assert explored.schedules == 318_891


@pytest.mark.trio
async def test_merging_accounts_for_every_schedule() -> None:
    """Two tasks on one mount, kernel calls in steps, any one fault: one by one, then merged."""
    one_by_one = await explore_restore(TWO_TASKS, faults=1, merge=False)
    merged = await explore_restore(TWO_TASKS, faults=1)
    assert one_by_one == (1658, 1658)
    assert merged.runs < merged.schedules == one_by_one.schedules


@pytest.mark.anyio
async def test_second_fault_during_the_cleanup_of_the_first() -> None:
    explored = await explore_restore(TWO_TASKS, faults=2)
    assert explored.schedules == 12_536


@pytest.mark.anyio
async def test_three_tasks_and_two_mounts_with_kernel_calls_in_steps() -> None:
    explored = await explore_restore(THREE_TASKS, faults=0)
    assert explored.schedules == 1_525_944


@pytest.mark.anyio
async def test_mounts_are_opened_again_without_a_barrier() -> None:
    """Tasks that come and go at will: changes alternate, and a held mount is writable."""
    assert (await explore_restore(TWO_TASKS, faults=1, barrier=False)).schedules == 826
    assert (await explore_restore(THREE_TASKS, faults=0, barrier=False)).schedules == 510_828


@pytest.mark.long
@pytest.mark.anyio
async def test_everything_in_steps_and_any_fault(anyio_backend_name: str) -> None:
    explored = await explore_restore(THREE_TASKS, faults=1)
    assert explored.schedules == 67_482_191
    explored = await explore_restore(THREE_TASKS, faults=1, barrier=False)
    # Under asyncio a change of mounts has a task of its own, which may end a step apart from the
    # one that waits for it.
    expected = {"trio": 17_551_909, "asyncio": 17_570_940}
    assert explored.schedules == expected[anyio_backend_name]
