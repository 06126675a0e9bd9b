"""Hostile containers: every attack for a moment, and single moments of them on purpose.

`python -m tests.attackers --seconds 60` is the long form. What an attack does at one moment of
many is done here at exactly that moment, in the process of the test itself.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from ghostpool import _creating, _deliver, _removing, _run
from ghostpool._creating import CreateWork
from ghostpool._directories import Directories
from ghostpool._errors import VerificationError
from ghostpool._failed import Failed, Mismatch
from ghostpool._launch import launch
from ghostpool._needs import Consumers
from ghostpool._opening import OpenWork
from ghostpool._pool import WorkerPool
from ghostpool._protocol import REMOVED, CreateOp, OpenOp, PlaceOp, RemoveOp
from ghostpool._removing import RemoveWork
from ghostpool._report import Report
from tests.attackers.arena import GHOSTS, Canary, Result, _wrong, arena, run
from tests.attackers.attacks import ATTACKS
from tests.support.imagewriter import ghosts_on
from tests.support.live import live, read_only
from tests.support.operations import opening_of
from tests.support.restore import ghostpool

pytestmark = pytest.mark.needs_mount_ns
SECONDS = 0.5
LONG_SECONDS = 6.0


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack(attack: str) -> None:
    check(run(attack, SECONDS))


@pytest.mark.long
@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_for_longer(attack: str) -> None:
    check(run(attack, LONG_SECONDS))


def check(result: Result) -> None:
    assert result.violations == []
    assert result.restores >= 1
    assert result.blows >= 1


# -- The referee ---------------------------------------------------------------------------------


def test_the_canary_notices_everything(tmp_path: Path) -> None:
    canary = Canary(tmp_path)
    alpha = tmp_path / "sub/alpha"
    touches: list[Callable[[], object]] = [
        lambda: os.close(os.open(alpha, os.O_RDONLY)),
        lambda: os.close(os.open(tmp_path / "sub", os.O_RDONLY)),
        lambda: os.chmod(alpha, 0o600),
        lambda: os.utime(alpha),
        lambda: os.link(alpha, tmp_path / "sub/more"),
        lambda: os.unlink(tmp_path / "sub/more"),
        lambda: os.mkdir(tmp_path / "gone/more"),
        lambda: alpha.rename(tmp_path / "sub/other"),
    ]
    try:
        assert canary.events() == []
        for touch in touches:
            touch()
            assert canary.events() != [], touch
        assert canary.changes() != []
    finally:
        canary.close()


def test_the_referee_sees_what_is_left_and_what_is_wrong(tmp_path: Path) -> None:
    result = Result("none")
    with arena() as field:
        for name in (".ghostpool-left", "sub/alpha"):
            path = f"/proc/{field.place.first}/root{field.place.rw}/{name}"
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
        assert field.is_read_only()
        field.look_for_leftovers(result)
    found = {line.split(":")[0] for line in result.violations}
    assert found == {"left behind", "left behind at its old name"}
    file = tmp_path / "file"
    file.write_bytes(b"content")
    os.chown(file, 7, 8)
    fd = os.open(file, os.O_RDONLY)
    mode = file.stat().st_mode
    assert _wrong(fd, "file", mode, b"content") == []
    assert _wrong(fd, "file", mode, b"another") != []
    assert _wrong(fd, "file", mode ^ 0o100, b"content") != []
    os.close(fd)


# -- Single moments ------------------------------------------------------------------------------


class Bench:
    """A worker's parts in this process, with `path` as mount 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mounts = {0: os.open(path, os.O_PATH | os.O_DIRECTORY)}
        self.own_fds = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY)
        self.directories = Directories(self.mounts)
        self.creating = CreateWork(self.directories, self.own_fds)
        self.opening = OpenWork(self.directories, self.own_fds)
        self.removing = RemoveWork(self.directories)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    path = tmp_path / "mount"
    path.mkdir()
    made = Bench(path)
    yield made
    made.directories.forget()
    os.close(made.mounts[0])
    os.close(made.own_fds)


def creation(kind: int, name: bytes = b".ghostpool-1") -> CreateOp:
    return CreateOp(0, b"", name, kind | 0o777, 7, 8, None, 0, b"to", b"", 0, ())


def swap_after(
    monkeypatch: pytest.MonkeyPatch, module: Any, call: str, swap: Callable[[], None]
) -> None:
    """Have `swap` done right after the first call of os.`call`."""
    original = getattr(os, call)
    done: list[bool] = []

    def swapping(*args: Any, **keywords: Any) -> Any:
        result = original(*args, **keywords)
        if not done:
            done.append(True)
            swap()
        return result

    monkeypatch.setattr(module.os, call, swapping)


