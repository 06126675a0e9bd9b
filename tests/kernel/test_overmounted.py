"""Ghosts on a mount that another one hides: refused, or restored below it.

Through what a process of the namespace holds of the mount, or else through a private copy of the
namespace (--overmounted private).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ghostpool import _linux
from ghostpool._buildspec import MountSpec
from ghostpool._covered import _error
from ghostpool._errors import Overmounted
from ghostpool._failed import Failed
from ghostpool._planned import Policy, Strategy
from ghostpool._uncovering import UncoverWork, facts_of
from ghostpool.testing._forked import in_child
from ghostpool.testing._namespace import Namespace, enter
from tests.kernel.test_places import Outcome, directory, restore
from tests.support.imagewriter import ImageSet
from tests.support.live import live, process, read_only, run, tmpfs
from tests.support.namespaces import mountinfo

pytestmark = pytest.mark.needs_mount_ns

LOWER = read_only(2, b"/data", "own", "sub/")
COVERS = {
    "on the same mount point": (LOWER, tmpfs(3, b"/data", parent=2)),
    "writable below": (LOWER._replace(attributes=0), tmpfs(3, b"/data", parent=2)),
    "twice": (LOWER, tmpfs(3, b"/data", parent=2), tmpfs(4, b"/data", parent=3)),
    "on a directory above": (
        tmpfs(5, b"/above", nodes=(directory("/above/data"),)),
        LOWER._replace(mountpoint=b"/above/data", parent=5, nodes=()),
        tmpfs(6, b"/above", parent=5),
    ),
}


def images_on(point: str, directory_of_images: Path, covers: int = 1) -> Path:
    """Three ghosts on the lowest of the mounts on a mount point."""
    images = ImageSet()
    images.mount("/", device=(0, 60))
    images.mount(point, device=(0, 70), flags=0x200001, id=700)
    for number in range(covers):
        images.mount(point, device=(0, 71 + number), parent=700 + number, id=701 + number)
    images.task(1)
    images.open(1, 3, f"{point}/one", ghost=images.ghost(b"one"), mnt_id=700)
    images.open(1, 4, f"{point}/gone/two", ghost=images.ghost(b"two"), mnt_id=700)
    ghost = images.ghost(mode=0o40750)
    images.open(1, 5, f"{point}/dir", ghost=ghost, mnt_id=700, flags=0o300000)
    return images.write(directory_of_images)


@contextmanager
def covered(mounts: tuple[MountSpec, ...]) -> Iterator[Namespace]:
    """A namespace with these mounts, in which nothing is different after the block."""
    with live(mounts) as (target,):
        before = target.snapshot().without_directory_times()
        yield target
        assert target.snapshot().without_directory_times() == before


def point_of(mounts: tuple[MountSpec, ...]) -> str:
    return next(m.mountpoint.decode() for m in mounts if m.superblock == 2)


def lowest(target: Namespace) -> int:
    """The number of the hidden mount."""
    return next(m.mnt_id for m in target.table() if m.source == "t2")


def assert_restored(outcome: Outcome) -> None:
    assert {n: f.content for n, f in outcome.files.items()} == {3: b"one", 4: b"two", 5: b""}
    assert {f.nlink for f in outcome.files.values()} == {0}


def test_refused_by_default(tmp_path: Path) -> None:
    images = images_on("/data", tmp_path)
    with covered(COVERS["on the same mount point"]) as target:
        done = run("restore", "-D", images, "-t", target.pid, "--discard")
    assert done.status == 2, done
    assert "is hidden by mount" in done.err
    assert "--overmounted private" in done.err


@pytest.mark.parametrize("how", COVERS)
@pytest.mark.parametrize("strategy", ["remount", "detached"])
def test_private_copy(tmp_path: Path, how: str, strategy: Strategy) -> None:
    """Files on the hidden file system, by a mount that nobody sees; and the report says so."""
    mounts = COVERS[how]
    on_point = sum(m.mountpoint == b"/data" for m in mounts)
    images = images_on(point_of(mounts), tmp_path, max(0, on_point - 1))
    with covered(mounts) as target:
        policy = Policy(overmounted="private", strategy=strategy)
        outcome = restore(images, target.fd, policy=policy)
        device = next(m.device for m in target.table() if m.source == "t2")
        ids = {m.mnt_id for m in target.table()}
    assert_restored(outcome)
    assert {f.inode[0] for f in outcome.files.values()} == {device}
    assert not ids & {f.mnt_id for f in outcome.files.values()}
    assert [outcome.files[n].link for n in (3, 4, 5)] == [
        "/one (deleted)",
        "/gone/two (deleted)",
        "/dir (deleted)",
    ]
    assert any("opened on a private copy" in one for one in outcome.report["warnings"])
    (row,) = outcome.report["mounts"]
    assert row["made_writable"] == {"service": 1, "task": 0}
    assert row["reverted"] is True


def go_to(
    target: Namespace, path: str, cover: bytes = b"/data"
) -> Callable[[Callable[[], None]], object]:
    """The body of a process that has its cwd there, below what hides the mount."""

    def body(ready: Callable[[], None]) -> None:
        enter(target.fd)
        os.chdir(path)
        _linux.mount(b"cover", cover, b"tmpfs", 0)
        ready()
        while True:
            os.read(os.pipe()[0], 1)

    return body


@pytest.mark.parametrize("strategy", ["remount", "detached"])
def test_by_what_a_process_holds(tmp_path: Path, strategy: Strategy) -> None:
    """A process that was there before has its cwd on the mount: that is the mount itself."""
    images = images_on("/data", tmp_path)
    with live((LOWER,)) as (target,), process(go_to(target, "/data")):
        before = target.snapshot().without_directory_times()
        policy = Policy(overmounted="private", strategy=strategy)
        outcome = restore(images, target.fd, policy=policy)
        assert target.snapshot().without_directory_times() == before
        assert {f.mnt_id for f in outcome.files.values()} == {lowest(target)}
    assert_restored(outcome)
    assert [outcome.files[n].link for n in (3, 4, 5)] == [
        "/data/one (deleted)",
        "/data/gone/two (deleted)",
        "/data/dir (deleted)",
    ]
    assert any("reached by cwd of process" in one for one in outcome.report["warnings"])
    (row,) = outcome.report["mounts"]
    assert row["made_writable"] == {"service": 1, "task": 0}


@pytest.mark.parametrize(("cover", "itself"), [(b"/above", True), (b"/above/data", False)])
def test_by_a_directory_inside(tmp_path: Path, cover: bytes, itself: bool) -> None:
    """What is above it leads to the mount, unless the root of the mount is what is covered."""
    images = images_on("/above/data", tmp_path)
    inside = LOWER._replace(
        mountpoint=b"/above/data", parent=5, nodes=(directory("/above/data/sub"),)
    )
    with (
        live((tmpfs(5, b"/above"), inside)) as (target,),
        process(go_to(target, "/above/data/sub", cover)),
    ):
        outcome = restore(images, target.fd, policy=Policy(overmounted="private"))
        same = {f.mnt_id for f in outcome.files.values()} == {lowest(target)}
    assert_restored(outcome)
    held = any("reached by cwd of process" in one for one in outcome.report["warnings"])
    assert held is itself
    assert same or not itself


def test_plan_says_it(tmp_path: Path) -> None:
    images = images_on("/data", tmp_path)
    with covered(COVERS["on the same mount point"]) as target:
        done = run("plan", "-D", images, "-t", target.pid, "--overmounted", "private")
    assert done.status == 0, done
    assert "private copy" in done.out.replace("\n", " ")


def test_two_hidden_mounts_that_are_alike(tmp_path: Path) -> None:
    """Binds of one directory on each other: which is meant is told by how deep it lies."""
    mounts = (
        LOWER,
        tmpfs(3, b"/data", parent=2, superblock=2, source="t2"),
        tmpfs(4, b"/data", parent=3),
    )
    images = images_on("/data", tmp_path, 2)
    with covered(mounts) as target:
        outcome = restore(images, target.fd, policy=Policy(overmounted="private"))
    assert_restored(outcome)


def test_locked_covers(tmp_path: Path) -> None:
    """In a namespace of another user namespace nothing comes off: refused, with the reason."""

    def child() -> tuple[int, str]:
        own_fds = os.open("/proc/self/fd", os.O_PATH)
        enter(target.fd)
        _linux.unshare(_linux.CLONE_NEWUSER | _linux.CLONE_NEWNS)
        work = UncoverWork({}, own_fds)
        try:
            work.do_uncover([], 0, 1, chain)
        except Failed as failed:
            return failed.failure.errno, failed.failure.step
        return 0, ""

    with covered(COVERS["on the same mount point"]) as target:
        table = {m.mnt_id: m for m in mountinfo(target.fd)}
        mount = table[lowest(target)]
        chain = [facts_of(mount), facts_of(table[mount.parent])]
        code, step = in_child(child)
    assert (code, step) == (errno.EINVAL, "umount2")
    error = _error(Failed(0, code, step, b"/data", 0).failure)
    assert isinstance(error, Overmounted)
    assert "locked" in str(error)


def test_unbindable_hidden_mount(tmp_path: Path) -> None:
    """In the copy nothing is unbindable, since nothing propagates from there."""
    images = images_on("/data", tmp_path)
    mounts = (LOWER._replace(unbindable=True), tmpfs(3, b"/data", parent=2))
    with covered(mounts) as target:
        outcome = restore(images, target.fd, policy=Policy(overmounted="private"))
    assert_restored(outcome)
