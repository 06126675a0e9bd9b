"""Where ghosts are created and linked: binds, directories, shared parents, equal names.

Images that no dump of the corpus shows, restored into namespaces built to match them.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from ghostpool import _run
from ghostpool._buildspec import MountSpec, NamespaceSpec, Node
from ghostpool._errors import PlanError, VerificationError
from ghostpool._launch import launch
from ghostpool._linux import Attr, mount_identity
from ghostpool._model import NsId
from ghostpool._planned import Policy
from ghostpool._report import Report
from ghostpool._restore import Restoration
from ghostpool._restored import Restored
from ghostpool.testing._targets import built
from tests.support.imagewriter import ImageSet
from tests.support.namespaces import inside
from tests.support.restore import look

pytestmark = pytest.mark.needs_mount_ns

RO = int(Attr.RDONLY)
ROOT = MountSpec(1, 0, b"/", 1, "tmpfs", "root", "", b"/", 0)
O_DIRECTORY = 0o300000  # with O_LARGEFILE, as fdinfo shows it


def directory(path: str) -> Node:
    return Node(path.encode(), stat.S_IFDIR | 0o755)


def mount(number: int, point: str, **fields: Any) -> MountSpec:
    """A read-only tmpfs below the root."""
    spec = MountSpec(number, 1, point.encode(), number, "tmpfs", f"m{number}", "", b"/", RO)
    return spec._replace(**fields)


@dataclass
class Seen:
    """What a restored descriptor is."""

    link: str
    nlink: int
    inode: tuple[int, int]
    content: bytes
    mtime_us: int
    mnt_id: int


@dataclass
class Outcome:
    files: dict[int, Seen]
    report: dict[str, Any]


def see(fd: int) -> Seen:
    status = os.fstat(fd)
    content = os.pread(fd, 100, 0) if stat.S_ISREG(status.st_mode) else b""
    inode = (status.st_dev, status.st_ino)
    link = os.readlink(f"/proc/self/fd/{fd}")
    mnt_id = mount_identity(fd).mnt_id
    return Seen(link, status.st_nlink, inode, content, status.st_mtime_ns // 1000, mnt_id)


def restore(images: Path, fd: int, jobs: int = 4, policy: Policy | None = None) -> Outcome:
    """Restore in this process and say what came of task 1; everything else is as before."""
    before = look(fd, "/")
    report = Report()
    files: dict[int, Seen] = {}

    async def deliver(run: _run.Prepared, restored: Restored) -> None:
        for number, descriptor in restored.of_task(run.plan.tasks[0]).items():
            files[number] = see(descriptor)

    namespaces = {NsId(10): f"/proc/self/fd/{fd}"}
    request = _run.Request(str(images), jobs, namespaces=namespaces, policy=policy or Policy())

    async def story() -> None:
        await _run.run_restore(request, launch(), report, deliver)

    try:
        anyio.run(story, backend="trio")
    finally:
        after = look(fd, "/")
        assert after.mounts == before.mounts
        assert set(after.files) == set(before.files)
    return Outcome(files, report.document())


@contextmanager
def namespace(*mounts: MountSpec) -> Iterator[int]:
    with built([NamespaceSpec(10, (ROOT, *mounts))]) as (fd,):
        yield fd


def images_of(mounts: dict[str, str]) -> ImageSet:
    """Images with these mounts: mount point to root inside one file system."""
    images = ImageSet()
    images.mount("/", device=(0, 60))
    for point, root in mounts.items():
        images.mount(point, device=(0, 70), root=root, flags=0x200001)
    images.task(1)
    return images


TREE = (directory("/base/a"), directory("/base/b"), directory("/base/a/inner"))


def tree(*, with_base: bool) -> tuple[MountSpec, ...]:
    """One file system with /a, /a/inner and /b, bound at three places; and as a whole, or not."""
    base = mount(2, "/base", nodes=TREE, superblock=2)
    binds = (
        mount(3, "/data/a", superblock=2, root=b"/a"),
        mount(4, "/data/b", superblock=2, root=b"/b"),
        mount(5, "/data/inner", superblock=2, root=b"/a/inner"),
    )
    if with_base:
        return (base, *binds)
    # Built by a cover over it: what is hidden can not lend itself.
    cover = mount(6, "/base", parent=2, superblock=6)
    return (base, cover, *binds)


def test_binds_of_nested_subtrees(tmp_path: Path) -> None:
    """The temporary lies in the deepest of the roots, which all the mounts can see."""
    images = images_of({"/data/a": "/a", "/data/inner": "/a/inner"})
    ghost = images.ghost(b"shared")
    images.open(1, 3, "/data/a/one", ghost=ghost)
    images.open(1, 4, "/data/inner/two", ghost=ghost)
    images.write(tmp_path)
    with namespace(*tree(with_base=False)) as fd:
        outcome = restore(tmp_path, fd)
    one, two = outcome.files[3], outcome.files[4]
    assert one.inode == two.inode
    assert (one.nlink, one.content) == (0, b"shared")
    assert one.link.endswith("/data/a/one (deleted)")
    assert two.link.endswith("/data/inner/two (deleted)")


def test_binds_of_disjoint_subtrees(tmp_path: Path) -> None:
    """A mount that holds both lends a clone for the linking; the two are never made writable."""
    images = images_of({"/data/a": "/a", "/data/b": "/b"})
    ghost = images.ghost(b"shared")
    images.open(1, 3, "/data/a/one", ghost=ghost)
    images.open(1, 4, "/data/b/two", ghost=ghost)
    images.write(tmp_path)
    with namespace(*tree(with_base=True)) as fd:
        outcome = restore(tmp_path, fd)
    one, two = outcome.files[3], outcome.files[4]
    assert one.inode == two.inode
    assert (one.nlink, two.nlink) == (0, 0)
    assert one.link.endswith("/data/a/one (deleted)")
    assert two.link.endswith("/data/b/two (deleted)")
    made = {m["mountpoint"]: m["made_writable"] for m in outcome.report["mounts"]}
    assert made["/base"] == {"service": 1, "task": 0}


def test_binds_of_disjoint_subtrees_without_a_mount_of_both(tmp_path: Path) -> None:
    images = images_of({"/data/a": "/a", "/data/b": "/b"})
    ghost = images.ghost(b"shared")
    images.open(1, 3, "/data/a/one", ghost=ghost)
    images.open(1, 4, "/data/b/two", ghost=ghost)
    images.write(tmp_path)
    with (
        namespace(*tree(with_base=False)) as fd,
        pytest.raises(PlanError, match="no mount of the target namespaces holds both"),
    ):
        restore(tmp_path, fd)


def test_unbindable_mount(tmp_path: Path) -> None:
    """It can not be cloned: its own lease serves for creating too, once."""
    images = images_of({"/data": "/"})
    for number in range(3, 6):
        images.open(1, number, f"/data/f{number}", ghost=images.ghost(b"%d" % number))
    images.write(tmp_path)
    with namespace(mount(2, "/data", unbindable=True)) as fd:
        outcome = restore(tmp_path, fd)
    assert {n: f.content for n, f in outcome.files.items()} == {3: b"3", 4: b"4", 5: b"5"}
    (row,) = outcome.report["mounts"]
    assert row["made_writable"] == {"service": 0, "task": 1}
    assert row["reverted"] is True


def test_directories_in_directories_and_files_in_them(tmp_path: Path) -> None:
    """Dead directories inside dead ones, recorded inner first; times survive the work in them."""
    images = images_of({"/data": "/"})
    inner = images.ghost(mode=0o40711, mtime=1_400_000_000_000_007)
    outer = images.ghost(mode=0o40755, mtime=1_300_000_000_000_009)
    images.open(1, 3, "/data/gone/outer/inner", ghost=inner, flags=O_DIRECTORY)
    images.open(1, 4, "/data/gone/outer", ghost=outer, flags=O_DIRECTORY)
    images.open(1, 5, "/data/gone/outer/inner/file", ghost=images.ghost(b"deep"))
    images.open(1, 6, "/data/gone/beside", ghost=images.ghost(b"beside"))
    images.open(1, 7, "/data/gone/outer", ghost=outer, flags=O_DIRECTORY)
    images.write(tmp_path)
    with namespace(mount(2, "/data")) as fd:
        outcome = restore(tmp_path, fd)
    links = {n: f.link.partition("/data/")[2] for n, f in outcome.files.items()}
    assert links == {
        3: "gone/outer/inner (deleted)",
        4: "gone/outer (deleted)",
        5: "gone/outer/inner/file (deleted)",
        6: "gone/beside (deleted)",
        7: "gone/outer (deleted)",
    }
    assert outcome.files[3].mtime_us == 1_400_000_000_000_007
    assert outcome.files[4].mtime_us == 1_300_000_000_000_009
    assert outcome.files[4].inode == outcome.files[7].inode
    assert outcome.files[5].content == b"deep"


def test_two_directories_of_one_name(tmp_path: Path) -> None:
    images = images_of({"/data": "/"})
    for number in (3, 4):
        ghost = images.ghost(mode=0o40700 + number)
        images.open(1, number, "/data/gone/same", ghost=ghost, flags=O_DIRECTORY)
    images.write(tmp_path)
    with namespace(mount(2, "/data")) as fd:
        outcome = restore(tmp_path, fd)
    names = sorted(f.link.rpartition("/")[2] for f in outcome.files.values())
    assert names == ["same (deleted)", "same (deleted)"]
    assert outcome.files[3].inode != outcome.files[4].inode


def test_two_files_of_one_name(tmp_path: Path) -> None:
    """One after the other: each has the old name."""
    images = images_of({"/data": "/"})
    for number in range(3, 9):
        images.open(1, number, "/data/gone/same", ghost=images.ghost(b"%d" % number))
    images.write(tmp_path)
    with namespace(mount(2, "/data")) as fd:
        outcome = restore(tmp_path, fd)
    assert {f.link.partition("/data/")[2] for f in outcome.files.values()} == {
        "gone/same (deleted)"
    }
    assert {n: f.content for n, f in outcome.files.items()} == {n: b"%d" % n for n in range(3, 9)}


def test_directory_whose_name_is_taken(tmp_path: Path) -> None:
    images = images_of({"/data": "/"})
    images.open(1, 3, "/data/here", ghost=images.ghost(mode=0o40755), flags=O_DIRECTORY)
    images.write(tmp_path)
    with namespace(mount(2, "/data", nodes=(directory("/data/here"),))) as fd:
        outcome = restore(tmp_path, fd)
    assert outcome.files[3].link.endswith("/data/here.cr_link (deleted)")
    assert any("taken by a living file" in warning for warning in outcome.report["warnings"])


def test_both_names_taken(tmp_path: Path) -> None:
    images = images_of({"/data": "/"})
    images.open(1, 3, "/data/here", ghost=images.ghost(b"x"))
    images.write(tmp_path)
    nodes = tuple(Node(f"/data/here{end}".encode(), 0o100644) for end in ("", ".cr_link"))
    with (
        namespace(mount(2, "/data", nodes=nodes)) as fd,
        pytest.raises(PlanError, match="name is taken by a living file"),
    ):
        restore(tmp_path, fd)


@pytest.mark.parametrize("length", [240, 255])
def test_long_names(tmp_path: Path, length: int) -> None:
    """CRIU's temporary would overflow NAME_MAX here."""
    images = images_of({"/data": "/"})
    name = "n" * length
    images.open(1, 3, f"/data/{name}", ghost=images.ghost(b"x"))
    images.write(tmp_path)
    with namespace(mount(2, "/data")) as fd:
        outcome = restore(tmp_path, fd)
    assert outcome.files[3].link.endswith(f"/data/{name} (deleted)")


