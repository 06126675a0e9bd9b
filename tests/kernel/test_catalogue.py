"""Every failure that a restore of CRIU knows, and what ghostpool makes of it: the error catalogue.

One clear line, the right exit status, and nothing left behind: no name, parent, mount or process.
Each case has the name of what fails. Some of that is CRIU's own machinery; then the case is what
takes its place here. A link that is trimmed to an ancestor directory is a missing parent, and "up
to the root" a mount whose root directory is gone. The second mount namespace, where CRIU makes
ghosts, is a private clone of the mount. A restored tree that is killed since cleaning up has failed
is a run that fails. Who gets the signals of a descriptor (fown) is not restored, so that can not
fail.
What fails in a system call is made to fail there, in the real command.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ghostpool._buildspec import MountSpec
from ghostpool.testing import Snapshot
from tests.support.crash import journals, run_directory
from tests.support.imagewriter import LINKED, Images, ImageSet, message, record
from tests.support.live import (
    Live,
    Run,
    assert_gone,
    assert_refused,
    command,
    descendants,
    live,
    read_only,
    run,
    run_argv,
    tmpfs,
)
from tests.support.restore import fetched, serving

pytestmark = [pytest.mark.long, pytest.mark.needs_mount_ns]

O_DIRECTORY = 0o300000
DATA = read_only(2, b"/data", "d/", "d/keep", "d/gone.cr.1.ghost", "d/link_remap.77")


def one_task() -> ImageSet:
    made = ImageSet()
    made.mount("/")
    made.mount("/data", id=501, flags=0x200001)
    made.task(1)
    return made


def everything() -> ImageSet:
    """A file with an owner and a position, a missing parent, two names, and a directory."""
    made = one_task()
    made.open(1, 3, "/data/d/gone", ghost=made.ghost(b"content", uid=7, gid=8), pos=3)
    made.open(1, 4, "/data/d/a/b/gone", ghost=made.ghost(b"more"))
    twice = made.ghost(b"twice")
    made.open(1, 5, "/data/d/one", ghost=twice)
    made.open(1, 6, "/data/d/two", ghost=twice)
    directory = made.ghost(mode=stat.S_IFDIR | 0o755)
    made.open(1, 7, "/data/d/x/directory", ghost=directory, flags=O_DIRECTORY)
    return made


@pytest.fixture(scope="module")
def target() -> Iterator[tuple[Live, Snapshot]]:
    """A target that no case changes, and how it was."""
    with live([DATA]) as (one,):
        yield one, one.snapshot().without_directory_times()


def assert_as_before(target: tuple[Live, Snapshot]) -> None:
    now = target[0].snapshot().without_directory_times()
    assert now.mountinfo == target[1].mountinfo
    assert now.files == target[1].files
    assert journals() == []


# -- What images claim --------------------------------------------------------------------------

Change = Callable[[ImageSet], Images | None]


def ghost_image(change: Callable[[bytes], bytes]) -> Change:
    """The image of the only ghost, head excluded, otherwise."""

    def changed(made: ImageSet) -> Images:
        made.open(1, 3, "/data/d/gone", ghost=made.ghost(b"content"))
        images = made.images()
        images["ghost-file-1.img"] = [change(b"".join(images["ghost-file-1.img"]))]
        return images

    return changed


def no_ghost_image(made: ImageSet) -> Images:
    made.open(1, 3, "/data/d/gone", ghost=made.ghost(b"content"))
    images = made.images()
    del images["ghost-file-1.img"]
    return images


def a_ghost(**fields: Any) -> Change:
    """A ghost with these fields; `size` None leaves it out."""

    def made_so(made: ImageSet) -> None:
        made.open(1, 3, "/data/d/gone", ghost=made.ghost(**fields), size=None)

    return made_so


def with_remap(*remap: Any) -> Change:
    def made_so(made: ImageSet) -> None:
        made.remap(*remap)

    return made_so


def opened(name: str, **fields: Any) -> Change:
    def made_so(made: ImageSet) -> None:
        made.open(1, 3, name, ghost=made.ghost(b"content"), **fields)

    return made_so


def hidden_name(made: ImageSet) -> None:
    made.link(made.open(1, 3, "/data/d/gone"), "/data/d")


def no_size(made: ImageSet) -> Images:
    made.open(1, 3, "/data/d/gone", ghost=made.ghost(chunks=[(0, b"x")], size=1))
    images = made.images()
    entry = message((1, 0), (2, 0), (3, 0o100644), (9, True))
    images["ghost-file-1.img"][0] = record(entry)
    return images


def chunk(made: ImageSet) -> Images:
    made.open(1, 3, "/data/d/gone", ghost=made.ghost(chunks=[(0, b"0123456789")], size=10))
    images = made.images()
    images["ghost-file-1.img"][1] = images["ghost-file-1.img"][1][:-1]
    return images


CLAIMS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "remap of an unknown file": (
        with_remap(99, 1),
        ("remap-fpath.img, record 0", "file id 99"),
    ),
    "missing link target": (
        with_remap(1, 98, LINKED),
        ("remap-fpath.img, record 0", "file id 98"),
    ),
    "link target that is gone": (hidden_name, ("/data/d/gone", "link_remap.")),
    "unknown type of remap": (
        with_remap(1, 1, 3),
        ("remap-fpath.img, record 0", "remap type 3"),
    ),
    "ghost image missing": (no_ghost_image, ("ghost-file-1.img", "is missing")),
    "ghost image short": (
        ghost_image(lambda data: data[:20]),
        ("ghost-file-1.img, record 0", "bytes"),
    ),
    "ghost image empty": (ghost_image(lambda data: b""), ("ghost-file-1.img", "holds no record")),
    "ghost image undecodable": (
        ghost_image(lambda data: struct.pack("<I", 4) + b"\xff\xff\xff\xff"),
        ("ghost-file-1.img, record 0", "ghost_file_entry"),
    ),
    "ghost without what is required": (
        ghost_image(lambda data: record(message((1, 0)))),
        ("ghost-file-1.img, record 0", "lacks gid"),
    ),
    "chunks without a size": (no_size, ("ghost-file-1.img", "chunks", "no size")),
    "chunk cut": (chunk, ("ghost-file-1.img, record 1", "10 bytes of content should follow")),
    "symbolic link without target": (
        a_ghost(mode=stat.S_IFLNK | 0o777),
        ("ghost-file-1.img", "symbolic link", "target"),
    ),
    "device without rdev": (
        a_ghost(mode=stat.S_IFCHR | 0o600),
        ("ghost-file-1.img", "device", "rdev"),
    ),
    "mount id not found": (
        opened("/data/d/gone", mnt_id=77),
        ("files.img", "/data/d/gone", "mount 77"),
    ),
    "path not below its mount": (
        opened("/elsewhere/gone", mnt_id=501),
        ("files.img", "/elsewhere/gone", "not below its mount 501"),
    ),
    "bad size": (opened("/data/d/gone", size=8), ("ghost-file-1.img", "7 bytes", "8")),
    "bad mode": (opened("/data/d/gone", mode=0o100600), ("ghost-file-1.img", "0o100600")),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims(name: str, tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    """Refused before anything is touched, by the name of the image and the record."""
    change, words = CLAIMS[name]
    made = one_task()
    images = made.write(tmp_path, change(made))
    before = target[0].snapshot()
    done = run("restore", "-D", images, "-t", target[0].pid, "--discard")
    assert_refused(done, [before], [target[0]], *words)


@pytest.mark.parametrize("magic", ["common", "of the type"])
def test_bad_magic(magic: str, tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    made = one_task()
    made.open(1, 3, "/data/d/gone", ghost=made.ghost(b"content"))
    image = made.write(tmp_path) / "ghost-file-1.img"
    data = bytearray(image.read_bytes())
    data[0 if magic == "common" else 4] ^= 1
    image.write_bytes(data)
    before = target[0].snapshot()
    done = run("restore", "-D", tmp_path, "-t", target[0].pid, "--discard")
    assert_refused(done, [before], [target[0]], "ghost-file-1.img", "begins with")


# -- What the target is like --------------------------------------------------------------------


def test_nothing_exists_up_to_the_root(tmp_path: Path) -> None:
    """The directory that is mounted has been removed: nothing can be created in it."""
    images = everything().write(tmp_path)
    mounts = (
        tmpfs(2, b"/base", nodes=read_only(2, b"/base", "sub/").nodes),
        MountSpec(3, 1, b"/data", 2, "tmpfs", "t2", "", b"/sub", 1),
    )
    with live(mounts) as (target,):
        target.run(lambda: os.rmdir("/base/sub"))
        before = target.snapshot()
        done = run("restore", "-D", images, "-t", target.pid, "--discard")
        assert_refused(done, [before], [target], "/data", "has been removed")


def test_no_space_to_begin_with(tmp_path: Path) -> None:
    made = one_task()
    made.open(1, 3, "/data/gone", ghost=made.ghost(bytes(1 << 16)))
    images = made.write(tmp_path)
    with live([read_only(2, b"/data", options="size=4k")]) as (target,):
        before = target.snapshot()
        done = run("restore", "-D", images, "-t", target.pid, "--discard")
        assert_refused(done, [before], [target], "/data", "need 65536 bytes")


# -- System calls that fail ---------------------------------------------------------------------

_FAILING = """
import sys
from ghostpool.testing import injected_faults
from ghostpool._cli import exit_status_of_cli
request, call, code, times = sys.argv[1:5]
del sys.argv[1:5]
with injected_faults() as faults:
    faults.fail(request, call, int(code), times=int(times) or None)
    status = exit_status_of_cli()
    faults.check()
