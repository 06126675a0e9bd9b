"""`ghostpool recover`: what a run and its guardian left when both were killed.

Every test kills everything at once, at a chosen call, and then has the command (or the next
restore) put things back. What is compared is the kernel's own word: mount tables, and every file.
"""

from __future__ import annotations

import binascii
import itertools
import json
import marshal
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ghostpool import _linux
from ghostpool._buildspec import Node
from ghostpool._journal import MAGIC, Journal, JournalNamespace
from ghostpool._linux import Attr
from ghostpool._namespaces import find_namespaces
from ghostpool.testing import Snapshot
from ghostpool.testing._namespace import enter
from ghostpool.testing._targets import built
from tests.kernel.test_guardian import IMAGES, look
from tests.kernel.test_steps import CASE, IDS
from tests.support.corpus import corpus
from tests.support.crash import children, coordinate, journals, own_paths, run_directory, wait_for
from tests.support.imagewriter import ImageSet, ghosts_on
from tests.support.live import Live, Run, live, process, read_only, run, tmpfs
from tests.support.namespaces import mountinfo
from tests.support.truth import specs_from_truth

pytestmark = [pytest.mark.long, pytest.mark.needs_mount_ns]
ATTRIBUTES = int(Attr.RDONLY | Attr.NOSUID | Attr.NODEV)


@pytest.fixture(autouse=True)
def _no_journal_stays() -> Iterator[None]:
    assert journals() == []
    yield
    left = journals()
    for name in left:
        (run_directory() / name).unlink()
    assert left == []


# -- At each step -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[int]]:
    _, truth = corpus(CASE)
    with built(specs_from_truth(truth)) as fds:
        yield fds


def test_everything_killed_at_each_step(namespaces: list[int]) -> None:
    """Coordinator, fork server, workers and guardian: the journal is what is left."""
    before = look(namespaces)
    where = own_paths(dict(zip(IDS, namespaces, strict=True)))
    steps = int(coordinate(IMAGES, where).stdout)
    changed = kept = 0
    for step in range(4, steps, 5):
        when = ("before", "after")[step % 2]
        done = coordinate(IMAGES, where, step, when=when)  # type: ignore[arg-type]
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert wait_for(lambda: not children()), (step, when)
        left = look(namespaces)
        if left != before:
            changed += 1
            assert len(journals()) == 1, (step, when)
            if changed % 3 == 1:
                looked = run("recover", "--dry-run")
                assert (looked.status, look(namespaces)) == (0, left), looked
        kept += bool(journals())
        recovered = run("recover")
        assert recovered.status == 0, (step, when, recovered)
        assert look(namespaces) == before, (step, when)
        assert journals() == [], (step, when)
    assert changed >= 3
    assert kept >= changed


# -- A small scene to be disturbed --------------------------------------------------------------


def images(directory: Path) -> Path:
    made = ImageSet()
    made.mount("/")
    made.mount("/data", flags=0x200001)
    made.mount("/other", flags=0x200001)
    made.task(1)
    made.open(1, 3, "/data/d/gone", ghost=made.ghost(b"content"))
    made.open(1, 4, "/data/d/a/b/gone", ghost=made.ghost(b"more"))
    made.open(1, 5, "/other/gone", ghost=made.ghost(b"other"))
    return made.write(directory)


MOUNTS = (
    read_only(2, b"/data", "d/", "keep", attributes=ATTRIBUTES),
    read_only(3, b"/other", "keep"),
)


class Scene:
    """A target, and a run that died in it."""

    def __init__(self, target: Live, directory: Path) -> None:
        self.target = target
        self.images = directory
        self.before = self.look()

    def look(self) -> Snapshot:
        return self.target.snapshot().without_directory_times()

    def crash(self, kind: str = "make_writable", **options: Any) -> None:
        """Kill everything right after the first call of a kind: mounts are writable, say."""
        done = coordinate(self.images, {10: str(self.target.pid)}, 0, kind=kind, **options)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert wait_for(lambda: not children())
        assert len(journals()) == 1

    def temporaries(self) -> list[str]:
        files = [path.rpartition("/")[2] for path in self.look().files]
        return [name for name in files if name.startswith(".ghostpool-")]

    def assert_as_before(self) -> None:
        now = self.look()
        assert now.mountinfo == self.before.mountinfo
        assert now.files == self.before.files


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with live(MOUNTS) as (target,):
        yield Scene(target, images(tmp_path / "images"))