def test_many_workers_in_many_directories(tmp_path: Path) -> None:
    """Several workers in one namespace, each with directories of its own."""
    images = images_of({"/data": "/"})
    nodes = tuple(directory(f"/data/d{n}") for n in range(12))
    for number in range(3, 123):
        name = f"/data/d{number % 12}/gone{number % 5}/f{number}"
        images.open(1, number, name, ghost=images.ghost(b"%d" % number))
    images.write(tmp_path)
    with namespace(mount(2, "/data", nodes=nodes)) as fd:
        outcome = restore(tmp_path, fd, jobs=6)
    assert {n: f.content for n, f in outcome.files.items()} == {n: b"%d" % n for n in range(3, 123)}
    assert outcome.report["workers"]["count"] == 6
    assert [m["made_writable"] for m in outcome.report["mounts"]] == [{"service": 1, "task": 1}]


def run_failing_keep(images: Path, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """restore --keep that fails in its last step before success."""

    async def verify(self: Restoration) -> None:
        raise VerificationError("on purpose")

    monkeypatch.setattr(Restoration, "_verify", verify)
    with pytest.raises(VerificationError, match="on purpose"):
        restore(images, fd, policy=Policy(keep=True))


def test_keep_that_fails_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are kept only once everything has succeeded."""
    images = images_of({"/data": "/"})
    for number in range(3, 9):
        images.open(1, number, f"/data/gone{number % 2}/f{number}", ghost=images.ghost(b"x"))
    images.open(1, 9, "/data/dir", ghost=images.ghost(mode=0o40755), flags=O_DIRECTORY)
    images.write(tmp_path)
    with namespace(mount(2, "/data")) as fd:
        run_failing_keep(tmp_path, fd, monkeypatch)


def test_keep_with_several_opens_of_one_file(tmp_path: Path) -> None:
    """The second open of a ghost finds the name that the first one gave it."""
    images = images_of({"/data": "/"})
    ghost = images.ghost(b"once")
    for number in range(3, 6):
        images.open(1, number, "/data/file", ghost=ghost)
    images.open(1, 6, "/data/file", ghost=images.ghost(b"other"))
    images.write(tmp_path)
    with namespace(mount(2, "/data")) as fd, pytest.raises(AssertionError):
        # The files stay: that is what `restore` here notices, after the restore.
        restore(tmp_path, fd, policy=Policy(keep=True))
    with namespace(mount(2, "/data")) as fd:
        report = Report()

        async def deliver(run: _run.Prepared, restored: Restored) -> None:
            assert {see(f).link for f in restored.of_task(run.plan.tasks[0]).values()} == {
                "/data/file",
                "/data/file.cr_link",
            }

        request = _run.Request(
            str(tmp_path), 2, namespaces={NsId(10): f"/proc/self/fd/{fd}"}, policy=Policy(keep=True)
        )

        async def story() -> None:
            await _run.run_restore(request, launch(), report, deliver)

        anyio.run(story, backend="trio")
        names = {path for path in look(fd, "/").files if path.startswith("/data/")}
        assert names == {"/data/file", "/data/file.cr_link"}


def test_missing_directory_seen_through_two_mounts(tmp_path: Path) -> None:
    """What one mount knows of a directory that came and went, another one must not believe."""
    images = images_of({"/data/a": "/a", "/data/inner": "/a/inner"})
    ghost = images.ghost(b"shared")
    for number in range(3, 9):
        point = ("/data/a/inner", "/data/inner")[number % 2]
        mnt_id = None
        if point == "/data/a/inner":
            mnt_id = next(m.id for m in images._mounts if m.mountpoint == "/data/a")
        images.open(1, number, f"{point}/gone/f{number}", ghost=ghost, mnt_id=mnt_id)
    images.write(tmp_path)
    with namespace(*tree(with_base=True)) as fd:
        outcome = restore(tmp_path, fd, jobs=1)
    assert {f.nlink for f in outcome.files.values()} == {0}
    assert len({f.inode for f in outcome.files.values()}) == 1


def test_modes_below_a_default_acl(tmp_path: Path) -> None:
    """A default ACL changes the modes of what is made; the restored ones are the image's."""
    images = images_of({"/data": "/"})
    images.open_fifo(1, 3, "/data/acl/fifo", ghost=images.ghost(mode=0o10666))
    images.open(1, 4, "/data/acl/file", ghost=images.ghost(b"x", mode=0o100666))
    images.open(1, 5, "/data/acl/dir", ghost=images.ghost(mode=0o40777), flags=O_DIRECTORY)
    images.write(tmp_path)

    def set_acl() -> None:
        # user::rwx, group::---, other::---: version, then (tag, permissions, id) of each.
        entries = ((1, 7, 0xFFFFFFFF), (4, 0, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))
        acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
        os.setxattr("/data/acl", "system.posix_acl_default", acl)

    writable = mount(2, "/data", attributes=0, nodes=(directory("/data/acl"),))
    with namespace(writable) as fd:
        inside(fd, set_acl)
        outcome = restore(tmp_path, fd)
    assert sorted(outcome.files) == [3, 4, 5]
