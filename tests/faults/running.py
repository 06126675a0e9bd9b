"""One run with one fault: a coordinator of its own, and what is left after it.

The coordinator is forked, so that it may be killed; the caller is the reaper of everything that
the run leaves behind, so it sees the last process go.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import stat
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import anyio

from ghostpool import _cli, _deliver, _launch, _linux, _run
from ghostpool._errors import GhostpoolError, leaves
from ghostpool._launch import launch
from ghostpool._model import NsId
from ghostpool._planned import Policy
from ghostpool._process import ForkServer
from ghostpool._report import Report
from ghostpool._workerclient import WorkerClient
from ghostpool.testing._act import alive
from ghostpool.testing._area import Area, Fault
from tests.faults.act import act
from tests.faults.child import BOOT
from tests.faults.scenes import Scene

TESTS = Path(__file__).parents[2]
LIMIT_S = 60.0
"""Seconds after which a coordinator hangs."""
GONE_S = 20.0
"""Seconds for everything that it started to be gone; the guardian waits for a moment for others."""
STALL_S = 0.3
"""So long a worker may do nothing at all; a false alarm on a busy machine is undone as well."""
PR_SET_CHILD_SUBREAPER = 36


Plan = Sequence[tuple[str, Fault]]
"""Steps, as they are noted, and what is to happen at the first arrival at each."""


class Call(NamedTuple):
    """A call of the coordinator to a child: which one, and on which side of it the fault is."""

    number: int
    after: bool


@dataclass
class Case:
    """One fault in one run."""

    fault: Fault = ()
    plan: Plan = ()
    """Faults at steps of children."""
    call: Call | None = None
    """A fault at a call of the coordinator."""
    backend: str = "trio"
    moment_s: float | None = None
    """When the fault happens, if it is at no step and no call; from the coordinator's start."""


@dataclass
class Outcome:
    """What came of a run."""

    red: list[str] = field(default_factory=list)
    """What is wrong, in words; nothing if all is well."""
    error: str = ""
    """Names of the errors that the run ended with, or the signal that killed it."""
    restored: bool = False
    """The report says so."""
    left: list[str] = field(default_factory=list)
    """What the report says was left, because somebody else uses it."""
    fired: bool = False
    recovered: bool = False
    """`ghostpool recover` was needed, and did it."""
    steps: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    said: str = ""


def become_reaper() -> None:
    """Orphans of children become children of this process."""
    # A cancellation that comes before a coordinator has its handler is none.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    _linux.prctl(PR_SET_CHILD_SUBREAPER, 1)


def run_case(scene: Scene, case: Case, directory: Path, *, again: bool = True) -> Outcome:
    """Run it and look; with `again` the scene is as before afterwards, whatever came of it."""
    area = Area.create()
    try:
        return _run_case(scene, case, directory, area, again)
    finally:
        area.close()


def _run_case(scene: Scene, case: Case, directory: Path, area: Area, again: bool) -> Outcome:
    for step, fault in case.plan:
        area.arm(step, fault)
    run_directory = directory / "run"
    run_directory.mkdir(mode=0o700, exist_ok=True)
    outcome = Outcome()
    keepers = _children()
    _coordinated(scene, case, directory, area, outcome)
    left = _await_orphans(keepers)
    if left:
        outcome.red.append(f"processes are left: {', '.join(left)}")
    outcome.fired = outcome.fired or area.fired()
    processes = area.processes()
    outcome.steps = list(dict.fromkeys(line for one in processes for line in one.lines))
    wrong = differences(scene, scene.look(), outcome)
    if (wrong or _records(run_directory)) and may_need_recover(case, outcome):
        _recover(run_directory, outcome)
        outcome.recovered = True
        wrong = differences(scene, scene.look(), outcome)
    if records := _records(run_directory):
        wrong.append(f"the run directory holds {records}")
    outcome.red += wrong
    if wrong or scene.look() != scene.before:
        if not again:
            return outcome
        scene.clean()
        still = differences(scene, scene.look(), Outcome(error="cleaned"))
        if still:
            raise RuntimeError(f"the scene can not be put back: {still}")
    for record in run_directory.iterdir():
        if record.suffix == ".journal":
            record.unlink()
    return outcome


def may_need_recover(case: Case, outcome: Outcome) -> bool:
    """Where everything was killed, or the guardian failed as well, or the user was told to."""
    faults = [case.fault, *(fault for _, fault in case.plan)]
    both = outcome.error.startswith("killed") and len(case.plan) > 1
    return ("kill", "all") in faults or both or "RevertError" in outcome.error


def _records(run_directory: Path) -> list[str]:
    return sorted(path.name for path in run_directory.iterdir() if path.suffix == ".journal")