def recovered(*options: str) -> Run:
    done = run("recover", *options)
    assert (done.status, done.err) == (0, ""), done
    return done


def test_says_what_it_did(scene: Scene) -> None:
    scene.crash()
    assert scene.target.is_writable(b"/data")
    assert len(scene.temporaries()) == 3
    done = recovered()
    first, *lines = done.out.splitlines()
    assert first.endswith(": recovered")
    assert sum("/data in mnt:[" in line and line.endswith(": read-only again") for line in lines)
    assert sum(".ghostpool-" in line and line.endswith(": removed") for line in lines) == 3
    scene.assert_as_before()
    assert recovered().out == "nothing to recover\n"


def test_json(scene: Scene) -> None:
    scene.crash()
    token = journals()[0].removesuffix(".journal")
    document = json.loads(recovered("--json", "--dry-run").out)
    assert document["schema"] == 1
    (found,) = document["runs"]
    assert (found["run"], found["state"], found["refused"]) == (token, "recovered", [])
    assert len(found["done"]) >= 5
    assert json.loads(recovered("--json").out)["runs"][0]["run"] == token
    assert json.loads(recovered("--json").out)["runs"] == []
    scene.assert_as_before()


@pytest.mark.parametrize("kind", ["create", "make_writable", "open", "make_read_only", "settle"])
@pytest.mark.parametrize("mount_setattr", [True, False])
def test_the_next_restore_does_it_first(scene: Scene, kind: str, mount_setattr: bool) -> None:
    scene.crash(kind, mount_setattr=mount_setattr)
    done = run("restore", "-D", scene.images, "-t", scene.target.pid, "--discard")
    assert done.status == 0, done
    if kind != "settle":
        assert "left by run " in done.err
    scene.assert_as_before()
    assert journals() == []


def test_a_plan_leaves_it_alone(scene: Scene) -> None:
    """It changes nothing: not what another run left, either."""
    scene.crash()
    left = scene.look()
    done = run("plan", "-D", scene.images, "-t", scene.target.pid)
    assert done.status == 0
    assert scene.look() == left
    recovered()


def test_kept_names_of_a_dead_run(scene: Scene) -> None:
    """Until the run succeeds, a name that was to be kept is one that is owed."""
    scene.crash("open", keep=True)
    recovered()
    scene.assert_as_before()


# -- What others did meanwhile ------------------------------------------------------------------


def attributes(target: Live, mountpoint: bytes, *, add: int = 0, clear: int = 0) -> None:
    def change() -> None:
        fd = os.open(mountpoint, os.O_PATH)
        _linux.mount_setattr(fd, attr_set=add, attr_clr=clear)

    target.run(change)


def test_changed_options_are_left_alone(scene: Scene) -> None:
    scene.crash()
    attributes(scene.target, b"/data", add=int(Attr.NOEXEC))
    left = run("recover")
    assert left.status == 3, left
    (line,) = [line for line in left.out.splitlines() if "changed its options" in line]
    assert "noexec" in line
    assert scene.target.is_writable(b"/data")
    assert not scene.target.is_writable(b"/other")  # the others are done
    assert scene.temporaries() == []
    assert len(journals()) == 1
    attributes(scene.target, b"/data", clear=int(Attr.NOEXEC))
    recovered()
    scene.assert_as_before()


def test_put_back_by_hand(scene: Scene) -> None:
    """Who made it read-only, with whatever options, has done the job."""
    scene.crash()
    attributes(scene.target, b"/data", add=int(Attr.RDONLY | Attr.NOEXEC))
    recovered()
    assert not scene.target.is_writable(b"/data")
    attributes(scene.target, b"/data", clear=int(Attr.NOEXEC))
    scene.assert_as_before()


