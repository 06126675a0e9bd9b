"""The fake kernel and the real one keep the same contract, on both event loops.

Each test is run over `FakeKernel`, which the tests of the leases trust, and over `PoolMounts`
with real workers on real mounts of two namespaces: what the fake promises is what the kernel does.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from ghostpool import _linux, _mountkernel
from ghostpool._errors import WorkerDied
from ghostpool._guard import Guard
from ghostpool._launch import launch
from ghostpool._lease import MountKernel
from ghostpool._linux import Attr
from ghostpool._model import NsId
from ghostpool._mountkernel import PoolMounts
from ghostpool._pool import WorkerPool
from ghostpool._report import Report
from ghostpool._run import Request, prepared
from ghostpool._rundir import open_run_directory
from ghostpool.testing import Call, FakeKernel, Stage
from ghostpool.testing._namespace import enter
from tests.support.imagewriter import ImageSet
from tests.support.live import Live, live, process, read_only

pytestmark = [pytest.mark.anyio, pytest.mark.needs_mount_ns]

FLAGS = {
    "a": Attr.RDONLY | Attr.NOSUID | Attr.NODEV | Attr.NOSYMFOLLOW,
    "b": Attr.RDONLY | Attr.NOATIME | Attr.NODIRATIME,
    "c": Attr.RDONLY | Attr.STRICTATIME,
    "w": Attr.NOEXEC,
}
"""Mounts and how they are found: "c" lies in another namespace, "w" is writable."""


class Setting(Protocol):
    """A kernel, its mounts, and what the rest of the world may do to these."""

    kernel: MountKernel[Any]

    def mounts(self, names: str) -> list[Any]:
        """The mounts of these names, as the kernel is asked for them."""
        ...

    def attributes(self, name: str) -> int: ...

    def writer(self, name: str) -> AbstractContextManager[object]:
        """Somebody has a file of the mount open for writing during the block."""
        ...

    def unmount(self, name: str) -> None: ...

    def make_writable(self, name: str) -> None:
        """Somebody else does."""
        ...

    def losing_answers(self) -> AbstractContextManager[object]:
        """During the block changes are made, but the kernel's calls raise WorkerDied."""
        ...


class Fake:
    """The fake has no files: a writer is the EBUSY that one causes."""

    def __init__(self) -> None:
        self.kernel: FakeKernel[str] = FakeKernel(FLAGS)

    def mounts(self, names: str) -> list[str]:
        return list(names)

    def attributes(self, name: str) -> int:
        return self.kernel.flags[name]

    @contextmanager
    def writer(self, name: str) -> Iterator[None]:
        self.kernel.fail("make_read_only", name, errno.EBUSY)
        yield

    def unmount(self, name: str) -> None:
        del self.kernel.flags[name]

    def make_writable(self, name: str) -> None:
        self.kernel.flags[name] &= ~Attr.RDONLY

    @contextmanager
    def losing_answers(self) -> Iterator[None]:
        async def hook(call: Call, stage: Stage, mounts: Sequence[str]) -> None:
            if stage == "end":
                raise WorkerDied("lost")

        self.kernel.hook = hook
        yield
        self.kernel.hook = None


