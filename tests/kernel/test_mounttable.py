"""The mount table of a process, read by whoever wants to know: what `MountTable` finds in it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ghostpool import LiveMount, MountTable, NamespaceNotFound, _linux
from tests.support.live import Live, live, process, read_only, tmpfs

pytestmark = pytest.mark.needs_mount_ns


@pytest.fixture
def target() -> Iterator[Live]:
    mounts = [read_only(2, b"/data"), tmpfs(3, b"/data/deep"), tmpfs(4, b"/with space")]
    with live(mounts) as (one,):
        yield one


def test_every_line_of_a_process(target: Live) -> None:
    table = MountTable.of_process(target.pid)
    assert sorted(table) == sorted(target.table())
    assert len(table) == 4
    (data,) = table.stack(b"/data")
    assert data.read_only
    assert data.options()[0] == "ro"
    assert table.with_id(data.mnt_id) == data
    assert table.stack(b"/with space")[0].mountpoint == b"/with space"
    assert table.stack(b"/nothing") == []
    assert table.with_id(0) is None


def test_which_mount_holds_a_path(target: Live) -> None:
    table = MountTable.of_process(target.pid)

    def holding(path: bytes) -> bytes | None:
        found = table.containing(path)
        return found and found.mountpoint

    assert holding(b"/data/file") == b"/data"
    assert holding(b"/data/deep") == b"/data/deep"
    assert holding(b"/data/deep/er/still") == b"/data/deep"
    assert holding(b"/database") == b"/"
    assert MountTable(b"").containing(b"/data") is None


def test_the_top_of_a_stack_comes_last(target: Live) -> None:
    target.run(lambda: _linux.mount(b"over", b"/data", b"tmpfs", 0))
    bottom, top = MountTable.of_process(target.pid).stack(b"/data")
    assert isinstance(top, LiveMount)
    assert (bottom.source, top.source) == ("t2", "over")
    assert top.parent == bottom.mnt_id
    assert not top.read_only


def test_it_stays_as_it_was_read(target: Live) -> None:
    table = MountTable.of_process(target.pid)
    target.run(lambda: _linux.umount2(b"/with space", 0))
    assert len(table.stack(b"/with space")) == 1
    assert MountTable.of_process(target.pid).stack(b"/with space") == []


def test_no_such_process() -> None:
    highest = int(Path("/proc/sys/kernel/pid_max").read_text())
    with pytest.raises(NamespaceNotFound, match=f"no process has pid {highest}"):
        MountTable.of_process(highest)


def test_a_process_that_has_ended() -> None:
    """Nobody has waited for it, so its pid is still there; its mounts are not."""

    def body(ready: Callable[[], None]) -> None:
        ready()
        os.kill(os.getpid(), signal.SIGKILL)

    with process(body) as pid:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(NamespaceNotFound, match=f"mount table of pid {pid}: Invalid argument"):
            MountTable.of_process(pid)
