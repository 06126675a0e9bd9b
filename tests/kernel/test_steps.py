"""A restore that is cancelled, loses its worker, or gets an error at any of its steps.

The steps are the calls to workers, numbered as they come, so that a new one can not be forgotten.
Library level, on both event loops; the kernel is real, and so are the workers.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

from ghostpool import _deliver, _run
from ghostpool._errors import RestoreError, leaves
from ghostpool._launch import launch
from ghostpool._model import NsId
from ghostpool._planned import Policy
from ghostpool._pool import WorkerPool
from ghostpool._protocol import Failure
from ghostpool._report import Report
from ghostpool._workerclient import WorkerClient, WorkerFailure
from ghostpool.testing._targets import built
from tests.support.corpus import CORPUS, corpus
from tests.support.namespaces import inside, mountinfo
from tests.support.truth import specs_from_truth

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.anyio]
CASE = "06-nested-mntns"
IDS = (10, 11, 12, 13)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def names() -> list[tuple[str, int, int]]:
    """Every name below the root of the namespace, with what it leads to."""
    found = []
    for directory, directories, files in os.walk("/"):
        if directory == "/":
            directories.remove("proc")
        for name in directories + files:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            found.append((path, status.st_mode, status.st_size * stat.S_ISREG(status.st_mode)))
    return sorted(found)


class Target:
    """The four namespaces of the case, and how they were."""

    def __init__(self, fds: list[int]) -> None:
        self.fds = fds
        self._before = self._look()

    def _look(self) -> list[Any]:
        return [(mountinfo(fd), inside(fd, names)) for fd in self.fds]

    def request(self, jobs: int) -> _run.Request:
        where = {NsId(i): f"/proc/self/fd/{fd}" for i, fd in zip(IDS, self.fds, strict=True)}
        return _run.Request(str(CORPUS / CASE / "images"), jobs, namespaces=where)

    def assert_untouched(self) -> None:
        for before, after in zip(self._before, self._look(), strict=True):
            assert after[0] == before[0]
            assert after[1] == before[1]


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    _, truth = corpus(CASE)
    with built(specs_from_truth(truth)) as fds:
        yield Target(fds)


async def run(target: Target, jobs: int) -> Report:
    report = Report()
    await _run.run_restore(target.request(jobs), launch(), report, _deliver.discard)
    return report


Hook = Callable[[int, str], None]


def hook_calls(monkeypatch: pytest.MonkeyPatch, before: Hook, after: Hook) -> list[str]:
    """Have `before` and `after` called around each call to a worker, with number and request."""
    calls: list[str] = []
    original = WorkerPool.call

    async def call(self: WorkerPool, slot: int, request: str, *args: Any, **keywords: Any) -> Any:
        number = len(calls)
        calls.append(request)
        before(number, request)
        result = await original(self, slot, request, *args, **keywords)
        after(number, request)
        return result

    monkeypatch.setattr(WorkerPool, "call", call)
    return calls


def nothing(number: int, request: str) -> None:
    pass


async def test_restore_leaves_everything_as_it_was(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = hook_calls(monkeypatch, nothing, nothing)
    report = await run(target, 4)
    assert report.restored
    target.assert_untouched()
    document = report.document()
    assert [m["made_writable"] for m in document["mounts"]] == [{"service": 1, "task": 1}] * 6
    # The list that the other tests go through holds every kind of step.
    expected = {"mountinfo", "open_mounts", "clone", "look", "create", "open", "remove"}
    assert expected | {"make_writable", "make_read_only"} <= set(calls)


@pytest.mark.long
@pytest.mark.parametrize("when", ["before", "after"])
async def test_cancelled_at_each_step(
    target: Target, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Cancelling the caller's scope at any step undoes everything."""
    step = 0
    while True:
        with anyio.CancelScope() as scope, monkeypatch.context() as patch:

            def cancel(number: int, request: str, step: int = step) -> None:
                if number == step:
                    scope.cancel()

            before, after = (cancel, nothing) if when == "before" else (nothing, cancel)
            calls = hook_calls(patch, before, after)
            await run(target, 2)
        target.assert_untouched()
        if not scope.cancel_called:
            break
        step += 1
    assert step >= 15, calls


@pytest.mark.long
async def test_worker_killed_at_each_step(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies at any step fails the restore, and another one undoes its work."""
    step = 0
    failed = 0
    while True:
        seen = []
        original = WorkerClient.call

        async def call(
            self: WorkerClient, request: str, *args: Any, step: int = step, **keywords: Any
        ) -> Any:
            seen.append(request)  # noqa: B023  the loop waits for the run
            if len(seen) - 1 == step:  # noqa: B023
                self.child.signal(signal.SIGKILL)
            return await original(self, request, *args, **keywords)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(WorkerClient, "call", call)
            try:
                await run(target, 2)
            except* RestoreError:
                failed += 1
        target.assert_untouched()
        if len(seen) <= step:
            break
        step += 1
    # Unnoticed is only the loss of a worker that was undoing (it is replaced), or had ended.
    # That of the guardian, when it is told that something is settled, or that all is over, is
    # noticed only if it is needed once more.
    unnoticed = {"make_read_only", "remove", "finish", "settle", "close"}
    must = sum(1 for request in seen if request not in unnoticed)
    assert must <= failed <= must + seen.count("settle"), (failed, seen)
    assert step >= 15


ERRORS = {
    "create": (errno.ENOSPC, "pwrite"),
    "open": (errno.EIO, "linkat"),
    "make_writable": (errno.EPERM, "mount_setattr"),
}


@pytest.mark.long
@pytest.mark.parametrize("request_name", list(ERRORS))
async def test_error_at_each_step(
    target: Target, monkeypatch: pytest.MonkeyPatch, request_name: str
) -> None:
    """An errno from the n-th request of a kind is reported as such, and everything is undone."""
    code, syscall = ERRORS[request_name]
    number = 0
    while True:
        count = 0
        original = WorkerPool.call

        async def call(
            self: WorkerPool, slot: int, request: str, *args: Any, n: int = number, **keywords: Any
        ) -> Any:
            nonlocal count
            if request == request_name:
                count += 1
                if count == n + 1:
                    if request == "make_writable":
                        return [(None, code, syscall) for _ in args[0]], []
                    raise WorkerFailure(Failure(0, code, syscall, b"name", -1))
            return await original(self, slot, request, *args, **keywords)  # noqa: B023

        error: BaseException | None = None
        with monkeypatch.context() as patch:
            patch.setattr(WorkerPool, "call", call)
            try:
                await run(target, 2)
            except Exception as caught:  # noqa: BLE001  looked at below
                error = caught
        target.assert_untouched()
        if error is None:
            break
        found = [leaf.errno for leaf in leaves(error) if isinstance(leaf, OSError)]
        assert found == [code], error
        number += 1
    assert number >= 2


async def test_both_strategies_of_changing_a_mount(target: Target) -> None:
    """Without mount_setattr(2), mount(2) restates every other flag."""
    report = Report()
    request = target.request(2)
    old = _run.Request(
        request.images_dir,
        2,
        namespaces=request.namespaces,
        policy=Policy(),
        mount_setattr=False,
    )
    await _run.run_restore(old, launch(), report, _deliver.discard)
    target.assert_untouched()
    mounts = report.document()["mounts"]
    assert [m["made_writable"] for m in mounts] == [{"service": 0, "task": 1}] * 6