OLD_NS = 1_600_000_000 * 10**9


@pytest.mark.parametrize(
    ("kind", "call", "made"),
    [
        (stat.S_IFDIR, "mkdir", "old"),
        (stat.S_IFDIR, "mkdir", "open"),
        (stat.S_IFIFO, "mknod", "old"),
        (stat.S_IFIFO, "mknod", "open"),
        (stat.S_IFLNK, "symlink", "old"),
    ],
)
def test_what_was_moved_there_keeps_its_owner(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: int, call: str, made: str
) -> None:
    """A file of root that a task of the container has moved to the temporary's name."""
    other = bench.path / "of-root"
    {"mkdir": other.mkdir, "mknod": lambda: os.mkfifo(other)}.get(
        call, lambda: other.symlink_to("x")
    )()
    if made == "old":
        os.utime(other, ns=(OLD_NS, OLD_NS), follow_symlinks=False)
        if call != "symlink":
            other.chmod(0o700)
    else:
        other.chmod(0o755)

    def swap() -> None:
        (bench.path / ".ghostpool-1").rename(bench.path / "aside")
        other.rename(bench.path / ".ghostpool-1")
        held.append(os.open(bench.path / ".ghostpool-1", os.O_PATH | os.O_NOFOLLOW))

    held: list[int] = []
    swap_after(monkeypatch, _creating, call, swap)
    with pytest.raises(Mismatch, match="identity of the new file"):
        bench.creating._create(creation(kind))
    status = os.fstat(held[0])
    os.close(held[0])
    assert (status.st_uid, status.st_gid) == (0, 0)


@pytest.mark.parametrize("kind", [stat.S_IFDIR, stat.S_IFIFO, stat.S_IFLNK])
def test_what_is_new_is_taken_for_new(bench: Bench, kind: int) -> None:
    """In directories with a default ACL's worth of bits too: setgid, sticky."""
    bench.path.chmod(0o3777)
    bench.creating.do_create([], [tuple(creation(kind))], -1)
    status = (bench.path / ".ghostpool-1").lstat()
    assert (stat.S_IFMT(status.st_mode), status.st_uid, status.st_gid) == (kind, 7, 8)
    assert stat.S_IMODE(status.st_mode) == 0o777


def test_what_was_moved_there_is_not_moved_on(bench: Bench) -> None:
    """A directory of somebody else has a directory ghost's temporary name: it keeps its own."""
    ours, theirs = bench.path / ".ghostpool-1", bench.path / "theirs"
    ours.mkdir()
    status = ours.stat()
    operation = PlaceOp(
        0, b"", b".ghostpool-1", (b"parent",), (b"name",), status.st_dev, status.st_ino
    )
    ours.rename(bench.path / "aside")
    theirs.mkdir()
    theirs.rename(ours)
    with pytest.raises(Mismatch, match="temporary name"):
        bench.creating._place(operation)
    assert sorted(os.listdir(bench.path)) == [".ghostpool-1", "aside"]
    ours.rename(theirs)
    (bench.path / "aside").rename(ours)
    bench.creating._place(operation)
    assert os.listdir(bench.path / "parent") == ["name"]


def linking(temporary: Path, *, move: bool) -> OpenOp:
    """Open a ghost that has only its temporary name so far, by giving it its old one."""
    opening = opening_of(temporary)
    return opening._replace(temp_name=temporary.name.encode(), names=(b"name",), move=move)


@pytest.mark.parametrize("move", [False, True])
def test_a_file_that_has_the_name_by_now_is_not_unlinked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, move: bool
) -> None:
    """A program of the container writes its file anew, by rename, between open and unlink."""
    temporary = bench.path / ".ghostpool-1"
    temporary.write_bytes(b"ghost")
    anew = bench.path / "anew"
    anew.write_bytes(b"anew")
    name = bench.path / "name"
    original = OpenWork._open_checked

    def checked(self: OpenWork, *args: Any) -> int:
        fd = original(self, *args)
        anew.rename(name)
        return fd

    monkeypatch.setattr(OpenWork, "_open_checked", checked)
    out: list[int] = []
    bench.opening._open(linking(temporary, move=move), out)
    assert os.read(out[0], 10) == b"ghost"
    os.close(out[0])
    assert name.read_bytes() == b"anew"


