"""The task socket over a pool without a kernel: the whole dialogue, and every way to leave it."""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from ghostpool import _serve
from ghostpool._consumer import MAX_MESSAGE
from ghostpool._errors import BarrierBroken, ConsumerLost, leaves
from ghostpool._listener import Listener
from ghostpool._needs import STRANGERS
from ghostpool._serve import Stage, TaskServer
from ghostpool.testing._forked import fork
from tests.support.fakepool import FLAGS, Client, FakePool, planned
from tests.support.live import process

pytestmark = pytest.mark.anyio
POSITION = 5


async def until(condition: Callable[[], bool]) -> None:
    """Let the others work until it is true: what comes over a socket takes a turn or two."""
    while not condition():
        await anyio.lowlevel.checkpoint()


class Scene:
    """A pool, its server, and consumers that are closed at the end."""

    def __init__(self, pool: FakePool, server: TaskServer, stack: ExitStack) -> None:
        self.pool = pool
        self.server = server
        self._stack = stack

    def client(self) -> Client:
        client = Client(self.server.path)
        self._stack.callback(client.close)
        return client

    async def python(self, pid: int) -> None:
        """A task of the embedding program, which arrives at once."""
        async with self.pool.task(pid):
            pass

    async def arrived(self, *pids: int) -> None:
        """Wait until these tasks have arrived, in this order, and all that follows is done."""
        await until(lambda: len(self.pool.done("arrived")) >= len(pids))
        await anyio.wait_all_tasks_blocked()
        assert self.pool.done("arrived") == [*pids]

    async def served(self) -> None:
        """Serve to the end, and tell it as a pool does."""
        try:
            await self.server.run()
        except BaseException:
            self.server.aborted("the reason")
            raise
        self.server.released()