def test_mount_that_was_taken_off(scene: Scene) -> None:
    """Nor is the one touched that stands in its place now, and looks the same."""
    scene.crash()

    def exchange() -> None:
        _linux.umount2(b"/data", _linux.MNT_DETACH)
        flags = _linux.MS_NOSUID | _linux.MS_NODEV
        _linux.mount(b"t2", b"/data", b"tmpfs", flags)

    scene.target.run(exchange)
    done = recovered()
    assert "/data" in done.out
    assert "taken off" in done.out
    assert scene.target.is_writable(b"/data")
    assert not scene.target.is_writable(b"/other")


def test_hidden_mount(scene: Scene) -> None:
    """No path leads to it: it is left, and done when it can be reached again."""
    scene.crash()
    scene.target.run(lambda: _linux.mount(b"over", b"/data", b"tmpfs", 0))
    left = run("recover")
    assert left.status == 3, left
    assert "hides it" in left.out
    scene.target.run(lambda: _linux.umount2(b"/data", 0))
    recovered()
    scene.assert_as_before()


def test_moved_mount(scene: Scene) -> None:
    """It is found by its number, not by its path."""
    scene.crash()

    def move(source: bytes, target: bytes) -> Callable[[], None]:
        def child() -> None:
            os.makedirs(target, exist_ok=True)
            fd = _linux.open_tree(_linux.AT_FDCWD, source)
            _linux.move_mount(fd, _linux.AT_FDCWD, target)

        return child

    scene.target.run(move(b"/data", b"/elsewhere"))
    recovered()
    scene.target.run(move(b"/elsewhere", b"/data"))
    scene.target.run(lambda: os.rmdir("/elsewhere"))
    lines = scene.look().mountinfo.splitlines()
    assert sorted(lines) == sorted(scene.before.mountinfo.splitlines())
    assert scene.temporaries() == []


@pytest.mark.parametrize("how", ["renamed", "removed"])
def test_root_that_was_renamed_or_removed(tmp_path: Path, how: str) -> None:
    """What a bind mount shows is called something else now, or nothing; the mount is the same."""
    nodes = tuple(Node(path, stat.S_IFDIR | 0o755) for path in (b"/vol/sub", b"/vol/sub/d"))
    volume = tmpfs(4, b"/vol", nodes=nodes)
    data = tmpfs(2, b"/data", superblock=4, root=b"/sub", attributes=ATTRIBUTES, source="t4")
    with live([volume, data, MOUNTS[1]]) as (target,):
        scene = Scene(target, images(tmp_path / "images"))
        scene.crash()
        if how == "renamed":
            target.run(lambda: os.rename("/vol/sub", "/vol/other"))
        else:
            target.run(lambda: shutil.rmtree("/vol/sub"))
        done = recovered()
        assert "/data in mnt:[" in done.out
        assert not target.is_writable(rb"/data")
        assert not target.is_writable(rb"/other")
        assert scene.temporaries() == []


def test_names_on_a_mount_without_a_clone(tmp_path: Path) -> None:
    """It was put back before the names were gone: it is made writable for them once more."""
    unbindable = read_only(2, b"/data", "d/", "keep", attributes=ATTRIBUTES, unbindable=True)
    with live([unbindable, MOUNTS[1]]) as (target,):
        scene = Scene(target, images(tmp_path / "images"))
        scene.crash("create")
        assert target.is_writable(b"/data")
        assert scene.temporaries()
        attributes(target, b"/data", add=int(Attr.RDONLY))
        recovered()
        scene.assert_as_before()


def test_name_that_another_file_has(tmp_path: Path) -> None:
    """The old name of a ghost is removed only where it is the ghost."""
    made = ghosts_on("/data", ["d/gone"], b"content")
    with live([MOUNTS[0]]) as (target,):
        scene = Scene(target, made.write(tmp_path))
        scene.crash("open")  # with its answer lost, the name is owed, though it is gone

        def put() -> None:
            Path("/data/d/gone").write_text("somebody's")

        target.run(put)  # the mount is writable still
        done = recovered()
        assert "another file has the name now" in done.out
        assert target.run(lambda: Path("/data/d/gone").read_text()) == "somebody's"


