"""A coordinator that is killed at any of its steps: the guardian puts everything back.

The number of the step runs over all calls to children that a restore makes.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ghostpool import _linux
from ghostpool.testing._targets import built
from tests.kernel.test_steps import CASE, IDS, names
from tests.support.corpus import CORPUS, corpus
from tests.support.crash import Whom, children, coordinate, journals, own_paths, wait_for
from tests.support.imagewriter import ghosts_on
from tests.support.live import Live, live, read_only
from tests.support.live import run as command
from tests.support.namespaces import inside, mountinfo
from tests.support.truth import specs_from_truth

pytestmark = [pytest.mark.long, pytest.mark.needs_mount_ns]
IMAGES = CORPUS / CASE / "images"


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[int]]:
    _, truth = corpus(CASE)
    with built(specs_from_truth(truth)) as fds:
        yield fds


def look(fds: list[int]) -> list[object]:
    return [(mountinfo(fd), inside(fd, names)) for fd in fds]


@pytest.mark.parametrize("whom", ["coordinator", "all but the guardian"])
def test_killed_at_each_step(namespaces: list[int], whom: Whom) -> None:
    """With all but the guardian, the fork server and the workers die too.

    A sample of the steps: tests/kernel/test_matrix.py goes through them all.
    """
    before = look(namespaces)
    where = own_paths(dict(zip(IDS, namespaces, strict=True)))
    done = coordinate(IMAGES, where)
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    assert steps >= 30
    undone = 0
    for step in range(4, steps, 3):
        when = ("before", "after")[step % 2]
        done = coordinate(IMAGES, where, step, when=when, whom=whom)  # type: ignore[arg-type]
        if done.returncode == 0 and int(done.stdout) <= step:
            continue  # what is settled may be told in fewer calls, so this run had no such step
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert wait_for(lambda: look(namespaces) == before), (step, when)
        assert wait_for(lambda: not children()), (step, when)
        assert journals() == [], (step, when)
        undone += "the run ended abruptly" in done.stderr
    # Most steps lie between the first change and the last.
    assert undone >= 3


# -- A small scene to be disturbed --------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> Iterator[tuple[Path, Live]]:
    made = ghosts_on("/data", (f"d/gone-{number}" for number in range(12)), b"content")
    with live([read_only(2, b"/data", "d/", "keep")]) as (target,):
        yield made.write(tmp_path), target


EXCHANGE = """
fd = os.open(where[0].partition("=")[2].replace("ns/mnt", "root/data"), os.O_RDONLY)
os.rename("d", "aside", src_dir_fd=fd, dst_dir_fd=fd)
os.symlink("aside", "d", dir_fd=fd)
"""


def test_nobody_can_hold_a_mount_writable_by_its_names(many: tuple[Path, Live]) -> None:
    """A parent that is exchanged for a link is waited for, but the mount is put back before."""
    images, target = many
    seen: list[bool] = []

    def look_often() -> None:
        while not done.is_set():
            seen.append(target.is_writable(b"/data"))
            time.sleep(0.02)

    done = threading.Event()
    where = {10: f"/proc/{target.pid}/ns/mnt"}
    watcher = threading.Thread(target=look_often)
    watcher.start()
    try:
        # Its stderr is the guardian's too, so this returns when that has ended.
        run = coordinate(
            images, where, 0, kind="make_writable", whom="coordinator", meanwhile=EXCHANGE
        )
    finally:
        done.set()
        watcher.join()
    assert run.returncode == -signal.SIGKILL
    assert "not yet: 12: run ghostpool recover" in run.stderr
    assert len(seen) >= 20  # it still waits for the names when the mount is back
    assert seen[-20:] == [False] * 20

    def back() -> None:
        os.unlink("/data/d")
        os.rename("/data/aside", "/data/d")

    target.run(lambda: _writable_for(back))
    recovered = command("recover")
    assert recovered.status == 0, recovered
    assert not target.is_writable(b"/data")
    assert target.run(lambda: os.listdir("/data/d")) == []
    assert journals() == []


def _writable_for(function: Callable[[], None]) -> None:
    fd = os.open("/data", os.O_PATH)
    _linux.mount_setattr(fd, attr_clr=int(_linux.Attr.RDONLY))
    function()
    _linux.mount_setattr(fd, attr_set=int(_linux.Attr.RDONLY))


def test_nobody_reads_what_the_guardian_says(many: tuple[Path, Live]) -> None:
    """Its stderr is a pipe that is full: it undoes everything and ends."""
    images, target = many
    reader, writer = os.pipe()
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writer, bytes(4096))
        where = {10: str(target.pid)}
        coordinate(images, where, 0, kind="make_writable", whom="coordinator", stderr=writer)
        assert wait_for(lambda: not children())
    finally:
        os.close(reader)
        os.close(writer)
    assert not target.is_writable(b"/data")
    assert journals() == []


def test_fork_server_killed(many: tuple[Path, Live]) -> None:
    """The coordinator has nobody left to undo anything; the guardian does it."""
    images, target = many
    run = coordinate(images, {10: str(target.pid)}, 0, kind="make_writable", whom="fork server")
    assert run.returncode == 1  # of the library's caller, with its traceback
    assert "RevertError" in run.stderr
    assert wait_for(lambda: not children())
    assert not target.is_writable(b"/data")
    assert target.run(lambda: os.listdir("/data/d")) == []
    assert journals() == []


def test_guardian_killed_at_each_step(namespaces: list[int]) -> None:
    """The restore fails, or was past its last change; the coordinator undoes it and tidies up."""
    before = look(namespaces)
    where = own_paths(dict(zip(IDS, namespaces, strict=True)))
    steps = int(coordinate(IMAGES, where).stdout)
    failed = 0
    for step in range(4, steps, 5):
        when = ("before", "after")[step % 2]
        done = coordinate(IMAGES, where, step, when=when, whom="guardian")  # type: ignore[arg-type]
        assert done.returncode in (0, 1), done.stderr
        failed += done.returncode
        assert look(namespaces) == before, (step, when)
        assert wait_for(lambda: not children()), (step, when)
        assert journals() == [], (step, when)
    assert failed >= 2