@pytest.fixture
def scene_of(tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    """Makes the scene of some tasks, of which some may not be served."""
    with ExitStack() as stack:
        file = stack.enter_context((tmp_path / "file").open("w+b", buffering=0))
        file.write(b"content")
        file.seek(POSITION)

        def make(*tasks: Any, **options: Any) -> Scene:
            pool = FakePool(file.fileno(), *tasks)
            listener = Listener(str(tmp_path / "socket"))
            stack.callback(listener.close)
            server = TaskServer(pool, pool.barrier, listener, **options)
            stack.callback(server.aborted, "the test has ended")
            return Scene(pool, server, stack)

        yield make


@asynccontextmanager
async def expect_loss(scene: Scene, *words: str) -> AsyncIterator[None]:
    """The block loses a consumer: the server fails for it, and no task passes."""
    caught: BaseException | None = None
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(scene.served)
            yield
            await anyio.sleep_forever()
    except BaseExceptionGroup as error:
        caught = error
    losses = [leaf for leaf in leaves(caught) if isinstance(leaf, ConsumerLost)]
    assert len(losses) == 1, losses
    for word in words:
        assert word in str(losses[0])
    others = [leaf for leaf in leaves(caught) if leaf is not losses[0]]
    assert all(isinstance(leaf, BarrierBroken) for leaf in others), others
    assert scene.pool.barrier.cause is losses[0]
    assert scene.pool.done("passed") == []


# -- The dialogue -------------------------------------------------------------------------------


async def test_nobody_is_released_before_all_have_arrived(scene_of: Callable[..., Scene]) -> None:
    """Two consumers and a task of the program itself, in one barrier; then the pool finishes."""
    scene = scene_of(planned(1, [3]), planned(2, [3, 4]), planned(3, [3]), tasks=[1, 2])
    async with anyio.create_task_group() as group:
        group.start_soon(scene.server.run)
        scene.pool.leaving = lambda pid: anyio.sleep(0.01)
        one, two = scene.client(), scene.client()
        await anyio.wait_all_tasks_blocked()
        assert scene.pool.log == []
        assert scene.server.missing() == {1: Stage.AWAITED, 2: Stage.AWAITED}

        await one.fetch(1)
        assert scene.pool.log == [("entered", 1)]
        assert scene.server.missing() == {1: Stage.FETCHING, 2: Stage.AWAITED}
        one.say({"type": "ready"})
        await scene.arrived(1)
        assert scene.server.missing() == {2: Stage.AWAITED}

        await two.fetch(2)
        two.say({"type": "ready"})
        await scene.arrived(1, 2)
        assert scene.server.missing() == {}
        assert scene.pool.done("passed") == []
        assert one.hears_nothing()
        assert two.hears_nothing()

        await scene.python(3)
    assert sorted(scene.pool.done("passed")) == [1, 2, 3]
    with pytest.raises(FileNotFoundError):
        scene.client()
    # The mounts are not back before the pool says so.
    assert one.hears_nothing()
    assert two.hears_nothing()
    scene.server.released()
    for client in (one, two):
        assert await client.hear() == {"type": "released"}
        assert await client.hear() == {}
    scene.server.aborted("too late")


async def test_what_is_said_of_a_file(scene_of: Callable[..., Scene]) -> None:
    fifo = planned(2, [7], stat.S_IFIFO | 0o600)
    path = planned(3, [8], flags=os.O_PATH)
    scene = scene_of(planned(1, [3, 4]), fifo, path)
    async with anyio.create_task_group() as group:
        group.start_soon(scene.served)
        one, two, three = (scene.client() for _ in range(3))
        assert await one.fetch(1) == [
            {"fd": 3, "flags": FLAGS, "offset": POSITION, "close_on_exec": True},
            {"fd": 4, "flags": FLAGS, "offset": POSITION, "close_on_exec": False},
        ]
        assert await two.fetch(2) == [
            {"fd": 7, "flags": FLAGS, "offset": None, "close_on_exec": True}
        ]
        assert await three.fetch(3) == [
            {"fd": 8, "flags": os.O_PATH, "offset": None, "close_on_exec": False}
        ]
        for client in (one, two, three):
            client.say({"type": "ready"})


async def test_files_come_in_batches(scene_of: Callable[..., Scene]) -> None:
    scene = scene_of(planned(1, range(3, 603)))
    async with anyio.create_task_group() as group:
        group.start_soon(scene.served)
        client = scene.client()
        client.hello(1)
        for count, more in ((250, True), (250, True), (100, False)):
            message = await client.hear()
            assert (message["descriptors"], len(message["files"])) == (count, count)
            assert message["more"] is more
        client.say({"type": "ready"})
        assert await client.hear() == {"type": "released"}


async def test_task_without_files_is_waited_for_by_nobody(scene_of: Callable[..., Scene]) -> None:
    scene = scene_of(planned(1, []), planned(2, [3]))
    assert scene.server.awaited == 1
    async with anyio.create_task_group() as group:
        group.start_soon(scene.served)
        await scene.arrived(1)
        one, two = scene.client(), scene.client()
        assert await one.fetch(1) == []
        await two.fetch(2)
        two.say({"type": "ready"})
        assert await two.hear() == {"type": "released"}
        assert await one.hear() == {"type": "released"}


async def test_nothing_to_serve(scene_of: Callable[..., Scene]) -> None:
    for tasks in ((), (planned(1, []),)):
        scene = scene_of(*tasks)
        await scene.served()
        assert scene.pool.barrier.passed


async def test_only_some_tasks(scene_of: Callable[..., Scene]) -> None:
    with pytest.raises(RuntimeError, match="no tasks of the images: 4, 5"):
        scene_of(planned(1, [3]), tasks=[1, 4, 5])


# -- Refused, which breaks nothing --------------------------------------------------------------

REFUSALS: list[tuple[str, object]] = [
    ("speaks version 1", {"type": "hello", "version": 2, "task": 1}),
    ("speaks version 1", {"type": "hello", "version": True, "task": 1}),
    ("speaks version 1", {"type": "hello", "task": 1}),
    ("expects hello", {"type": "ready"}),
    ("expects hello", {}),
    ("no task 9 here, but 1, 2", {"type": "hello", "version": 1, "task": 9}),
    ("no task True here", {"type": "hello", "version": 1, "task": True}),
    ("no task None here", {"type": "hello", "version": 1}),
    ("no task [", {"type": "hello", "version": 1, "task": [1] * 1000}),
    ("no JSON", b"\xff\xfe"),
    ("no JSON", b"[" * MAX_MESSAGE),
    ("no JSON object", b"7"),
    (f"more than {MAX_MESSAGE} bytes", b" " * (MAX_MESSAGE + 1)),
    ("task 2 has another consumer", {"type": "hello", "version": 1, "task": 2}),
]


@pytest.mark.parametrize(("word", "message"), REFUSALS)
async def test_refused_hello(scene_of: Callable[..., Scene], word: str, message: object) -> None:
    scene = scene_of(planned(1, [3]), planned(2, [3]))
    async with anyio.create_task_group() as group:
        group.start_soon(scene.served)
        one, two = scene.client(), scene.client()
        await two.fetch(2)
        refused = scene.client()
        refused.say(message)
        refused.say(b"what nobody reads does not take the answer away")
        answer = await refused.hear()
        assert (answer["type"], answer["refused"]) == ("abort", True)
        assert word in answer["reason"]
        assert await refused.hear() == {}
        for pid, client in ((1, one), (2, two)):
            if pid == 1:
                await client.fetch(pid)
            client.say({"type": "ready"})
        for client in (one, two):
            assert await client.hear() == {"type": "released"}


async def test_whoever_goes_before_hello_breaks_nothing(scene_of: Callable[..., Scene]) -> None:
    scene = scene_of(planned(1, [3]))
    async with anyio.create_task_group() as group:
        group.start_soon(scene.served)
        scene.client().close()
        aborts = scene.client()
        aborts.say({"type": "abort", "reason": "changed my mind"})
        await aborts.hear()
        client = scene.client()
        await client.fetch(1)
        client.say({"type": "ready"})
        assert await client.hear() == {"type": "released"}


async def test_flood_of_connections(scene_of: Callable[..., Scene]) -> None:
    """The oldest that say nothing go first, and whoever says hello is served."""
    scene = scene_of(planned(1, [3]))
    async with anyio.create_task_group() as group:
        group.start_soon(scene.served)
        silent = []
        for _ in range(8 * STRANGERS):
            silent.append(scene.client())
            await anyio.lowlevel.checkpoint()
        client = scene.client()
        await client.fetch(1)
        assert len(scene.server._strangers) <= STRANGERS
        answer = await silent[0].hear()
        assert (answer["reason"], answer["refused"]) == ("too many connections", True)
        client.say({"type": "ready"})
        assert await client.hear() == {"type": "released"}
        assert (await silent[-1].hear())["reason"] == "this restore is over"


async def test_hello_has_a_time_limit(
    scene_of: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the hello's alone: whoever has said it may take as long as it likes."""
    monkeypatch.setattr(_serve, "HELLO_S", 0.05)
    scene = scene_of(planned(1, [3]))
    async with anyio.create_task_group() as group:
        group.start_soon(scene.served)
        late, client = scene.client(), scene.client()
        await client.fetch(1)
        answer = await late.hear()
        assert (answer["type"], answer["refused"]) == ("abort", True)
        assert answer["reason"] == "no hello within 0.05 s"
        client.say({"type": "ready"})
        assert await client.hear() == {"type": "released"}


async def test_descriptors_of_a_consumer_are_not_taken(scene_of: Callable[..., Scene]) -> None:
    scene = scene_of(planned(1, [3]))
    async with anyio.create_task_group() as group:
        group.start_soon(scene.served)
        client = scene.client()
        await client.fetch(1)
        before = os.listdir("/proc/self/fd")
        socket.send_fds(client.socket, [b'{"type": "ready"}'], [0] * 200)
        await anyio.wait_all_tasks_blocked()
        assert len(os.listdir("/proc/self/fd")) <= len(before)
        assert await client.hear() == {"type": "released"}


# -- Lost, which breaks the barrier -------------------------------------------------------------


def closes(client: Client) -> None:
    client.close()


def stops_talking(client: Client) -> None:
    client.socket.shutdown(socket.SHUT_WR)


def says(message: object, client: Client) -> None:
    client.say(message)


ABORT = {"type": "abort", "reason": "no space"}
WAYS: dict[str, tuple[Callable[[Client], None], str]] = {
    "closes": (closes, "closed the connection"),
    "stops talking": (stops_talking, "closed the connection"),
    "aborts": (partial(says, ABORT), "aborted (no space)"),
    "aborts oddly": (partial(says, {"type": "abort", "reason": ["\ud800"]}), "aborted (['"),
    "says hello again": (
        partial(says, {"type": "hello", "version": 1, "task": 1}),
        "said 'hello' out of turn",
    ),
    "talks nonsense": (partial(says, b"\xff"), "no JSON"),
    "talks too much": (partial(says, b" " * (MAX_MESSAGE + 1)), "more than"),
}
POINTS = ("while its files are opened", "with its files", "while it waits")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("point", POINTS)
async def test_lost_consumer(scene_of: Callable[..., Scene], point: str, way: str) -> None:
    """Everybody else is told, the reason with it: who waits, who fetches, and the program."""
    leave, said = WAYS[way]
    scene = scene_of(planned(1, [3]), planned(2, [3]), planned(3, [3]), planned(4, [3]))

    async def program() -> None:
        with pytest.raises(BarrierBroken, match="ConsumerLost") as caught:
            await scene.python(4)
        assert isinstance(caught.value.__cause__, ConsumerLost)

    scene.server = TaskServer(
        scene.pool, scene.pool.barrier, scene.server._listener, tasks=[1, 2, 3]
    )
    one, two, three = (scene.client() for _ in range(3))

    async def opening(pid: int) -> None:
        if pid == 1 and point == POINTS[0]:
            await anyio.sleep_forever()

    scene.pool.opening = opening
    async with anyio.create_task_group() as outer:
        outer.start_soon(program)
        async with expect_loss(scene, "consumer of task 1", said):
            await two.fetch(2)
            two.say({"type": "ready"})
            await three.fetch(3)
            if point == POINTS[0]:
                one.hello(1)
            else:
                await one.fetch(1)
            if point == POINTS[2]:
                one.say({"type": "ready"})
            await scene.arrived(*([4, 2, 1] if point == POINTS[2] else [4, 2]))
            await until(lambda: 1 in scene.pool.done("entered"))
            leave(one)
    for client in (two, three):
        answer = await client.hear()
        assert answer == {"type": "abort", "reason": "the reason", "refused": False}
        assert await client.hear() == {}


@pytest.mark.parametrize("way", ["ready at once", "ready twice"])
async def test_ready_out_of_turn(scene_of: Callable[..., Scene], way: str) -> None:
    scene = scene_of(planned(1, [3]), planned(2, [3]))
    if way == "ready at once":
        scene.pool.opening = lambda pid: anyio.sleep_forever()
    async with expect_loss(scene, "said 'ready' out of turn"):
        client = scene.client()
        if way == "ready at once":
            client.hello(1)
        else:
            await client.fetch(1)
            client.say({"type": "ready"})
        client.say({"type": "ready"})


async def test_lost_while_it_is_sent_files(scene_of: Callable[..., Scene]) -> None:
    """It takes nothing, so that the server waits for it; nobody else does."""
    scene = scene_of(planned(1, range(3, 5003)), planned(2, [3]))
    slow, other = scene.client(), scene.client()
    async with expect_loss(scene, "consumer of task 1", "closed"):
        slow.hello(1)
        await other.fetch(2)
        other.say({"type": "ready"})
        await scene.arrived(2)
        assert not scene.server._consumers[1].sent
        slow.close()
    assert (await other.hear())["reason"] == "the reason"


async def test_guest_of_a_task_without_files(scene_of: Callable[..., Scene]) -> None:
    """Nobody waits for it; but while it is there, it takes part."""
    scene = scene_of(planned(1, []), planned(2, [3]))
    async with expect_loss(scene, "consumer of task 1"):
        client = scene.client()
        await client.fetch(1)
        client.close()


async def test_lost_after_the_barrier(scene_of: Callable[..., Scene]) -> None:
    scene = scene_of(planned(1, [3]), planned(2, [3]))
    async with anyio.create_task_group() as group:
        group.start_soon(scene.server.run)
        one, two = scene.client(), scene.client()
        for pid, client in ((1, one), (2, two)):
            await client.fetch(pid)
            client.say({"type": "ready"})
    one.close()
    scene.server.released()
    assert await two.hear() == {"type": "released"}


async def test_lost_in_the_moment_of_passing(scene_of: Callable[..., Scene]) -> None:
    """All have arrived, and it closes before its own block was left: that breaks nothing."""
    scene = scene_of(planned(1, [3]), planned(2, [3]), tasks=[1])
    async with anyio.create_task_group() as group:
        group.start_soon(scene.served)
        client = scene.client()
        await client.fetch(1)
        client.say({"type": "ready"})
        await scene.arrived(1)
        client.close()
        await scene.python(2)  # arrives before the end of the connection is seen
    assert sorted(scene.pool.done("passed")) == [1, 2]


@contextmanager
def consumer_process(path: str, *, holder: bool) -> Iterator[int]:
    """A process that says hello for task 1; with a `holder`, a child of it holds on to the socket.

    The child ends when the block does.
    """
    here, there = os.pipe()

    def body(ready: Callable[[], None]) -> None:
        client = Client(path)
        os.close(there)
        if holder and fork() == 0:
            for fd in {int(name) for name in os.listdir("/proc/self/fd")}:
                if fd not in (here, client.socket.fileno()):
                    os.closerange(fd, fd + 1)
            os.read(here, 1)
            os._exit(0)
        client.hello(1)
        ready()
        signal.pause()

    try:
        with process(body) as pid:
            yield pid
    finally:
        os.close(here)
        os.close(there)


@pytest.mark.parametrize("holder", [False, True])
async def test_killed_consumer(scene_of: Callable[..., Scene], holder: bool) -> None:
    """Its death is seen, even if a child of it still holds the connection open."""
    scene = scene_of(planned(1, [3]), planned(2, [3]))
    other = scene.client()
    with consumer_process(scene.server.path, holder=holder) as pid:
        said = "ended" if holder else ""
        async with expect_loss(scene, f"task 1 (process {pid})", said):
            await other.fetch(2)
            other.say({"type": "ready"})
            await scene.arrived(2)
            os.kill(pid, signal.SIGKILL)
    assert (await other.hear())["reason"] == "the reason"


def say_hello_and_die(path: str) -> None:
    """Before anybody listens to it."""
    pid = fork()
    if pid == 0:
        Client(path).hello(1)
        os._exit(0)
    os.waitpid(pid, 0)


async def test_death_before_the_hello_is_heard(scene_of: Callable[..., Scene]) -> None:
    """What it has said it has said: a task may be half begun somewhere."""
    scene = scene_of(planned(1, [3]), planned(2, [3]))
    say_hello_and_die(scene.server.path)
    async with expect_loss(scene, "consumer of task 1"):
        await until(lambda: scene.server.missing()[1] is Stage.FETCHING)


# -- The others fail ----------------------------------------------------------------------------


async def test_program_fails_while_consumers_fetch(scene_of: Callable[..., Scene]) -> None:
    """The server ends by itself, though its own consumers are all well."""
    scene = scene_of(planned(1, [3]), planned(2, [3]), tasks=[1])
    client = scene.client()
    cause = ZeroDivisionError()
    caught: BaseException | None = None
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(scene.served)
            await client.fetch(1)
            try:
                async with scene.pool.task(2):
                    raise cause
            except ZeroDivisionError:
                await anyio.sleep_forever()
    except BaseExceptionGroup as error:
        caught = error
    assert caught is not None
    assert all(isinstance(leaf, BarrierBroken) for leaf in leaves(caught))
    assert scene.pool.barrier.cause is cause
    assert await client.hear() == {"type": "abort", "reason": "the reason", "refused": False}


async def test_cancelled_server_knows_who_is_missing(scene_of: Callable[..., Scene]) -> None:
    scene = scene_of(*(planned(pid, [3]) for pid in range(1, 20)))
    one, two, stranger = scene.client(), scene.client(), scene.client()
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(scene.served)
            await one.fetch(1)
            one.say({"type": "ready"})
            await two.fetch(2)
            await scene.arrived(1)
            await until(lambda: len(scene.server._strangers) == 1)
            scope.cancel()
    assert scope.cancelled_caught
    assert scene.server.missing() == {
        2: Stage.FETCHING,
        **dict.fromkeys(range(3, 20), Stage.AWAITED),
    }
    assert scene.server.why_missing() == (
        "nobody has said hello for tasks 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 7 more; "
        "the consumer has not said ready for task 2"
    )
    for client in (one, two):
        assert (await client.hear())["reason"] == "the reason"
    assert (await stranger.hear())["reason"] == "this restore is over"
    with pytest.raises(FileNotFoundError):
        scene.client()


async def test_repr(scene_of: Callable[..., Scene]) -> None:
    scene = scene_of(planned(1, [3]), planned(2, []))
    where = scene.server.path
    assert repr(scene.server) == f"<TaskServer on {where}, 2 tasks, 2 missing, 0 consumers>"