sys.exit(status)
"""


def failing(request: str, call: str, code: int, times: int, *options: object) -> Run:
    """The command with a system call that fails so often; 0: always."""
    arguments = (request, call, code, times, "restore", *options)
    return run_argv([sys.executable, "-c", _FAILING, *map(str, arguments)])


FAILURES = {
    "temporary name exists": ("create", "openat", errno.EEXIST),
    "write error": ("create", "pwrite", errno.EIO),
    "no space any more": ("create", "pwrite", errno.ENOSPC),
    "chown": ("create", "fchown", errno.EPERM),
    "chmod": ("create", "fchmod", errno.EPERM),
    "utimes": ("create", "utimensat", errno.EPERM),
    "chown of a directory": ("create", "fchownat", errno.EINVAL),
    "chmod of a directory": ("create", "fchmodat", errno.EPERM),
    "remount on the task's side": ("make_writable", "mount_setattr", errno.EPERM),
    "mkdir of a parent": ("open_discarded", "mkdirat", errno.ENOSPC),
    "mkdir of a directory's parent": ("place", "mkdirat", errno.ENOSPC),
    "link": ("open_discarded", "linkat", errno.EMLINK),
    "move": ("open_discarded", "renameat2", errno.EIO),
    "move of a directory": ("place", "renameat2", errno.EIO),
    "open": ("open_discarded", "openat", errno.EIO),
    "validation": ("open_discarded", "fstat", errno.EIO),
    "unlink of the old name": ("open_discarded", "unlinkat", errno.EIO),
    "removal of a parent": ("open_discarded", "rmdir", errno.EIO),
    "seek": ("open_discarded", "lseek", errno.EINVAL),
}


@pytest.mark.parametrize("name", FAILURES)
def test_system_calls(name: str, tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    """The error names the call and what it said; everything is undone, and the status is 1."""
    request, call, code = FAILURES[name]
    images = everything().write(tmp_path / "images")
    report = tmp_path / "report"
    options = ("-D", images, "-t", target[0].pid, "--discard", "--jobs", 1, "--report", report)
    done = failing(request, call, code, 1, *options)
    assert done.status == 1, done
    (line,) = done.err.splitlines()
    assert os.strerror(code) in line
    document = json.loads(report.read_text())
    assert (document["status"], document["restored"]) == (1, False)
    (error,) = document["errors"]
    assert error["errno"] == code
    assert_as_before(target)


def test_remount_on_the_side_where_ghosts_are_made(
    tmp_path: Path, target: tuple[Live, Snapshot]
) -> None:
    """The clone is made for the plan, so this is a refusal."""
    images = everything().write(tmp_path)
    before = target[0].snapshot()
    options = ("-D", images, "-t", target[0].pid, "--discard")
    done = failing("clone", "mount_setattr", errno.EPERM, 1, *options)
    assert_refused(done, [before], [target[0]], "/data", "read-only")


UNDOING = {
    "cleanup": ("remove", "unlinkat", errno.EIO),
    "cleanup of a directory": ("remove", "rmdir", errno.EIO),
    "revert": ("make_read_only", "mount_setattr", errno.EBUSY),
}


@pytest.mark.parametrize("name", UNDOING)
def test_undoing(name: str, tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    """The status is 3, and the line has the command that mends it."""
    request, call, code = UNDOING[name]
    images = everything().write(tmp_path)
    options = ("-D", images, "-t", target[0].pid, "--discard", "--jobs", 1)
    done = failing(request, call, code, 0, *options)
    assert done.status == 3, done
    (line,) = done.err.splitlines()
    assert os.strerror(code) in line
    assert target[0].is_writable(b"/data") == (name == "revert")
    remedy = line.rpartition("to put it back: ")[2]
    if name == "revert":
        assert remedy == f"mount -N {target[0].pid} -o remount,bind,ro,relatime /data"
    else:
        assert remedy == f"GHOSTPOOL_RUN_DIR={run_directory()} ghostpool recover"
    mended = run("recover")  # which does either
    assert (mended.status, mended.err) == (0, "")
    assert_as_before(target)


# -- What somebody else does meanwhile ----------------------------------------------------------


def test_names_that_look_like_temporaries(tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    """What others have left, of CRIU or of ghostpool, is neither taken nor removed."""
    images = everything().write(tmp_path)
    done = run("restore", "-D", images, "-t", target[0].pid, "--discard")
    assert (done.status, done.err) == (0, "")
    assert {"1:/data/d/gone.cr.1.ghost", "1:/data/d/link_remap.77"} <= target[1].files.keys()
    assert_as_before(target)


_KNOWN_NAME = """
import os, sys
from ghostpool._cli import exit_status_of_cli
os.urandom = bytes
sys.exit(exit_status_of_cli())
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_temporary_name_exists(kind: str, tmp_path: Path) -> None:
    """Whoever has guessed the random name stops the restore, and loses nothing."""
    images = one_task()
    for number in (3, 4):
        images.open(1, number, f"/data/d/gone{number}", ghost=images.ghost(b"content"))
    images.write(tmp_path)
    name = f"d/.ghostpool-{bytes(6).hex()}-2" + "/" * (kind == "directory")
    with live([read_only(2, b"/data", "d/", name)]) as (target,):
        before = target.snapshot().without_directory_times()
        options = ("-D", str(tmp_path), "-t", str(target.pid), "--discard")
        done = run_argv([sys.executable, "-c", _KNOWN_NAME, "restore", *options])
        assert done.status == 1, done
        (line,) = done.err.splitlines()
        assert os.strerror(errno.EEXIST) in line
        assert_as_before((target, before))