def _recover(run_directory: Path, outcome: Outcome) -> None:
    """The command, in a fork of this process, which has everything imported already."""
    said = os.open(run_directory.parent / "said", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.environ["GHOSTPOOL_RUN_DIR"] = str(run_directory)
            sys.argv = ["ghostpool", "recover", "--json"]
            _cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else status
        except BaseException:  # noqa: BLE001  it is told to the caller
            os.write(2, traceback.format_exc().encode())
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, wait_status = os.waitpid(pid, 0)
    with open(said, "rb") as file:
        file.seek(0)
        text = file.read().decode(errors="replace")
    outcome.said += text
    if wait_status:
        outcome.red.append(f"recover ended with {os.waitstatus_to_exitcode(wait_status)}: {text}")


def differences(scene: Scene, now: list[Any], outcome: Outcome) -> list[str]:
    """How the scene differs from before; with `keep`, a success leaves its files."""
    found = []
    for number, (old, new) in enumerate(zip(scene.before, now, strict=True)):
        if old[0] != new[0]:
            lines = set(new[0].splitlines()) - set(old[0].splitlines())
            found.append(f"namespace {10 + number}: mounts: {sorted(lines)}")
        changed = {
            path for path in old[1].keys() | new[1].keys() if old[1].get(path) != new[1].get(path)
        }
        if scene.definition.keep and (outcome.restored or outcome.error.startswith("killed")):
            changed -= _kept(changed, old[1])
        if outcome.left:
            # Empty parents that somebody else seemed to use: told, and no file.
            changed = {path for path in changed if not _is_new_directory(path, old[1], new[1])}
            changed -= {"/data", "/data (counts)"}
        if changed:
            found.append(f"namespace {10 + number}: files: {sorted(changed)}")
    return found


def _is_new_directory(path: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    return path not in old and stat.S_ISDIR(new[path][0])


def _kept(changed: set[str], old: dict[str, Any]) -> set[str]:
    """What `--keep` may have left: all files at their old names, with their parents, or none."""
    added = {path for path in changed if path not in old}
    whole = {"/data/dir", "/data/gone", "/data/gone/plain", "/data/taken.cr_link", "/data/twice"}
    if added != whole:
        return set()
    return {"/data", "/data (counts)", *whole}


def _coordinated(scene: Scene, case: Case, directory: Path, area: Area, outcome: Outcome) -> None:
    reader, writer = os.pipe()
    said = os.open(directory / "said", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            os.dup2(said, 2)
            os.environ["GHOSTPOOL_RUN_DIR"] = str(directory / "run")
            answer = _Coordinator(scene, case, area).run()
            with open(writer, "w") as pipe:
                json.dump(answer, pipe)
            status = 0
        except BaseException:  # noqa: BLE001  it is told to the caller
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb", buffering=0) as pipe:
        moment = (case.moment_s, lambda: _strike(area, case, pid))
        data = _until_end(pipe.fileno(), pid, outcome, *moment)
    _, wait_status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(wait_status)
    with open(said, "rb") as file:
        file.seek(0)
        outcome.said += file.read().decode(errors="replace")
    if code < 0:
        outcome.error = f"killed by {signal.Signals(-code).name}"
    elif code or not data:
        outcome.red.append(f"the coordinator failed: {outcome.said}")
    else:
        answer = json.loads(data)
        outcome.error = answer["error"]
        outcome.calls = answer["calls"]
        outcome.restored = answer["restored"]
        outcome.left = answer["left"]
        outcome.fired = answer["fired"]
        outcome.red += answer["red"]


def _strike(area: Area, case: Case, coordinator: int) -> None:
    """A fault from outside, at no particular point of the run."""
    workers = alive(area.pids("worker"))
    if workers or case.fault not in (("kill", "worker"), ("stop",)):
        own = workers[-1] if workers else 0
        act(area, case.fault, own, coordinator=coordinator)


def _until_end(
    fd: int,
    pid: int,
    outcome: Outcome,
    moment_s: float | None,
    strike: Callable[[], None],
) -> bytes:
    """What the coordinator answers; its end is also that of the pipe, which nobody else holds."""
    data = b""
    give_up = time.monotonic() + LIMIT_S
    if moment_s is not None:
        ready, _, _ = select.select([fd], [], [], moment_s)
        if not ready:
            strike()
    while True:
        ready, _, _ = select.select([fd], [], [], max(0.0, give_up - time.monotonic()))
        if not ready:
            outcome.red.append(f"the coordinator hangs for {LIMIT_S:g} s")
            os.kill(pid, signal.SIGKILL)
            return data
        piece = os.read(fd, 1 << 16)
        if not piece:
            return data
        data += piece


def _children() -> set[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return set(map(int, file.read().split()))


def _await_orphans(keepers: set[int]) -> list[str]:
    """Reap all that the run has left; who does not end by itself is told, and killed."""
    give_up = time.monotonic() + GONE_S
    while others := _children() - keepers:
        for pid in others:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > give_up:
            names = []
            for pid in _children() - keepers:
                with contextlib.suppress(OSError):
                    names.append(Path(f"/proc/{pid}/status").read_text().split("\n")[2])
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return names
        time.sleep(0.001)
    return []


class _Coordinator:
    """The forked process: one restore on one event loop."""

    def __init__(self, scene: Scene, case: Case, area: Area) -> None:
        self._scene = scene
        self._case = case
        self._area = area
        self._calls: list[str] = []
        self._report = Report()
        self._scope: anyio.CancelScope | None = None
        self._asked = -1

    def run(self) -> dict[str, Any]:
        boot = BOOT.format(tests=str(TESTS), area=self._area.path, coordinator=os.getpid())
        _launch._BOOT = boot
        self._patch()
        self._asked, writer = os.pipe()
        # Not the event loop's own way: asyncio leaves a signal deadly when it has been handled.
        signal.signal(signal.SIGUSR1, lambda *_: os.write(writer, b"."))
        before = _descriptors()
        error: BaseException | None = None
        try:
            anyio.run(self._main, backend=self._case.backend)
        except BaseException as caught:  # noqa: BLE001  looked at below
            error = caught
        red: list[str] = []
        left = _descriptors() - before
        if left:
            red.append(f"descriptors are left: {sorted(left)}")
        return {
            "error": self._named(error, red),
            "restored": self._report.restored,
            "left": self._report.left,
            "calls": self._calls,
            "fired": self._area.fired(),
            "red": red,
        }

    def _named(self, error: BaseException | None, red: list[str]) -> str:
        if error is None:
            return "cancelled" if self._scope is not None and self._scope.cancelled_caught else ""
        found = list(leaves(error))
        for leaf in found:
            if not isinstance(leaf, GhostpoolError):
                text = "".join(traceback.format_exception(leaf))
                red.append(f"not an error of ghostpool: {text}")
        return " ".join(sorted({type(leaf).__name__ for leaf in found}))

    async def _main(self) -> None:
        definition = self._scene.definition
        where = {NsId(n): f"/proc/self/fd/{fd}" for n, fd in self._scene.namespaces.items()}
        request = _run.Request(
            str(self._scene.images),
            2,
            namespaces=where,
            policy=Policy(
                keep=definition.keep,
                allow_devices=True,
                strategy=definition.strategy,
                overmounted=definition.overmounted,
            ),
            mount_setattr=definition.mount_setattr,
            consumers="nobody" if definition.discard else None,
            stall_s=STALL_S,
        )
        words = list(definition.command)
        deliver = _deliver.commands(words) if words else _deliver.discard
        async with _when_readable(self._asked, self._cancel):
            with anyio.CancelScope() as self._scope:
                await _run.run_restore(request, launch(), self._report, deliver)

    def _cancel(self) -> None:
        assert self._scope is not None
        self._scope.cancel()
        self._area.acknowledged(1)

    # -- faults at calls ------------------------------------------------------------------------

    def _patch(self) -> None:
        coordinator = self
        worker_call, fork = WorkerClient.call, ForkServer.fork

        async def call(self: WorkerClient, request: str, *args: Any, **keywords: Any) -> Any:
            step = coordinator._next(request)
            coordinator._at(step, False, self.child.pid)
            result = await worker_call(self, request, *args, **keywords)
            coordinator._at(step, True, self.child.pid)
            return result

        async def forked(self: ForkServer, kind: str, *args: Any, **keywords: Any) -> Any:
            step = coordinator._next(f"fork {kind}")
            coordinator._at(step, False, 0)
            child = await fork(self, kind, *args, **keywords)
            coordinator._at(step, True, child.pid)
            return child

        WorkerClient.call = call  # type: ignore[method-assign]
        ForkServer.fork = forked  # type: ignore[method-assign]

    def _next(self, name: str) -> int:
        self._calls.append(name)
        return len(self._calls) - 1

    def _at(self, number: int, after: bool, child: int) -> None:
        if self._case.call != Call(number, after):
            return
        fault = self._case.fault
        if fault == ("cancel",):
            self._area.fired(1)
            self._cancel()
        elif child or fault not in (("kill", "worker"), ("stop",)):
            act(self._area, fault, child, coordinator=os.getpid())


@contextlib.asynccontextmanager
async def _when_readable(fd: int, what: Callable[[], None]) -> AsyncIterator[None]:
    """Call `what` when a signal has written to the pipe: a worker's step is to be the moment."""

    async def receive() -> None:
        await anyio.wait_readable(fd)
        what()

    error: BaseException | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(receive)
        try:
            yield
        except BaseException as caught:  # noqa: BLE001  raised again, out of the task group
            error = caught
        group.cancel_scope.cancel()
    if error is not None:
        raise error


def _descriptors() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(f"{name}: {os.readlink(f'/proc/self/fd/{name}')}")
    return {one for one in found if "anon_inode" not in one or "pidfd" in one}


def faults_of_call() -> Iterator[Fault]:
    """What may happen at any call."""
    yield ("cancel",)
    for whom in ("worker", "coordinator", "guardian", "forkserver"):
        yield ("kill", whom)
    yield ("kill", "all")
    yield ("stop",)
