"""Refusals of the command: one clear line, exit status 2, in time, and nothing was touched.

"Nothing" is the mount table byte for byte and every file of every mount, with the times of the
directories: a file that was made and removed again would show. The host's mount namespace is
played by a private one, in which the command itself runs.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest

from ghostpool import _linux
from ghostpool._buildspec import MountSpec, Node
from ghostpool._linux import Attr
from ghostpool._planned import Strategy
from ghostpool.testing import Snapshot
from ghostpool.testing._forked import in_child
from ghostpool.testing._namespace import enter
from ghostpool.testing._snapshot import walk
from tests.support.imagewriter import O_RDWR, ImageSet
from tests.support.live import (
    Live,
    Run,
    assert_refused,
    command,
    live,
    process,
    read_only,
    run,
    run_argv,
    tmpfs,
)

pytestmark = [pytest.mark.long, pytest.mark.needs_mount_ns]

DATA = read_only(2, b"/data", "sub/", "sub/keep", "other/")


def one_task(*, mounts: tuple[str, ...] = ("/data",), **options: Any) -> ImageSet:
    """A task in a namespace with a root and read-only mounts."""
    made = ImageSet(**options)
    made.mount("/")
    for mountpoint in mounts:
        made.mount(mountpoint, flags=0x200001)
    made.task(1)
    return made


def one_ghost(**ghost: Any) -> ImageSet:
    """A task that holds one ghost in /data/sub."""
    made = one_task()
    made.open(1, 3, "/data/sub/gone", ghost=made.ghost(b"content", **ghost))
    return made


def restore(images: Path, target: Live, *options: str | int) -> Run:
    return run("restore", "-D", images, "-t", target.pid, "--discard", *options)


def refuse(
    images: Path, mounts: tuple[MountSpec, ...], *words: str, options: tuple[str, ...] = ()
) -> None:
    """A restore into a target with these mounts is refused with a line that has the words.

    By both strategies: what rules a restore out does not depend on them.
    """
    with live(mounts) as (target,):
        before = target.snapshot()
        assert before.files  # else the comparison says nothing
        for strategy in get_args(Strategy):
            done = restore(images, target, "--strategy", strategy, *options)
            assert_refused(done, [before], [target], *words)


def test_what_is_refused_below_is_restored_here(tmp_path: Path) -> None:
    """The images and the target of these tests are good, and a restore does leave its traces."""
    images = one_ghost().write(tmp_path)
    with live([DATA]) as (target,):
        before = target.snapshot()
        done = restore(images, target)
        assert (done.status, done.err) == (0, "")
        after = target.snapshot()
    assert after != before
    assert after.without_directory_times() == before.without_directory_times()


# -- Mounts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fstype", ["proc", "tmpfs"])
def test_mount_hidden_by_one_on_its_mount_point(tmp_path: Path, fstype: str) -> None:
    """Also by one that looks like it, so that nobody can tell which of them is meant."""
    options = "" if fstype == "proc" else "mode=755"
    mounts = (DATA, tmpfs(3, b"/data", parent=2, fstype=fstype, options=options))
    refuse(one_ghost().write(tmp_path), mounts, "/data/sub/gone", "/data", "hidden")


@pytest.mark.parametrize("names", [(), ("data/",)], ids=["empty", "with a directory of the name"])
def test_mount_hidden_by_one_on_an_ancestor(tmp_path: Path, names: tuple[str, ...]) -> None:
    made = one_task(mounts=("/a/data",))
    made.open(1, 3, "/a/data/gone", ghost=made.ghost(b"content"))
    mounts = (
        read_only(2, b"/a/data", "keep"),
        read_only(3, b"/a", *names, attributes=0),
    )
    refuse(made.write(tmp_path), mounts, "/a/data", "hid")


def test_mount_over_the_directory_of_the_ghost(tmp_path: Path) -> None:
    mounts = (DATA, tmpfs(3, b"/data/sub", parent=2))
    refuse(one_ghost().write(tmp_path), mounts, "/data/sub/gone", "/data/sub is hidden")


def stacked(on_top: bool) -> ImageSet:
    """Images with two mounts on /data and a ghost on the upper or the lower one."""
    made = ImageSet()
    made.mount("/")
    lower = made.mount("/data", flags=0x200001)
    upper = made.mount("/data", flags=0x200001, parent=lower, device=(0, 67))
    made.task(1)
    mount = upper if on_top else lower
    made.open(1, 3, "/data/gone", ghost=made.ghost(b"content"), mnt_id=mount)
    return made


STACK = (read_only(2, b"/data", "lower"), read_only(3, b"/data", "upper", parent=2))


def test_lower_mount_of_a_stack(tmp_path: Path) -> None:
    refuse(stacked(on_top=False).write(tmp_path), STACK, "/data/gone", "hidden")


def test_visible_top_of_a_stack_is_no_refusal(tmp_path: Path) -> None:
    """And the ghost goes to the upper mount, not to the lower."""
    images = stacked(on_top=True).write(tmp_path)
    with live(STACK) as (target,):
        before = target.snapshot()
        done = restore(images, target)
        assert (done.status, done.err) == (0, "")
        after = target.snapshot()
    assert after.without_directory_times() == before.without_directory_times()
    changed = {path for path, entry in after.files.items() if entry != before.files[path]}
    assert changed == {"2:/data"}
    assert "2:/data/upper" in after.files


def test_read_only_superblock(tmp_path: Path) -> None:
    mounts = (DATA._replace(read_only_superblock=True),)
    words = ("/data/sub/gone", "superblock", "/data", "read-only")
    refuse(one_ghost().write(tmp_path), mounts, *words)


def test_read_only_superblock_under_a_writable_mount(tmp_path: Path) -> None:
    mounts = (DATA._replace(read_only_superblock=True, attributes=0),)
    refuse(one_ghost().write(tmp_path), mounts, "superblock", "/data", "read-only")


def test_missing_mount(tmp_path: Path) -> None:
    words = ("/data/sub/gone", "nothing is mounted on /data")
    refuse(one_ghost().write(tmp_path), (tmpfs(2, b"/elsewhere"),), *words)


def test_symbolic_link_in_place_of_a_directory(tmp_path: Path) -> None:
    link = Node(b"/data/sub", stat.S_IFLNK | 0o777, target=b"other")
    other = Node(b"/data/other", stat.S_IFDIR | 0o755)
    mounts = (tmpfs(2, b"/data", attributes=int(Attr.RDONLY), nodes=(other, link)),)
    refuse(one_ghost().write(tmp_path), mounts, "/data/sub", "symbolic link")


def test_file_in_place_of_a_directory(tmp_path: Path) -> None:
    words = ("/data/sub", os.strerror(errno.ENOTDIR))
    refuse(one_ghost().write(tmp_path), (read_only(2, b"/data", "sub"),), *words)


# -- The host's own namespace -------------------------------------------------------------------


def on_host(images: Path, mountpoint: Path, attributes: Attr) -> tuple[Run, bool, bool]:
    """A run whose target is the namespace it runs in, with a tmpfs on `mountpoint`.

    Also whether its mounts, and the files on that mount, are as before.
    """

    def child() -> tuple[Any, ...]:
        _linux.unshare(_linux.CLONE_NEWNS)
        _linux.mount(None, b"/", None, _linux.MS_REC | _linux.MS_PRIVATE)
        point = os.fsencode(mountpoint)
        _linux.mount(b"data", point, b"tmpfs", 0)
        (mountpoint / "sub").mkdir()
        fd = os.open(point, os.O_PATH)
        _linux.mount_setattr(fd, attr_set=attributes)
        os.close(fd)

        def state() -> tuple[bytes, dict[str, Any]]:
            found: dict[str, Any] = {}
            walk(found, "", point)
            return Path("/proc/self/mountinfo").read_bytes(), found

        before = state()
        done = run("restore", "-D", images, "-t", os.getpid(), "--discard")
        after = state()
        return tuple(done), before[0] == after[0], before[1] == after[1]

    done, same_mounts, same_files = in_child(child)
    return Run(*done), same_mounts, same_files


def host_images(tmp_path: Path) -> tuple[Path, Path]:
    mountpoint = tmp_path / "data"
    mountpoint.mkdir()
    made = one_task(mounts=(str(mountpoint),))
    made.open(1, 3, f"{mountpoint}/sub/gone", ghost=made.ghost(b"content"))
    return made.write(tmp_path / "images"), mountpoint


def test_read_only_mount_of_the_host(tmp_path: Path) -> None:
    images, mountpoint = host_images(tmp_path)
    done, same_mounts, same_files = on_host(images, mountpoint, Attr.RDONLY)
    assert_refused(done, [], [], str(mountpoint), "read-only", "host's mount namespace")
    assert same_mounts
    assert same_files


def test_writable_mount_of_the_host_is_no_refusal(tmp_path: Path) -> None:
    images, mountpoint = host_images(tmp_path)
    done, same_mounts, same_files = on_host(images, mountpoint, Attr.NODEV)
    assert (done.status, done.err) == (0, "")
    assert same_mounts
    assert not same_files  # the directory's times: it was worked in


# -- Targets ------------------------------------------------------------------------------------


def two_namespaces(tmp_path: Path) -> Path:
    made = ImageSet()
    for number in (10, 11):
        made.mount("/", ns=number)
        made.mount("/data", ns=number, flags=0x200001)
    made.task(1, ns=10)
    made.task(2, ns=11)
    for pid in (1, 2):
        made.open(pid, 3, "/data/sub/gone", ghost=made.ghost(b"content"))
    return made.write(tmp_path)


def refuse_target(images: Path, options: Callable[[Live], list[str]], *words: str) -> None:
    with live([DATA]) as (target,):
        before = target.snapshot()
        done = run("restore", "-D", images, "--discard", *options(target))
        assert_refused(done, [before], [target], *words)


def test_unknown_namespace_id(tmp_path: Path) -> None:
    images = one_ghost().write(tmp_path)
    refuse_target(images, lambda target: ["--ns", f"99={target.pid}"], "99", "10")


def test_namespace_without_a_target(tmp_path: Path) -> None:
    images = two_namespaces(tmp_path)
    refuse_target(images, lambda target: ["-t", f"{target.pid}"], "11", "--ns 11=")
    refuse_target(images, lambda target: ["--ns", f"11={target.pid}"], "10", "--ns 10=")


def test_dead_pid(tmp_path: Path) -> None:
    images = one_ghost().write(tmp_path)
    with subprocess.Popen(["true"]) as ended:
        pass
    refuse_target(images, lambda _: ["-t", f"{ended.pid}"], f"{ended.pid}", "no process")
    refuse_target(images, lambda _: ["--ns", f"10={ended.pid}"], f"{ended.pid}", "no process")


def test_zombie(tmp_path: Path) -> None:
    images = one_ghost().write(tmp_path)
    with subprocess.Popen(["true"]) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        refuse_target(images, lambda _: ["-t", f"{zombie.pid}"], f"pid {zombie.pid}")


def test_path_that_is_no_mount_namespace(tmp_path: Path) -> None:
    images = one_ghost().write(tmp_path / "images")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "file").write_text("text")
    for path in (f"{fifo}", f"{tmp_path}/file", f"{tmp_path}", "/proc/self/ns/net"):
        options = ["--ns", f"10={path}"]
        refuse_target(images, lambda _: options, path, "not a mount namespace")  # noqa: B023
    missing = f"{tmp_path}/missing"
    refuse_target(images, lambda _: ["--ns", f"10={missing}"], missing, "No such file")


def test_option_that_is_no_target(tmp_path: Path) -> None:
    images = one_ghost().write(tmp_path)
    refuse_target(images, lambda _: ["--ns", "ten=1"], "'ten=1'", "ID=PID")


@contextmanager
def in_user_namespace(target: Live) -> Iterator[Live]:
    """A process in a copy of the target's mounts that belongs to a new user namespace."""

    def body(ready: Callable[[], None]) -> None:
        proc = os.open("/proc/self", os.O_PATH)
        enter(target.fd)
        _linux.unshare(_linux.CLONE_NEWUSER | _linux.CLONE_NEWNS)
        for name, text in ("setgroups", b"deny"), ("uid_map", b"0 0 1"), ("gid_map", b"0 0 1"):
            fd = os.open(name, os.O_WRONLY, dir_fd=proc)
            os.write(fd, text)
            os.close(fd)
        ready()
        while True:
            signal.pause()

    with process(body) as pid:
        fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
        try:
            yield Live(pid, fd)
        finally:
            os.close(fd)