def test_directory_that_was_exchanged(scene: Scene) -> None:
    scene.crash()

    def exchange() -> None:
        os.rename("/data/d", "/data/moved")
        os.mkdir("/data/d", 0o755)

    scene.target.run(exchange)
    left = run("recover")
    assert left.status == 3, left
    assert "another directory has the name now" in left.out
    assert not scene.target.is_writable(b"/data")
    assert len(scene.temporaries()) == 2
    assert run("recover").status == 3
    token = journals()[0].removesuffix(".journal")
    forgotten = recovered("--forget", token)
    assert forgotten.out.startswith(f"run {token}: forgotten; 0 mounts and ")
    assert journals() == []
    unknown = run("recover", "--forget", token)
    assert (unknown.status, unknown.err.count("\n")) == (2, 1)


@pytest.mark.parametrize("name", ["../outside", "inside/../../outside", "/outside", ".hidden", ""])
def test_forgetting_takes_no_path(name: str) -> None:
    """Only what is a journal of the run directory can be forgotten."""
    outside = run_directory().parent / "outside.journal"
    outside.write_text("somebody's")
    try:
        done = run("recover", "--forget", name)
        assert (done.status, done.err.count("\n")) == (2, 1), done
        assert outside.read_text() == "somebody's"
    finally:
        outside.unlink()
    for option in ("--dry-run", "--json"):
        assert run("recover", "--forget", "0123456789ab", option).status == 2


def test_busy_mount(scene: Scene) -> None:
    """Exit status 3, and who holds it."""
    scene.crash()

    def body(ready: Callable[[], None]) -> None:
        enter(scene.target.fd)
        os.open("/data/keep", os.O_RDWR)
        ready()
        signal.pause()

    with process(body) as pid:
        left = run("recover")
        assert left.status == 3, left
        assert f"pid {pid} (" in left.out
        assert scene.target.is_writable(b"/data")
        assert scene.temporaries() == []
    recovered()
    scene.assert_as_before()


# -- Namespaces that are gone -------------------------------------------------------------------


def test_namespace_is_gone(tmp_path: Path) -> None:
    """Mounts are gone with it, and there is nothing else to undo."""
    with live(MOUNTS) as (target,):
        Scene(target, images(tmp_path / "images")).crash()
    done = recovered()
    assert "its namespace is gone" in done.out


def test_namespace_that_only_a_file_keeps(scene: Scene) -> None:
    """No process is in it, but somebody may enter it again."""
    scene.crash()
    os.kill(scene.target.pid, signal.SIGSTOP)  # it must not matter
    recovered()
    os.kill(scene.target.pid, signal.SIGCONT)
    scene.assert_as_before()


def test_finding_a_namespace_keeps_no_other_open(scene: Scene) -> None:
    """Who has found all that it wants stops in the middle of the kernel's list."""
    inode, unique = os.fstat(scene.target.fd).st_ino, _linux.mount_namespace_id(scene.target.fd)
    wanted = JournalNamespace(7, inode, unique, "wanted", None)
    before = set(os.listdir("/proc/self/fd"))
    found, saw_all = find_namespaces([wanted])
    assert list(found) == [7]
    assert saw_all
    assert os.fstat(found[7]).st_ino == inode
    _linux.close_all(found.values())
    assert set(os.listdir("/proc/self/fd")) == before


def test_namespace_that_can_not_be_seen(scene: Scene) -> None:
    """In a pid namespace of its own the command sees none of the others: that is no proof."""
    scene.crash()
    for namespaces in (["--pid", "--fork", "--mount-proc"], ["--user", "--map-root-user"]):
        command = ["unshare", *namespaces, sys.executable, "-m", "ghostpool", "recover"]
        left = subprocess.run(command, capture_output=True, text=True, check=False)
        assert left.returncode != 0, left
        assert "gone" not in left.stdout
        assert len(journals()) == 1
        assert scene.target.is_writable(b"/data")
    recovered()
    scene.assert_as_before()