@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("decoy", ["file", "symlink", "fifo", "directory"])
def test_a_temporary_that_was_exchanged_leaves_no_link(
    bench: Bench, decoy: str, move: bool
) -> None:
    """The old name was another file's, which keeps its own one. One that was moved stays there:
    nobody can tell it from a file that was put there since."""
    temporary = bench.path / ".ghostpool-1"
    temporary.write_bytes(b"ghost")
    operation = linking(temporary, move=move)
    temporary.rename(bench.path / "aside")
    if decoy == "file":
        temporary.write_bytes(b"decoy")
    elif decoy == "fifo":
        os.mkfifo(temporary)
    elif decoy == "directory":
        temporary.mkdir()
    else:
        temporary.symlink_to("/etc/passwd")
    with pytest.raises((Mismatch, OSError)):
        bench.opening._open(operation, [])
    assert sorted(os.listdir(bench.path)) == sorted(["name" if move else ".ghostpool-1", "aside"])


@pytest.mark.parametrize("move", [False, True])
def test_a_file_that_has_the_name_too_soon_is_left_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, move: bool
) -> None:
    """A program of the container writes its file anew before the ghost is opened."""
    temporary, anew = bench.path / ".ghostpool-1", bench.path / "anew"
    temporary.write_bytes(b"ghost")
    anew.write_bytes(b"anew")
    original = OpenWork._open_checked

    def checked(self: OpenWork, *args: Any) -> int:
        anew.rename(bench.path / "name")
        return original(self, *args)

    monkeypatch.setattr(OpenWork, "_open_checked", checked)
    with pytest.raises(Mismatch, match="identity"):
        bench.opening._open(linking(temporary, move=move), [])
    assert (bench.path / "name").read_bytes() == b"anew"


def test_a_link_that_somebody_else_makes_is_noticed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that nobody takes, too: what the worker closes has a name that it should not."""
    temporary = bench.path / ".ghostpool-1"
    temporary.write_bytes(b"ghost")
    operation = linking(temporary, move=True)
    original = OpenWork._open_checked

    def checked(self: OpenWork, *args: Any) -> int:
        os.link(bench.path / "name", bench.path / "stolen")
        return original(self, *args)

    monkeypatch.setattr(OpenWork, "_open_checked", checked)
    out: list[int] = []
    before = os.listdir("/proc/self/fd")
    with pytest.raises(Failed) as caught:  # noqa: PT011  it carries a failure, and no text
        bench.opening.do_open_discarded(out, [tuple(operation)])
    assert (caught.value.failure.at, caught.value.failure.errno) == (0, 0)
    assert caught.value.failure.step == "number of names: another process has given it 1"
    assert out == []
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert os.listdir(bench.path) == ["stolen"]


@pytest.mark.parametrize("consumers", [None, "nobody"])
def test_a_ghost_that_was_linked_fails_the_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, consumers: Consumers | None
) -> None:
    """Held or discarded: a program that finds its temporary name keeps its link, and is told of."""
    images = ghosts_on("/data", ["gone"], b"content").write(tmp_path)
    original = WorkerPool.call

    def steal() -> None:
        (temporary,) = (name for name in os.listdir("/data") if name.startswith(".ghostpool-"))
        os.link(f"/data/{temporary}", "/data/stolen")

    async def call(self: WorkerPool, slot: int, name: str, *args: Any, **keywords: Any) -> Any:
        if name in ("open", "open_discarded"):
            target.run(steal)
        return await original(self, slot, name, *args, **keywords)

    monkeypatch.setattr(WorkerPool, "call", call)
    with live([read_only(2, b"/data", "keep")]) as (target,):
        request = _run.Request(str(images), 1, tree=target.pid, consumers=consumers)

        async def story() -> None:
            await _run.run_restore(request, launch(), Report(), _deliver.discard)

        with pytest.raises(VerificationError, match="another process has"):
            anyio.run(story, backend="trio")
        assert sorted(target.run(lambda: os.listdir("/data"))) == ["keep", "stolen"]
        assert not target.is_writable(b"/data")


def removal(directory: bytes, name: bytes, status: os.stat_result) -> RemoveOp:
    times = (OLD_NS, OLD_NS) if stat.S_ISDIR(status.st_mode) else None
    return RemoveOp(0, directory, name, status.st_dev, status.st_ino, (), times)


def test_undoing_waits_for_a_parent_that_is_exchanged(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = bench.path / "parent"
    parent.mkdir()
    (parent / "name").write_bytes(b"")
    operation = removal(b"parent", b"name", (parent / "name").stat())
    parent.rename(bench.path / "aside")
    parent.symlink_to("/")
    slept = []

    def sleep(_: float) -> None:
        slept.append(True)
        if len(slept) == 3:
            parent.unlink()
            (bench.path / "aside").rename(parent)

    monkeypatch.setattr(time, "sleep", sleep)
    assert bench.removing.do_remove([], [tuple(operation)]) == [(0, "", (), REMOVED)]
    assert os.listdir(parent) == []
    assert len(slept) == 3


def test_undoing_does_not_wait_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One second for all names together, not for each."""
    (bench.path / "parent").symlink_to("/")
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    operation = removal(b"parent", b"etc", os.stat("/etc"))
    answers = bench.removing.do_remove([], [tuple(operation)] * 50)
    assert [answer[:2] for answer in answers] == [(errno.ELOOP, "openat2")] * 50
    assert sum(slept) == pytest.approx(1.0)