def test_locked_mount_of_another_user_namespace(tmp_path: Path) -> None:
    """The read-only flag came along with a copy: nobody may clear it there."""
    images = one_ghost().write(tmp_path)
    with live([DATA]) as (outer,), in_user_namespace(outer) as target:
        before = [outer.snapshot(), target.snapshot()]
        done = restore(images, target)
        assert_refused(done, before, [outer, target], f"{target.pid}", "another user namespace")


# -- Ghosts and their holders -------------------------------------------------------------------


def ghost_device() -> ImageSet:
    made = one_task()
    ghost = made.ghost(mode=stat.S_IFCHR | 0o600, rdev=os.makedev(1, 3))
    made.open(1, 3, "/data/sub/gone", ghost=ghost)
    return made


def link_remap() -> ImageSet:
    made = one_task()
    made.link(made.open(1, 3, "/data/sub/gone"), "/data/sub")
    return made


def mapping() -> ImageSet:
    made = one_ghost()
    reg = made.reg("/data/sub/mapped", size=4096)
    made.remap(reg, made.ghost(bytes(4096)))
    made.map(1, 0x10000, 0x11000, reg)
    return made


def opened_for_writing() -> ImageSet:
    made = one_task()
    made.open(1, 3, "/data/sub/gone", ghost=made.ghost(b"content"), flags=O_RDWR)
    return made


