"""A task of the embedding program and two consumers in one barrier, and one of them is killed.

The consumer is killed by strace as it enters the system call of one of its messages, so the moment
is that one and no other.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest

import ghostpool
from ghostpool import ConsumerLost, TaskArrived
from ghostpool._errors import leaves
from ghostpool.testing import Snapshot
from tests.support.consumers import NAMES, command_line
from tests.support.crash import journals
from tests.support.imagewriter import ImageSet
from tests.support.live import Live, live, read_only

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.needs_strace, pytest.mark.needs_cc]
LIMIT_S = 30
POINTS = (b"/a", b"/b")
CONTENT = "of task %d"
SENDS = {"fetch": "sendmsg", "fetch.c": "sendto", "fetch.py": "sendto"}
MOMENTS = {
    "before hello": ("send", 1),
    "after hello": ("recvmsg", 1),
    "after files": ("send", 2),
    "after ready": ("recvmsg", 2),
}


class Scene:
    """Images of three tasks in two namespaces, and their targets."""

    def __init__(self, images: Path, targets: list[Live], compiled: Path) -> None:
        self.images = images
        self.targets = targets
        self.compiled = compiled
        self.before = self.look()

    def look(self) -> list[Snapshot]:
        return [target.snapshot().without_directory_times() for target in self.targets]

    def pool(self, **options: Any) -> Any:
        namespaces: dict[int, int | str] = {
            10 + number: target.pid for number, target in enumerate(self.targets)
        }
        return ghostpool.open_pool(self.images, namespaces=namespaces, jobs=4, **options)

    def writable(self) -> list[list[bytes]]:
        """Which of the mounts are writable, in each namespace."""
        return [[at for at in POINTS if target.is_writable(at)] for target in self.targets]

    @contextmanager
    def consumer(self, name: str, path: str, task: int, *prefix: str) -> Iterator[Any]:
        """A consumer that says what its ghost holds."""
        command = ("sh", "-c", "cat <&3")
        process = subprocess.Popen(
            [*prefix, *command_line(name, self.compiled, path, task, *command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    made = ImageSet()
    for namespace in (10, 11):
        made.mount("/", ns=namespace)
        for point in POINTS:
            made.mount(point.decode(), ns=namespace, flags=0x200001)
    for task in (1, 2, 3):
        made.task(task, ns=10 + task % 2)
        name = f"{POINTS[task % 2].decode()}/gone-{task}"
        made.open(task, 3, name, ghost=made.ghost((CONTENT % task).encode()))
    images = made.write(tmp_path_factory.mktemp("images"))
    mounts = [read_only(10 + n, at, "keep") for n, at in enumerate(POINTS)]
    with live(mounts, mounts) as targets:
        yield Scene(images, targets, tmp_path_factory.mktemp("compiled"))


def killed_at(name: str, moment: str) -> list[str]:
    """What to put before a consumer that is to be killed at that moment of the dialogue."""
    call, when = MOMENTS[moment]
    call = SENDS[name] if call == "send" else call
    inject = f"inject={call}:signal=KILL:when={when}"
    return ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject]


class Played(NamedTuple):
    """What became of a restore."""

    error: BaseException | None
    program: list[str]
    """What the task of the program itself saw."""
    consumers: dict[str, tuple[int, str, str]]
    """Exit status, stdout and stderr of each."""


@asynccontextmanager
async def limited() -> AsyncIterator[None]:
    """Nothing in here may hang."""
    with anyio.fail_after(LIMIT_S):
        yield


async def play(scene: Scene, path: str, name: str, moment: str | None) -> Played:
    """Serve tasks 1 and 2 and bring up task 3; the consumer `name` of task 1 is killed."""
    seen: list[str] = []
    error: BaseException | None = None
    consumers: dict[str, Any] = {}
    with ExitStack() as stack:

        def consume(role: str, which: str, task: int, *prefix: str) -> Any:
            started = scene.consumer(which, path, task, *prefix)
            consumers[role] = stack.enter_context(started)
            return consumers[role]

        tell, told = anyio.create_memory_object_stream[ghostpool.Event](100)
        try:
            async with (
                limited(),
                told,
                tell,
                scene.pool(events=tell) as pool,
            ):
                async with anyio.create_task_group() as group:
                    await group.start(partial(pool.serve, path, tasks=[1, 2]))
                    async with pool.task(3) as task:
                        (fd,) = (await task.open_files()).values()
                        seen.append(os.pread(fd, 100, 0).decode())
                        consume("other", NAMES[NAMES.index(name) - 1], 2)
                        async for event in told:
                            if isinstance(event, TaskArrived) and event.task == 2:
                                break
                        if moment is not None:
                            victim = consume("victim", name, 1, *killed_at(name, moment))
                            await anyio.to_thread.run_sync(victim.wait)
                            if moment != "before hello":
                                # It is cancelled when the death is seen.
                                await anyio.sleep_forever()
                        consume("consumer", name, 1)
                    seen.append("passed")
                assert scene.writable() == [[], []]
                assert consumers["other"].poll() is None
                await pool.finish()
        except BaseExceptionGroup as caught:
            error = caught
        said = {}
        for role, process in consumers.items():
            out, err = process.communicate(timeout=LIMIT_S)
            said[role] = (process.returncode, out, err)
    return Played(error, seen, said)


def check_nothing_left(scene: Scene, path: str) -> None:
    for before, now in zip(scene.before, scene.look(), strict=True):
        assert now.mountinfo == before.mountinfo
        assert now.files == before.files
    assert journals() == []
    assert not os.path.exists(path)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("name", NAMES)
def test_all_together(scene: Scene, tmp_path: Path, name: str, backend: str) -> None:
    """Consumers become their commands when the pool has finished, and not before."""
    path = str(tmp_path / "socket")
    played = anyio.run(play, scene, path, name, None, backend=backend)
    assert played.error is None
    assert played.program == [CONTENT % 3, "passed"]
    assert played.consumers == {"other": (0, CONTENT % 2, ""), "consumer": (0, CONTENT % 1, "")}
    check_nothing_left(scene, path)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("name", NAMES)
def test_killed_when_all_have_arrived(
    scene: Scene, tmp_path: Path, name: str, backend: str
) -> None:
    """The barrier is passed, but nobody is released yet: the pool does not finish."""
    path = str(tmp_path / "socket")

    async def story(stack: ExitStack) -> None:
        async with limited(), scene.pool() as pool:
            async with anyio.create_task_group() as group:
                await group.start(partial(pool.serve, path, tasks=[1, 2]))
                which = {1: name, 2: NAMES[NAMES.index(name) - 1]}
                for task, which_one in which.items():
                    started = scene.consumer(which_one, path, task)
                    consumers.append(stack.enter_context(started))
                async with pool.task(3):
                    pass
            assert scene.writable() == [[], []]
            consumers[0].kill()
            await anyio.to_thread.run_sync(consumers[0].wait)
            await pool.finish()
            pytest.fail("it finished")

    consumers: list[Any] = []
    with ExitStack() as stack:
        with pytest.raises(BaseExceptionGroup) as caught:
            anyio.run(story, stack, backend=backend)
        (lost,) = leaves(caught.value)
        assert isinstance(lost, ConsumerLost)
        assert (lost.task, lost.process) == (1, consumers[0].pid)
        out, err = consumers[1].communicate(timeout=LIMIT_S)
        assert (consumers[1].returncode, out) == (1, "")
        assert "the consumer of task 1" in err
    check_nothing_left(scene, path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_consumer(scene: Scene, tmp_path: Path, name: str, moment: str) -> None:
    """From its hello on its death is the end for all; before that, it is nobody's."""
    path = str(tmp_path / "socket")
    backend = ("asyncio", "trio")[list(MOMENTS).index(moment) % 2]
    played = anyio.run(play, scene, path, name, moment, backend=backend)
    assert played.consumers["victim"][0] == -signal.SIGKILL
    if moment == "before hello":
        assert played.error is None
        assert played.consumers["consumer"] == (0, CONTENT % 1, "")
    else:
        assert any(isinstance(leaf, ConsumerLost) for leaf in leaves(played.error))
        assert "passed" not in played.program
        status, out, err = played.consumers["other"]
        assert (status, out) == (1, "")
        assert "the consumer of task 1" in err
    check_nothing_left(scene, path)