class Real:
    """Workers on the mounts of two live namespaces."""

    def __init__(self, kernel: PoolMounts, handles: dict[str, Any], targets: list[Live]) -> None:
        self.kernel = kernel
        self._handles = handles
        self._targets = targets

    def _target(self, name: str) -> Live:
        return self._targets[name == "c"]

    def mounts(self, names: str) -> list[Any]:
        return [self._handles[name] for name in names]

    def attributes(self, name: str) -> int:
        mountpoint = b"/" + name.encode()
        (found,) = (m for m in self._target(name).table() if m.mountpoint == mountpoint)
        return found.attributes

    @contextmanager
    def writer(self, name: str) -> Iterator[None]:
        def body(ready: Callable[[], None]) -> None:
            enter(self._target(name).fd)
            os.open(f"/{name}/keep", os.O_RDWR)
            ready()
            signal.pause()

        with process(body):
            yield

    def unmount(self, name: str) -> None:
        mountpoint = b"/" + name.encode()
        self._target(name).run(lambda: _linux.umount2(mountpoint, _linux.MNT_DETACH))

    def make_writable(self, name: str) -> None:
        def clear() -> None:
            root = os.open(f"/{name}", os.O_PATH)
            _linux.mount_setattr(root, attr_clr=int(Attr.RDONLY))

        self._target(name).run(clear)

    @contextmanager
    def losing_answers(self) -> Iterator[None]:
        original = WorkerPool.call

        async def call(*args: Any, **keywords: Any) -> Any:
            await original(*args, **keywords)
            raise WorkerDied("lost")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WorkerPool, "call", call)
            yield


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["fake", "real"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A ghost on each mount, so that a plan opens them all."""
    made = ImageSet()
    for ns in (10, 11):
        made.mount("/", ns=ns)
    for name in FLAGS:
        made.mount(f"/{name}", ns=10 + (name == "c"), flags=0x200001)
    made.task(1, ns=10)
    made.task(2, ns=11)
    for number, name in enumerate(FLAGS):
        pid = 1 + (name == "c")
        made.open(pid, 3 + number, f"/{name}/gone", ghost=made.ghost(b"content"))
    return made.write(tmp_path)


@pytest.fixture
def targets(kind: str) -> Iterator[list[Live]]:
    if kind == "fake":
        yield []
        return
    mounts = {
        name: read_only(10 + number, b"/" + name.encode(), "keep", attributes=int(flags))
        for number, (name, flags) in enumerate(FLAGS.items())
    }
    with live([mounts[name] for name in "abw"], [mounts["c"]]) as targets:
        yield targets


@pytest.fixture
def setting(
    kind: str, images: Path, targets: list[Live], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Any]:
    """A context manager with a Setting; entered by the test, in the test's own task."""
    monkeypatch.setattr(_mountkernel, "BUSY_S", 0.1)

    @asynccontextmanager
    async def real() -> AsyncIterator[Real]:
        namespaces = {NsId(10 + n): str(target.pid) for n, target in enumerate(targets)}
        request = Request(images_dir=str(images), jobs=2, namespaces=namespaces)
        async with prepared(request, launch(), Report()) as run, AsyncExitStack() as stack:
            directory = open_run_directory()
            stack.callback(os.close, directory)
            token, mounts = run.plan.token.decode(), run.plan.mounts
            guard = await stack.enter_async_context(
                Guard.running(run.server, run.pool, directory, token, mounts, run.identities)
            )
            kernel = PoolMounts(run.pool, mounts, guard)
            kernel.identities = dict(run.identities)
            names = {p.mount.mountpoint[1:].decode(): h for h, p in mounts.items()}
            assert sorted(names) == sorted(FLAGS)
            yield Real(kernel, names, targets)

    @asynccontextmanager
    async def fake() -> AsyncIterator[Fake]:
        yield Fake()

    return real if kind == "real" else fake


Enter = Callable[[], Any]
WRITABLE = {name: int(flags & ~Attr.RDONLY) for name, flags in FLAGS.items()}


def found(setting: Setting, names: str = "abcw") -> bool:
    """Whether all of these mounts are as they were found."""
    return all(setting.attributes(name) == FLAGS[name] for name in names)


async def test_changes_once_and_back(setting: Enter) -> None:
    """True for the change, False for what is writable already; only the one bit changes."""
    async with setting() as s:
        assert found(s)
        assert await s.kernel.make_writable(s.mounts("a")) == [True]
        assert s.attributes("a") == WRITABLE["a"]
        assert await s.kernel.make_writable(s.mounts("a")) == [False]
        assert s.attributes("a") == WRITABLE["a"]
        assert found(s, "bcw")
        assert await s.kernel.make_read_only(s.mounts("a")) == [None]
        assert found(s)


async def test_every_flag_survives(setting: Enter) -> None:
    async with setting() as s:
        assert await s.kernel.make_writable(s.mounts("abc")) == [True] * 3
        assert all(s.attributes(name) == WRITABLE[name] for name in "abc")
        assert await s.kernel.make_read_only(s.mounts("abc")) == [None] * 3
        assert found(s)


async def test_read_only_twice(setting: Enter) -> None:
    """Asked again, also before the first change, it has nothing to do and says so."""
    async with setting() as s:
        assert await s.kernel.make_read_only(s.mounts("ab")) == [None] * 2
        assert found(s)
        await s.kernel.make_writable(s.mounts("ab"))
        for _ in range(2):
            assert await s.kernel.make_read_only(s.mounts("ab")) == [None] * 2
            assert found(s)


async def test_again_after_a_revert(setting: Enter) -> None:
    async with setting() as s:
        for _ in range(3):
            assert await s.kernel.make_writable(s.mounts("b")) == [True]
            assert await s.kernel.make_read_only(s.mounts("b")) == [None]
            assert found(s)


async def test_writable_mount_is_left_alone(setting: Enter) -> None:
    """It is never made read-only, whether it was asked to be made writable before or not."""
    async with setting() as s:
        assert await s.kernel.make_read_only(s.mounts("w")) == [None]
        assert found(s)
        assert await s.kernel.make_writable(s.mounts("w")) == [False]
        assert await s.kernel.make_read_only(s.mounts("w")) == [None]
        assert found(s)


async def test_writable_between_two_leases(setting: Enter) -> None:
    """By somebody else, after our change was put back: it is theirs, until it is read-only."""
    async with setting() as s:
        assert await s.kernel.make_writable(s.mounts("a")) == [True]
        assert await s.kernel.make_read_only(s.mounts("a")) == [None]
        s.make_writable("a")
        assert await s.kernel.make_writable(s.mounts("a")) == [False]
        assert await s.kernel.make_read_only(s.mounts("a")) == [None]
        assert s.attributes("a") == WRITABLE["a"]
        assert found(s, "bcw")


async def test_change_whose_answer_was_lost(setting: Enter) -> None:
    """It counts as ours, also when it is asked for once more."""
    async with setting() as s:
        for again in (False, True):
            with s.losing_answers(), pytest.raises(WorkerDied, match="lost"):
                await s.kernel.make_writable(s.mounts("aw"))
            assert s.attributes("a") == WRITABLE["a"]
            if again:
                assert await s.kernel.make_writable(s.mounts("aw")) == [False] * 2
            assert await s.kernel.make_read_only(s.mounts("aw")) == [None] * 2
            assert found(s)


async def test_answers_come_in_order(setting: Enter) -> None:
    """Over two namespaces, and whatever was changed before."""
    async with setting() as s:
        assert await s.kernel.make_writable(s.mounts("b")) == [True]
        assert await s.kernel.make_writable(s.mounts("wcab")) == [False, True, True, False]
        with s.writer("a"):
            outcomes = await s.kernel.make_read_only(s.mounts("cabw"))
            assert [isinstance(outcome, Exception) for outcome in outcomes] == [0, 1, 0, 0]
        assert await s.kernel.make_read_only(s.mounts("a")) == [None]
        assert found(s)


async def test_busy_mount(setting: Enter) -> None:
    """It stays writable, with an error; the others are done; it can be put back later."""
    async with setting() as s:
        assert await s.kernel.make_writable(s.mounts("abc")) == [True] * 3
        with s.writer("b"):
            first, busy, last = await s.kernel.make_read_only(s.mounts("abc"))
            assert (first, last) == (None, None)
            assert isinstance(busy, Exception)
            assert found(s, "acw")
            assert s.attributes("b") == WRITABLE["b"]
        assert await s.kernel.make_writable(s.mounts("b")) == [False]
        assert await s.kernel.make_read_only(s.mounts("b")) == [None]
        assert found(s)


async def test_mount_that_was_taken_off(setting: Enter) -> None:
    """It can not be made writable, which says which one; the others are done."""
    async with setting() as s:
        s.unmount("b")
        first, gone, last = await s.kernel.make_writable(s.mounts("abc"))
        assert (first, last) == (True, True)
        assert isinstance(gone, OSError)
        assert gone.errno in (errno.EINVAL, errno.ENOENT, errno.ESTALE)
        assert "b" in str(gone)
        assert s.attributes("a") == WRITABLE["a"]
        assert s.attributes("c") == WRITABLE["c"]
        assert await s.kernel.make_read_only(s.mounts("ac")) == [None] * 2
        assert found(s, "acw")


async def test_mount_that_is_taken_off_while_writable(setting: Enter) -> None:
    """There is nothing to put back then, and that is no error."""
    async with setting() as s:
        assert await s.kernel.make_writable(s.mounts("abc")) == [True] * 3
        s.unmount("b")
        assert await s.kernel.make_read_only(s.mounts("abc")) == [None] * 3
        assert found(s, "acw")