GHOSTS: list[tuple[Callable[[], ImageSet], tuple[str, ...]]] = [
    (ghost_device, ("/data/sub/gone", "1:3", "--allow-devices")),
    (lambda: one_ghost(mode=0o104755), ("/data/sub/gone", "4755", "--allow-setuid")),
    (lambda: one_ghost(mode=0o102755), ("/data/sub/gone", "2755", "--allow-setuid")),
    (link_remap, ("/data/sub/gone", "link remap", "is not there on /data")),
    (opened_for_writing, ("/data/sub/gone", "writing", "/data is read-only")),
]
GHOST_IDS = ["device", "setuid", "setgid", "link", "writing"]


@pytest.mark.parametrize(("make", "words"), GHOSTS, ids=GHOST_IDS)
def test_what_needs_an_option_or_a_later_version(
    tmp_path: Path, make: Callable[[], ImageSet], words: tuple[str, ...]
) -> None:
    refuse(make().write(tmp_path), (DATA,), *words)


def test_the_first_of_several_refusals_tells_how_many_more(tmp_path: Path) -> None:
    made = one_ghost(mode=0o104755)
    made.open(1, 4, "/data/sub/gone-2", ghost=made.ghost(b"x", mode=0o102755))
    made.open(1, 5, "/data/sub/gone-3", ghost=made.ghost(b"x"))
    refuse(made.write(tmp_path), (DATA,), "/data/sub/gone (", "1 more", "ghostpool plan")