_BEFORE_6_12 = """
import sys
from ghostpool import _linux
def fail(fd, *, back=False):
    raise OSError(25, "Inappropriate ioctl for device")
_linux.next_mount_namespace = fail
sys.argv = ["ghostpool", "recover"]
from ghostpool._cli import main
main()
"""


def test_namespace_that_only_a_descriptor_keeps(tmp_path: Path) -> None:
    """Before Linux 6.12 nothing leads to it, which is no proof that it is gone."""
    with live(MOUNTS) as (target,):
        scene = Scene(target, images(tmp_path / "images"))
        scene.crash()
        keep = os.open(f"/proc/{target.pid}/ns/mnt", os.O_RDONLY)
    try:
        old = [sys.executable, "-c", _BEFORE_6_12]
        left = subprocess.run(old, capture_output=True, text=True, check=False)
        assert left.returncode == 3, left
        assert "can not be found from here" in left.stdout
        assert len(journals()) == 1
        assert "read-only again" in recovered().out
        assert all(m.read_only for m in mountinfo(keep) if m.mountpoint in (b"/data", b"/other"))
    finally:
        os.close(keep)


def test_few_descriptors(tmp_path: Path) -> None:
    """The soft limit of who recovers is not that of the run."""
    numbers = range(2, 62)
    made = ImageSet()
    made.mount("/")
    made.task(1)
    for number in numbers:
        made.mount(f"/m{number}", flags=0x200001)
        made.open(1, number + 1, f"/m{number}/gone", ghost=made.ghost(b"x"))
    directory = made.write(tmp_path / "images")
    with live([read_only(number, b"/m%d" % number, "keep") for number in numbers]) as (target,):
        scene = Scene(target, directory)
        scene.crash()
        command = f"ulimit -Sn 48; exec {sys.executable} -m ghostpool recover"
        subprocess.run(["sh", "-c", command], check=True, stdout=subprocess.DEVNULL)
        scene.assert_as_before()


@contextmanager
def dead_volume(tmp_path: Path, made: Path) -> Iterator[Path]:
    """A directory that a dead container had bound, with what a dead run left in it."""
    volume = tmp_path / "volume"
    (volume / "d").mkdir(parents=True)
    data = tmpfs(2, b"/data", external=os.fsencode(volume), attributes=ATTRIBUTES)
    with live([data, read_only(3, b"/other", "keep")]) as (target,):
        Scene(target, made).crash()
    assert list(volume.rglob(".ghostpool-*"))
    yield volume


def test_names_outlive_their_namespace(tmp_path: Path) -> None:
    """A dead container's volume: they are found through the mount that it was bound from."""
    with dead_volume(tmp_path, images(tmp_path / "images")) as volume:
        assert len(list(volume.rglob(".ghostpool-*"))) == 2
        done = recovered()
        assert "its namespace is gone" in done.out
        assert [path.name for path in volume.rglob("*")] == ["d"]


def test_many_names_through_another_mount(tmp_path: Path) -> None:
    """It is looked for and opened once, not for each of them."""
    made = ghosts_on("/data", (f"d/gone-{number}" for number in range(200)), b"x")
    with dead_volume(tmp_path, made.write(tmp_path / "images")) as volume:
        command = f"ulimit -n 80; exec {sys.executable} -m ghostpool recover"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert [path.name for path in volume.rglob("*")] == ["d"]


def test_another_file_system_with_the_same_numbers(tmp_path: Path) -> None:
    """Device numbers are used again; the number of the file system itself decides."""
    with dead_volume(tmp_path, images(tmp_path / "images")) as volume:
        (name,) = journals()
        path = run_directory() / name
        whole = path.read_bytes()
        (fsid,) = {m.fsid for m in Journal(whole).mounts.values() if m.mountpoint == b"/data"}
        assert fsid
        path.write_bytes(_with_record(whole, "mount", lambda m: (*m[:-1], m[-1] ^ 1)))
        left = sorted(volume.rglob("*"))
        assert len(left) == 3
        done = recovered()
        assert "its namespace is gone" in done.out
        assert sorted(volume.rglob("*")) == left


