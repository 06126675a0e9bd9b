"""The synchronous way in: a program without an event loop restores in a `with` block."""

# ruff: noqa: PT012  what raises at the end of a restore's block is the block

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

import ghostpool
from ghostpool._linux import close_all
from ghostpool.testing import Namespace
from tests.support.imagewriter import ghosts_on
from tests.support.live import live, read_only

pytestmark = pytest.mark.needs_mount_ns
Backend = Literal["asyncio", "trio"]
BACKENDS: tuple[Backend, ...] = ("trio", "asyncio")


@pytest.fixture
def target() -> Iterator[Namespace]:
    with live([read_only(2, b"/data")]) as (made,):
        before = made.snapshot().without_directory_times()
        yield made
        assert made.snapshot().without_directory_times() == before
        assert [one.name for one in threading.enumerate() if "portal" in one.name] == []


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return ghosts_on("/data", ["one", "two"], b"content").write(tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_with_block(target: Namespace, images: Path, backend: Backend) -> None:
    with ghostpool.run_restore(
        images, namespaces={10: target.pid}, jobs=2, backend=backend
    ) as restored:
        fds = restored.tasks[1].take_fds_nowait()
    try:
        assert {number: os.pread(fd, 99, 0) for number, fd in fds.items()} == {
            3: b"content",
            4: b"content",
        }
    finally:
        close_all(fds.values())
    assert restored.report.restored


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_come_out_as_they_do_from_restore(images: Path, backend: Backend) -> None:
    with (
        pytest.raises(ExceptionGroup) as caught,
        ghostpool.run_restore(images, namespaces={10: os.getpid()}, backend=backend),
    ):
        pytest.fail("the host's own mounts are never remounted")
    assert caught.group_contains(ghostpool.PlanError)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exception_of_the_block(target: Namespace, images: Path, backend: Backend) -> None:
    with (
        pytest.raises(ExceptionGroup) as caught,
        ghostpool.run_restore(images, namespaces={10: target.pid}, backend=backend),
    ):
        raise LookupError
    assert caught.group_contains(LookupError)


class InterruptAt:
    """Sends this process a Ctrl-C when a kind of event happens."""

    def __init__(self, kind: type[ghostpool.Event]) -> None:
        self._kind = kind

    def send_nowait(self, event: ghostpool.Event) -> None:
        if isinstance(event, self._kind):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind", [ghostpool.Planned, ghostpool.MountWritable, ghostpool.TaskArrived]
)
def test_ctrl_c_while_it_waits(
    target: Namespace, images: Path, backend: Backend, kind: type[ghostpool.Event]
) -> None:
    """It is the main thread's own, and ends the restore in the other one with it."""
    with (
        pytest.raises(KeyboardInterrupt),
        ghostpool.run_restore(
            images, namespaces={10: target.pid}, backend=backend, events=InterruptAt(kind)
        ),
    ):
        pytest.fail("it went on")


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_in_the_block(target: Namespace, images: Path, backend: Backend) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        ghostpool.run_restore(images, namespaces={10: target.pid}, backend=backend),
    ):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")