def test_more_files_than_descriptors(tmp_path: Path) -> None:
    made = one_task()
    ghost = made.ghost(b"content")
    for number in range(150):
        made.open(1, 3 + number, f"/data/sub/gone-{number}", ghost=ghost)
    images = made.write(tmp_path)
    with live([DATA]) as (target,):
        before = target.snapshot()
        argv = command("restore", "-D", images, "-t", target.pid, "--discard")
        done = run_argv(["sh", "-c", 'ulimit -n 170; exec "$@"', "sh", *argv])
        assert_refused(done, [before], [target], "150 files", "descriptors", "170", "ulimit")


# -- Images -------------------------------------------------------------------------------------


def chunked() -> ImageSet:
    """Two ghosts, one of them in chunks, in two tasks."""
    made = one_ghost(uid=7)
    made.task(2)
    chunks = [(0, b"A" * 4096), (1 << 20, b"B" * 4096)]
    made.open(2, 5, "/data/sub/sparse", ghost=made.ghost(chunks=chunks, size=2 << 20))
    return made


@pytest.fixture(scope="module")
def _target() -> Iterator[Live]:
    with live([DATA]) as (target,):
        yield target


@pytest.fixture
def target(_target: Live) -> tuple[Live, Snapshot]:
    """A target, the same for all tests of this part, and what it was like before this one."""
    return _target, _target.snapshot()


IMAGES = sorted(chunked().images())
# Without these a task holds no more than its descriptors, which is no contradiction in itself;
# see test_missing_image_of_a_mapping.
OPTIONAL = ("fs-", "mm-")