def _with_record(data: bytes, kind: str, change: Callable[[tuple[Any, ...]], Any]) -> bytes:
    """The journal with each record of a kind changed, and right sums again."""
    out = MAGIC
    for start, end in itertools.pairwise(_record_ends(data)):
        record = marshal.loads(data[start + 8 : end])
        payload = marshal.dumps(change(record) if record[0] == kind else record, 4)
        out += struct.pack("<II", len(payload), binascii.crc32(payload)) + payload
    return out


def test_stopped_guardian(scene: Scene) -> None:
    """It holds the lock, so nobody else can undo: it is continued, and does it."""
    code = """
import os, signal, sys
from ghostpool._workerclient import WorkerClient
call = WorkerClient.call
guardian = None
async def dying(self, request, *args, **keywords):
    global guardian
    result = await call(self, request, *args, **keywords)
    guardian = self.child.pid if request == "journal" else guardian
    if request == "make_writable":
        os.kill(guardian, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGKILL)
    return result
WorkerClient.call = dying
from ghostpool._cli import main
main()
"""
    arguments = ["restore", "-D", str(scene.images), "-t", str(scene.target.pid), "--discard"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=False)
    assert done.returncode == -signal.SIGKILL
    assert wait_for(lambda: len(children()) == 1)
    assert scene.target.is_writable(b"/data")
    looked = recovered("--dry-run")
    assert ": alive" in looked.out
    recovered()
    assert wait_for(lambda: not children())
    scene.assert_as_before()


# -- Whose journal it is ------------------------------------------------------------------------


def test_a_living_run_is_left_alone(scene: Scene) -> None:
    """Its journal is locked, whatever its owner does."""
    code = """
import os, signal, sys
from ghostpool._workerclient import WorkerClient
call = WorkerClient.call
async def stopping(self, request, *args, **keywords):
    result = await call(self, request, *args, **keywords)
    if request == "make_writable":
        os.kill(os.getpid(), signal.SIGSTOP)
    return result
WorkerClient.call = stopping
sys.argv[0] = "ghostpool"
from ghostpool._cli import main
main()
"""
    arguments = ["restore", "-D", str(scene.images), "-t", str(scene.target.pid), "--discard"]
    with subprocess.Popen([sys.executable, "-c", code, *arguments]) as restore:
        try:
            assert wait_for(lambda: _is_stopped(restore.pid))
            (journal,) = journals()
            done = recovered()
            assert done.out.strip() == f"run {journal.removesuffix('.journal')}: alive"
            assert scene.target.is_writable(b"/data")
            refused = run("recover", "--forget", journal.removesuffix(".journal"))
            assert (refused.status, "is alive" in refused.err) == (2, True)
        finally:
            restore.send_signal(signal.SIGCONT)
        assert restore.wait(30) == 0
    scene.assert_as_before()


def _is_stopped(pid: int) -> bool:
    return b") T " in Path(f"/proc/{pid}/stat").read_bytes()


def test_after_a_reboot(scene: Scene) -> None:
    """Numbers of another boot mean nothing: whatever has them now is left alone."""
    scene.crash()
    (name,) = journals()
    path = run_directory() / name
    kept = path.read_bytes()
    own = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    other = "00000000-0000-4000-8000-000000000000"
    path.write_bytes(
        _with_record(kept, "run", lambda run: [other if one == own else one for one in run])
    )
    left = scene.look()
    done = recovered()
    assert "started anew" in done.out
    assert scene.look() == left
    assert journals() == []
    path.write_bytes(kept)
    recovered()
    scene.assert_as_before()


def test_no_journal(scene: Scene) -> None:
    path = run_directory() / "0123456789ab.journal"
    path.write_bytes(b"something else")
    left = run("recover")
    assert left.status == 3
    assert "unreadable" in left.out
    assert path.read_bytes() == b"something else"
    assert run("recover", "--forget", "0123456789ab").status == 0
    scene.assert_as_before()