def test_the_times_of_another_directory_stay(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the place of ours after the identity was looked at, and is not empty."""
    ours, theirs = bench.path / "ours", bench.path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    (theirs / "inside").touch()
    before = theirs.stat().st_mtime_ns
    operation = removal(b"", b"ours", ours.stat())

    def swap() -> None:
        ours.rename(bench.path / "aside")
        theirs.rename(ours)

    swap_after(monkeypatch, _removing, "stat", swap)
    bench.removing.do_remove([], [tuple(operation)])
    assert ours.stat().st_mtime_ns == before
    assert (ours / "inside").exists()


# -- Every path, as the kernel was given it -------------------------------------------------------

NAME_CALLS = {
    "linkat",
    "unlinkat",
    "mkdirat",
    "mknodat",
    "renameat2",
    "symlinkat",
    "openat",
    "newfstatat",
    "fchmodat",
    "fchownat",
    "utimensat",
}
OPENED = "RESOLVE_NO_XDEV|RESOLVE_NO_MAGICLINKS|RESOLVE_NO_SYMLINKS|RESOLVE_BENEATH"
FOUND = "RESOLVE_NO_MAGICLINKS|RESOLVE_NO_SYMLINKS"
CALL = re.compile(r"(\d+) +(\w+)\((.*)")
TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')


@pytest.mark.needs_strace
def test_every_path_of_a_worker(tmp_path: Path) -> None:
    """Inside a container a worker gives the kernel single names, paths that can not leave their
    mount, and mount points once, when it looks for them; and it executes nothing."""
    log = tmp_path / "log"
    tracer = ("strace", "-f", "-o", log, "-s", "4096", "-e", "trace=%file,setns,linkat,execve")
    with arena() as field:
        arguments = ("restore", "-D", field._images, "-t", field.place.first, "--discard")
        done = ghostpool(*arguments, prefix=[*map(str, tracer)])
        assert done.returncode == 0, done.stderr
        mountpoint = str(field.place.mnt)
    inside: set[int] = set()
    seen: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        match = CALL.match(line)
        if match is None:
            continue
        pid, call, arguments_given = int(match[1]), match[2], match[3]
        if call == "setns":
            inside.add(pid)
        if pid not in inside or call == "setns":
            continue
        if call == "statmount" or call.startswith("syscall_"):
            continue  # by number; this strace does not know it
        seen[call] += 1
        paths = TEXT.findall(arguments_given)
        if call == "openat2" and arguments_given.startswith("AT_FDCWD"):
            assert paths == [mountpoint], line
            assert f"resolve={FOUND}" in arguments_given, line
        elif call == "openat2":
            assert not paths[0].startswith("/"), line
            assert f"resolve={OPENED}" in arguments_given, line
        elif call in ("statx", "open_tree", "mount_setattr", "statfs"):
            assert paths == [""], line
        elif paths == ["../mountinfo"]:
            assert call == "openat", line
        else:
            assert call in NAME_CALLS, line
            assert "AT_FDCWD" not in arguments_given, line
            # A symbolic link's target is no path that anybody goes.
            names = paths[1:] if call == "symlinkat" else paths
            assert not any("/" in name or name in (".", "..") for name in names), line
    assert seen["openat2"] > len(GHOSTS)
    # Each has one open: the directory and all others are moved to their old names.
    assert (seen["renameat2"], seen["linkat"]) == (len(GHOSTS), 0)
    assert seen["execve"] == 0