def test_parents_not_empty(tmp_path: Path) -> None:
    """A file that somebody puts into a made directory stays with it: reported, and no failure."""
    images = everything().write(tmp_path / "images")
    report = tmp_path / "report"
    options = ("-D", images, "--serve", tmp_path / "socket", "--report", report)
    with live([DATA._replace(attributes=0)]) as (target,):
        before = target.snapshot().without_directory_times()
        with serving(*options, "-t", target.pid) as served:
            target.run(lambda: os.close(os.open("/data/d/x/theirs", os.O_CREAT | os.O_WRONLY)))
            with fetched(served.socket, [1]):
                assert served.process.wait(timeout=30) == 0
        document = json.loads(report.read_text())
        after = target.snapshot().without_directory_times()
        assert after.files.keys() - before.files.keys() == {"1:/data/d/x", "1:/data/d/x/theirs"}
        assert after.mountinfo == before.mountinfo
    (left,) = document["left"]
    assert left.startswith("d/x on mount /data")
    assert "something else is in it" in left


def test_parents_of_a_directory(tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    """Not even what leads to a directory ghost stays."""
    made = one_task()
    directory = made.ghost(mode=stat.S_IFDIR | 0o755)
    made.open(1, 3, "/data/d/x/y/directory", ghost=directory, flags=O_DIRECTORY)
    images = made.write(tmp_path)
    done = run("restore", "-D", images, "-t", target[0].pid, "--discard")
    assert (done.status, done.err) == (0, "")
    assert_as_before(target)


@pytest.mark.parametrize("whom", ["coordinator", "everything"])
def test_killed(whom: str, tmp_path: Path, target: tuple[Live, Snapshot]) -> None:
    """By SIGKILL, with its files made and waiting: the guardian undoes it, or `recover` does."""
    images = everything().write(tmp_path / "images")
    options = ("-D", images, "-t", target[0].pid, "--serve", tmp_path / "socket")
    process = subprocess.Popen(
        command("restore", *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving")
        made = target[0].snapshot().without_directory_times()
        assert made.files != target[1].files
        family = descendants(process.pid)
        victims = [psutil.Process(process.pid), *(family if whom == "everything" else ())]
        for victim in victims:
            victim.suspend()  # so that nobody acts on the death of another one
        for victim in victims:
            victim.kill()
    assert_gone(family)
    if whom == "everything":
        assert target[0].snapshot().without_directory_times() == made
        assert len(journals()) == 1
        recovered = run("recover")
        assert (recovered.status, recovered.err) == (0, "")
    assert_as_before(target)