def test_images_directory_is_missing(tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    done = restore(tmp_path / "missing", target[0])
    assert_refused(done, [target[1]], [target[0]], f"{tmp_path}/missing", "No such file")


def test_images_directory_is_a_file(tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    (tmp_path / "file").write_text("text")
    done = restore(tmp_path / "file", target[0])
    assert_refused(done, [target[1]], [target[0]], f"{tmp_path}/file", "no tar archive")


def test_images_directory_is_empty(tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    assert_refused(restore(tmp_path, target[0]), [target[1]], [target[0]], "inventory.img")


def refuse_each(target: tuple[Live, Snapshot], cases: dict[Path, tuple[str, ...]]) -> None:
    """Every directory of images is refused with its words; several runs at a time."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        runs = list(pool.map(lambda images: restore(images, target[0]), cases))
    for done, words in zip(runs, cases.values(), strict=True):
        assert_refused(done, [], [], *words)
    assert target[0].snapshot() == target[1]


def test_missing_image(tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    cases: dict[Path, tuple[str, ...]] = {}
    for name in IMAGES:
        if not name.startswith(OPTIONAL):
            images = chunked().write(tmp_path / name)
            (images / name).unlink()
            cases[images] = (name,)
    assert len(cases) == 13
    refuse_each(target, cases)


def test_missing_image_of_a_mapping(tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    """The ghost that it held is held by nobody now: something is missing."""
    images = mapping().write(tmp_path)
    (images / "mm-1.img").unlink()
    assert_refused(restore(images, target[0]), [target[1]], [target[0]], "-1.img", "is missing")


def test_image_cut_in_the_middle(tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    """In the middle of a record, or of the content of a ghost."""
    cases: dict[Path, tuple[str, ...]] = {}
    for name in IMAGES:
        images = chunked().write(tmp_path / name)
        os.truncate(images / name, (images / name).stat().st_size - 3)
        cases[images] = (name,)
    refuse_each(target, cases)


def test_ghost_cut_anywhere(tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    """In its head, its length, its description, a chunk's description, a chunk's content."""
    name = "ghost-file-2.img"
    cases: dict[Path, tuple[str, ...]] = {}
    for offset in (0, 3, 8, 10, 20, -4097, -5000):
        images = chunked().write(tmp_path / f"{offset}")
        os.truncate(images / name, offset + (images / name).stat().st_size * (offset < 0))
        cases[images] = (name,)
    refuse_each(target, cases)


def test_image_cut_at_a_record_boundary(tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    """Something else refers to what is missing then."""
    cases: dict[Path, tuple[str, ...]] = {}
    for name, word in (
        ("files.img", "files.img"),
        ("remap-fpath.img", "ghost-file-2.img"),
        ("mountpoints-10.img", "mountpoints-10.img"),
        ("pstree.img", "pstree.img"),
        ("ghost-file-1.img", "ghost-file-1.img"),
    ):
        made = chunked()
        parts = made.images()
        parts[name] = parts[name][:-1]
        cases[made.write(tmp_path / name, parts)] = (word,)
    refuse_each(target, cases)


def test_table_of_descriptors_cut_to_nothing(tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    """An empty table is no contradiction, but the ghost that nobody holds now is not forgotten."""
    made = one_ghost()
    parts = made.images()
    parts["fdinfo-101.img"] = []
    done = restore(made.write(tmp_path, parts), target[0])
    assert_refused(done, [target[1]], [target[0]], "/data/sub/gone", "holds it")


def test_warnings_add_no_line_to_a_refusal(tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    made = one_ghost(mode=0o104755)
    made.open_fifo(1, 4, "/data/sub/fifo", ghost=made.ghost(mode=stat.S_IFIFO | 0o600))
    made.fifo_data(77, b"waiting", size=1 << 31)
    images = made.write(tmp_path)
    assert_refused(restore(images, target[0]), [target[1]], [target[0]], "--allow-setuid")
    done = restore(images, target[0], "--allow-setuid")
    assert done.status == 0
    assert "/data/sub/fifo: its pipe held up to" in done.err


def test_report_of_a_refusal(tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    """The JSON report is written, and says the same."""
    images = one_ghost(mode=0o104755).write(tmp_path / "images")
    report = tmp_path / "report.json"
    done = restore(images, target[0], "--report", str(report))
    assert_refused(done, [target[1]], [target[0]], "--allow-setuid")
    document = json.loads(report.read_text())
    assert "--allow-setuid" in json.dumps(document["errors"])
