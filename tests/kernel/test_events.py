"""What happens in real restores, as those who follow them are told."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

import ghostpool
from ghostpool import Event, Lost
from ghostpool._eventfile import FLUSH_S
from tests.support.restore import COMMAND, fetched, start
from tests.support.restore import ghostpool as run
from tests.support.scene import Scene, look, read, scene

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.anyio]
NAMESPACES, TASKS, FILES = 2, 2, 2
GHOSTS = NAMESPACES * TASKS * FILES


@pytest.fixture(params=["trio", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path / "img", NAMESPACES, TASKS, FILES) as one:
        yield one


class Noted(list[Event]):
    """Everything that was sent, and what `then` makes of it on the spot."""

    def __init__(self, then: Callable[[Event], object] = lambda event: None) -> None:
        self.then = then

    def send_nowait(self, event: Event) -> None:
        self.append(event)
        self.then(event)


def check_order(found: Sequence[dict[str, Any]], *, fetched_in_any_order: bool = False) -> None:
    """Of a restore of the scene that has succeeded; every kind but failed and lost is there."""
    kinds = [one["event"] for one in found]

    def first(kind: str) -> int:
        return kinds.index(kind)

    def last(kind: str) -> int:
        return len(kinds) - 1 - kinds[::-1].index(kind)

    numbers = {kind: kinds.count(kind) for kind in kinds if kind != "entered"}
    assert numbers == {
        "planned": 1,
        "ghost_created": GHOSTS,
        "mount_writable": NAMESPACES,
        "file_opened": GHOSTS,
        "task_arrived": NAMESPACES * TASKS,
        "reverted": NAMESPACES,
        "cleaned": 1,
    }
    # Workers enter a namespace to look at it, before there can be a plan; further ones later.
    assert first("entered") < first("planned") < first("ghost_created")
    assert last("ghost_created") < first("mount_writable")
    assert last("file_opened") < last("task_arrived") < first("reverted")
    assert last("reverted") < first("cleaned") == len(kinds) - 1
    targets = {one["target"] for one in found if one["event"] == "entered"}
    assert len(targets) == NAMESPACES
    for kind in ("mount_writable", "reverted"):
        of_kind = [one for one in found if one["event"] == kind]
        assert {one["target"] for one in of_kind} == targets
        assert {one["mountpoint"] for one in of_kind} == {"/data"}
    for pid in range(1, NAMESPACES * TASKS + 1):
        own = [one["event"] for one in found if one.get("task") == pid]
        if fetched_in_any_order:
            # What tasks have in common is opened by whoever comes first.
            assert own.index("task_arrived") == len(own) - 1
        else:
            assert own == ["file_opened"] * FILES + ["task_arrived"]
    assert [one["at"] for one in found] == sorted(one["at"] for one in found)
    (planned,) = (one for one in found if one["event"] == "planned")
    numbers = {"ghosts": GHOSTS, "files": GHOSTS, "tasks": 4, "mounts": 2, "to_make_writable": 2}
    assert planned | numbers | {"refusals": 0} == planned
    assert found[-1]["names"] == 0  # each is opened once, and lost its name with that


async def restored(made: Scene, events: ghostpool.EventSink, jobs: int = 2) -> None:
    """Restore with a follower: whatever that does, the result is the same."""
    options: dict[str, Any] = {"namespaces": made.namespaces, "jobs": jobs, "events": events}
    async with ghostpool.restore(made.images, **options) as done:
        for pid, task in done.tasks.items():
            fds = await task.take_fds()
            try:
                assert read(fds) == made.contents[pid]
            finally:
                for fd in fds.values():
                    os.close(fd)


async def test_what_happens_is_told_in_its_order(made: Scene) -> None:
    noted = Noted()
    await restored(made, noted)
    check_order([event.document() for event in noted])


async def test_a_mount_is_as_it_is_told(made: Scene) -> None:
    """Read-only before mount_writable, and after reverted, as its own process sees it."""
    seen: list[tuple[str, str]] = []

    def note(event: Event) -> None:
        if isinstance(event, (ghostpool.MountWritable, ghostpool.Reverted, ghostpool.Planned)):
            for target in made.targets.values():
                if not isinstance(event, ghostpool.Planned) and str(target.pid) not in event.target:
                    continue
                table = ghostpool.MountTable.of_process(target.pid)
                (mount,) = table.stack(b"/data")
                seen.append((event.kind, mount.options()[0]))

    await restored(made, Noted(note))
    assert sorted(set(seen)) == [("mount_writable", "rw"), ("planned", "ro"), ("reverted", "ro")]


async def test_a_stream_that_is_full(made: Scene) -> None:
    """A reader that reads now and then is told how much it lost, and misses nothing else."""
    sender, receiver = anyio.create_memory_object_stream[Event](3)
    got: list[Event] = []

    class Slow:
        def send_nowait(self, event: Event) -> None:
            if isinstance(event, Lost) and event.events == 3:
                got.extend(receiver.receive_nowait() for _ in range(3))
            sender.send_nowait(event)

        def close(self) -> None:
            sender.close()

    with receiver:
        await restored(made, Slow(), jobs=1)
        got += [event async for event in receiver]
    assert [event.kind for event in got[:3]] == ["entered", "entered", "planned"]
    lost = [event.events for event in got if isinstance(event, Lost)]
    assert lost
    assert set(lost) == {3}
    everything = 3 + 2 * GHOSTS + 2 * NAMESPACES + NAMESPACES * TASKS + 1
    assert len(got) - len(lost) + sum(lost) == everything


async def test_a_reader_that_waits(made: Scene) -> None:
    """As in the documentation: it comes to the end by itself."""
    sender, receiver = anyio.create_memory_object_stream[Event](1000)
    got: list[Event] = []

    async def follow() -> None:
        async with receiver:
            async for event in receiver:
                got.append(event)  # noqa: PERF401  as a reader would

    async with anyio.create_task_group() as group:
        group.start_soon(follow)
        await restored(made, sender)
    check_order([event.document() for event in got])


async def test_a_reader_that_raises(made: Scene, caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Event) -> None:
        raise KeyError("a bug")

    noted = Noted(fail)
    await restored(made, noted)
    assert len(noted) == 1
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in errors] == [
        "a reader of events failed and gets no more of them"
    ]


async def test_a_failure_is_told_when_everything_is_undone(made: Scene) -> None:
    before = look(made.targets)
    undone: list[bool] = []

    def note(event: Event) -> None:
        if isinstance(event, ghostpool.Failed):
            undone.append(look(made.targets) == before)

    noted = Noted(note)
    with pytest.raises(ExceptionGroup):  # noqa: PT012  what raises is the block
        async with (
            ghostpool.open_pool(made.images, namespaces=made.namespaces, events=noted) as pool,
            pool.task(1) as task,
        ):
            await task.open_files()
            raise ZeroDivisionError("the program's own")
    kinds = [event.kind for event in noted if event.kind != "entered"]
    opened = kinds.count("file_opened")
    assert kinds == [
        "planned",
        *["ghost_created"] * GHOSTS,
        "mount_writable",
        *["file_opened"] * opened,
        "reverted",
        "cleaned",
        "failed",
    ]
    failed = noted[-1]
    assert isinstance(failed, ghostpool.Failed)
    assert (failed.error, failed.message) == ("ZeroDivisionError", "the program's own")
    assert undone == [True]


async def test_a_cancellation_is_told(made: Scene) -> None:
    noted = Noted()
    with anyio.CancelScope() as scope:
        async with ghostpool.open_pool(made.images, namespaces=made.namespaces, events=noted):
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert [event.kind for event in noted][-2:] == ["cleaned", "failed"]


# -- The command --------------------------------------------------------------------------------


def restoring(made: Scene, *more: object) -> list[object]:
    where = [word for ns, pid in made.namespaces.items() for word in ("--ns", f"{ns}={pid}")]
    return ["restore", "-D", made.images, "-j", 2, *where, *more]


def parsed(text: str) -> list[dict[str, Any]]:
    first, *found, last = (json.loads(line) for line in text.splitlines())
    assert (first["event"], first["schema"], last["event"]) == ("run", 1, "end")
    return found


def test_the_file(made: Scene, tmp_path: Path) -> None:
    done = run(*restoring(made, "--discard", "--events", tmp_path / "events"))
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    check_order(parsed((tmp_path / "events").read_text()))


def test_on_stdout(made: Scene) -> None:
    done = run(*restoring(made, "--discard", "--events", "-"))
    assert (done.returncode, done.stderr) == (0, "")
    check_order(parsed(done.stdout))


def test_on_stdout_of_a_server(made: Scene) -> None:
    """What it would say there goes to stderr, where the bar comes after it, at the end."""
    process = start([*COMMAND, *restoring(made, "--events", "-", "--progress")])
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serving 4 tasks on ")
        with fetched(line.rstrip("\n").partition(" on ")[2], made.contents):
            pass
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert err.startswith("restoring ")
    assert "100%" in err
    assert err.count("\n") == 1
    check_order(parsed(out), fetched_in_any_order=True)


def test_a_failure_in_the_file(made: Scene, tmp_path: Path) -> None:
    """A command of a task that is not there."""
    path = tmp_path / "events"
    done = run(*restoring(made, "--events", path, "--", "/nowhere/at/all"))
    assert done.returncode == 1
    *found, failed = parsed(path.read_text())
    check_order(found)
    assert failed["event"] == "failed"
    assert failed["message"] in done.stderr


def test_a_fifo_that_nobody_reads_delays_nothing(made: Scene, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    begun = time.monotonic()
    plain = run(*restoring(made, "--discard"))
    middle = time.monotonic()
    done = run(*restoring(made, "--discard", "--events", fifo))
    assert time.monotonic() - middle < middle - begun + FLUSH_S / 2
    assert (plain.returncode, done.returncode) == (0, 0)
    assert done.stderr.endswith("events were not written: nobody reads it\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--discard", "--events", "/nowhere/events"), "No such file or directory"),
        (("--discard", "--events", "-", "--json"), "can not go to the same file"),
        (("--events", "-", "--", "true"), "stdout belongs to the command"),
    ],
)
def test_what_is_refused(made: Scene, options: Sequence[str], problem: str) -> None:
    done = run(*restoring(made, *options))
    assert done.returncode == 2
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1


def test_progress_without_a_terminal(made: Scene) -> None:
    """One line on stderr, when it is over; a refusal has none."""
    done = run(*restoring(made, "--discard", "--progress"))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("restoring ")
    assert "100%" in done.stderr
    assert done.stderr.count("\n") == 1
    refused = run("restore", "-D", made.images, "--ns", "99=1", "--discard", "--progress")
    assert refused.returncode == 2
    assert "restoring" not in refused.stderr


def test_progress_on_a_terminal(made: Scene) -> None:
    """It moves there, and leaves the cursor as it was."""
    ours, theirs = os.openpty()
    try:
        arguments = restoring(made, "--progress", "--discard")
        process = start([*COMMAND, *arguments], stderr=theirs, env={**os.environ, "TERM": "xterm"})
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 1 << 16):
                shown += data
        except OSError:
            pass  # EIO: the other side is closed
        process.communicate(timeout=30)
    finally:
        os.close(ours)
    assert process.returncode == 0
    assert b"100%" in shown
    assert shown.endswith(b"\x1b[?25h"), "the cursor is back"