def test_truncated_at_each_record(scene: Scene) -> None:
    """Never a wrong undo: every cut leaves the target as before the run, or as the cut found it.

    That a cut inside a record means the same as one before it: tests/unit/test_journal.py, at
    every byte.
    """
    scene.crash("open")
    (name,) = journals()
    path = run_directory() / name
    whole = path.read_bytes()
    left = scene.look()
    journal = Journal(whole)
    ends = _record_ends(whole)
    assert len(ends) >= 6
    lines_before = set(scene.before.mountinfo.splitlines())
    for end in [*ends[1:-1], ends[-1] - 1]:
        path.write_bytes(whole[:end])
        done = run("recover")
        assert done.status == 0, (end, done)
        now = scene.look()
        # What was there before is there, and nothing is there that was not left by the run.
        assert scene.before.names() <= now.names() <= left.names()
        # Mounts: each is as before, or as it was left.
        for line, found, as_left in zip(
            scene.before.mountinfo.splitlines(),
            now.mountinfo.splitlines(),
            left.mountinfo.splitlines(),
            strict=True,
        ):
            assert found in (line, as_left)
    assert journal.debts
    path.write_bytes(whole)
    recovered()
    scene.assert_as_before()
    assert set(scene.look().mountinfo.splitlines()) == lines_before


def _record_ends(data: bytes) -> list[int]:
    ends = [len(MAGIC)]
    while ends[-1] < len(data):
        length = int.from_bytes(data[ends[-1] : ends[-1] + 4], "little")
        ends.append(ends[-1] + 8 + length)
    return ends


# -- The run directory --------------------------------------------------------------------------


def test_sockets_of_dead_servers(scene: Scene) -> None:
    """One that is listened to stays."""
    dead, alive = (run_directory() / f"{n}-0123.sock" for n in (1, 2))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as one:
        one.bind(str(dead))
        one.listen()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(str(alive))
        other.listen()
        recovered()
        assert len(journals()) == 2  # they may be in the making
        for path in (dead, alive):
            os.utime(path, (0, 0))
        recovered()
        assert journals() == [alive.name]
    alive.unlink()
    scene.assert_as_before()


def test_journal_can_not_be_written(scene: Scene, tmp_path: Path) -> None:
    """Nothing is changed then: not at the start, and not in the middle."""
    for kept in (0, 4096):
        done = _with_full_run_directory(scene, tmp_path / f"full-{kept}", kept)
        assert done.returncode == 1, done
        assert "ENOSPC" in done.stderr
        assert "the journal in the run directory can not be written" in done.stderr
        scene.assert_as_before()


_FULL = """
import os, sys
from ghostpool import _linux
directory, kept = sys.argv[1], int(sys.argv[2])
_linux.unshare(_linux.CLONE_NEWNS)
_linux.mount(None, b"/", None, _linux.MS_REC | _linux.MS_PRIVATE)
context = _linux.fsopen(b"tmpfs")
for key, value in ((b"size", b"16k"), (b"mode", b"700")):
    _linux.fsconfig(context, _linux.FSCONFIG_SET_STRING, key, value)
_linux.fsconfig(context, _linux.FSCONFIG_CMD_CREATE)
_linux.move_mount(_linux.fsmount(context), _linux.AT_FDCWD, directory.encode())
with open(directory + "/filler", "wb") as file:
    file.write(bytes(16384 - kept))
os.environ["GHOSTPOOL_RUN_DIR"] = directory
os.execv(sys.executable, [sys.executable, "-m", "ghostpool", *sys.argv[3:]])
"""


def _with_full_run_directory(
    scene: Scene, directory: Path, kept: int
) -> subprocess.CompletedProcess[str]:
    """A restore whose run directory has room for `kept` bytes; many opens need more."""
    made = ImageSet()
    made.mount("/")
    made.mount("/data", flags=0x200001)
    made.task(1)
    ghost = made.ghost(b"content")
    for number in range(300):
        made.open(1, 3 + number, f"/data/d/gone-{number}", ghost=ghost)
    path = made.write(directory.with_suffix(".images"))
    directory.mkdir()
    arguments = ["restore", "-D", str(path), "-t", str(scene.target.pid), "--discard"]
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(directory), str(kept), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    shutil.rmtree(directory)
    return done
