"""Rebuilt namespaces are what was asked for, seen by the kernel's own mount tables."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ghostpool import _linux
from ghostpool._build import BuildError, marshal, unmarshal
from ghostpool._buildspec import MountSpec, NamespaceSpec, Node
from ghostpool._images import read_images
from ghostpool._linux import ATIME_MASK, Attr
from ghostpool._mountinfo import LiveMount
from ghostpool._sandbox import specs_from_images
from ghostpool.testing._forked import in_child
from ghostpool.testing._namespace import enter
from ghostpool.testing._targets import built
from tests.support.namespaces import become_ordinary_user, inside, mountinfo
from tests.support.truth import specs_from_truth

CORPUS = Path(__file__).parents[1] / "corpus"
CASES = sorted(path.parent.name for path in CORPUS.glob("*/truth.json"))

pytestmark = pytest.mark.needs_mount_ns

ROOT = MountSpec(1, 0, b"/", superblock=1, source="rootfs", options="size=1m,mode=755")


def tmpfs(number: int, mountpoint: bytes, **fields: Any) -> MountSpec:
    """A tmpfs of its own on the root, unless `fields` say otherwise."""
    defaults: dict[str, Any] = {
        "parent": 1,
        "superblock": number,
        "source": f"t{number}",
        "options": "mode=755",
    }
    return MountSpec(id=number, mountpoint=mountpoint, **(defaults | fields))


def one(*mounts: MountSpec) -> tuple[NamespaceSpec]:
    return (NamespaceSpec(7, (ROOT, *mounts)),)


def live_by_id(spec: NamespaceSpec, table: Sequence[LiveMount]) -> dict[int, LiveMount]:
    """Which live mount is which of the specs: by parent and mount point, from the root on."""
    by_place = {(mount.parent, mount.mountpoint): mount for mount in table}
    assert len(by_place) == len(table) == len(spec.mounts)
    ids = {mount.mnt_id for mount in table}
    (root,) = (mount for mount in table if mount.parent not in ids)
    found = {spec.mounts[0].id: root}
    waiting = list(spec.mounts[1:])
    while waiting:
        ready = [mount for mount in waiting if mount.parent in found]
        assert ready, f"no live parent for {waiting}"
        for mount in ready:
            waiting.remove(mount)
            key = (found[mount.parent].mnt_id, mount.mountpoint)
            assert key in by_place, f"{mount.mountpoint!r} is not on its parent"
            found[mount.id] = by_place[key]
    return found


def check(
    specs: Sequence[NamespaceSpec], fds: Sequence[int], supplied: frozenset[int] = frozenset()
) -> dict[int, LiveMount]:
    """Every live mount is its spec in all that mountinfo tells; the live mounts by spec id.

    Peer groups and superblocks are compared as equal and different over all namespaces, since
    their numbers are the kernel's. `supplied`: ids of mounts whose file system is the caller's.
    """
    assert len(specs) == len(fds)
    live: dict[int, LiveMount] = {}
    for spec, fd in zip(specs, fds, strict=True):
        live |= live_by_id(spec, mountinfo(fd))
    everything = [mount for spec in specs for mount in spec.mounts]
    groups: dict[tuple[int, int], int] = {}
    devices: dict[int, int] = {}
    members = {(m.superblock, m.shared_group) for m in everything if m.shared_group}
    for mount in everything:
        real = live[mount.id]
        assert real.mountpoint == mount.mountpoint
        assert real.attributes == mount.attributes, mount.mountpoint
        if mount.id not in supplied:
            assert real.fstype == mount.fstype
            assert real.source == mount.source
            assert real.root == mount.root
            assert real.superblock_read_only == mount.read_only_superblock
        assert devices.setdefault(mount.superblock, real.device) == real.device
        master = mount.master_group
        if (mount.superblock, master) not in members:
            master = 0
        for wanted, got in ((mount.shared_group, real.shared_group), (master, real.master_group)):
            assert bool(wanted) == bool(got), mount.mountpoint
            if wanted:
                assert groups.setdefault((mount.superblock, wanted), got) == got
    assert len(set(devices.values())) == len(devices)
    assert len(set(groups.values())) == len(groups)
    return live


# The corpus.


def load(case: str) -> tuple[NamespaceSpec, ...]:
    truth = json.loads((CORPUS / case / "truth.json").read_text())
    return specs_from_truth(truth)


def test_the_corpus_is_there() -> None:
    assert len(CASES) >= 9


@pytest.mark.parametrize("case", CASES)
def test_mounts_of_the_truth(case: str) -> None:
    """Built from truth.json, every mount is as truth.json says."""
    specs = load(case)
    with built(specs) as fds:
        check(specs, fds)


@pytest.mark.parametrize("case", CASES)
def test_mounts_of_the_images(case: str, tmp_path: Path) -> None:
    """Built from the images, every mount is as truth.json says."""
    truth = load(case)
    external = {}
    if case == "03-sparse-fiemap":
        external = {"disk0": str(tmp_path)}
    specs = specs_from_images(read_images(CORPUS / case / "images"), external)
    order = {spec.mounts[0].id: spec for spec in truth}
    supplied = frozenset(m.id for spec in specs for m in spec.mounts if m.external is not None)
    assert len(supplied) == len(external)
    with built(specs) as fds:
        check([order[spec.mounts[0].id] for spec in specs], fds, supplied)


@pytest.mark.parametrize("case", CASES)
def test_files_of_the_truth(case: str) -> None:
    """Every file is there with its metadata, and no other one but mount points."""
    specs = load(case)

    def look() -> list[tuple[Any, ...]]:
        found = []
        for where, directories, files in os.walk(b"/"):
            if where == b"/":
                directories[:] = [name for name in directories if name != b"proc"]
            for name in directories + files:
                path = os.path.join(where, name)
                st = os.lstat(path)
                data = Path(os.fsdecode(path)).read_bytes() if stat.S_ISREG(st.st_mode) else b""
                facts = (st.st_mode, st.st_uid, st.st_gid, st.st_rdev, st.st_nlink, st.st_mtime_ns)
                found.append((path, facts, data))
        return found

    with built(specs) as fds:
        for spec, fd in zip(specs, fds, strict=True):
            places = {mount.mountpoint for mount in spec.mounts}
            names = {path: (facts, data) for path, facts, data in inside(fd, look)}
            for node in (node for mount in spec.mounts for node in mount.nodes):
                if node.path in places:
                    continue
                (mode, uid, gid, rdev, links, mtime), data = names.pop(node.path)
                assert (mode, uid, gid, rdev) == (node.mode, node.uid, node.gid, node.rdev)
                if stat.S_ISREG(mode) and node.hard_link_of is None:
                    assert data == node.data
                if node.hard_link_of is not None:
                    assert links > 1
                if node.mtime_ns is not None:
                    assert mtime == node.mtime_ns
            if spec is specs[0]:
                assert set(names) <= places | {os.path.dirname(place) for place in places}


# Shapes that the corpus lacks.


def test_stacked_mounts() -> None:
    """Mounts on one mount point lie on each other in the order given."""
    specs = one(
        tmpfs(2, b"/s"),
        tmpfs(3, b"/s", parent=2),
        tmpfs(4, b"/s", parent=3),
        tmpfs(5, b"/s/below", parent=2),
        tmpfs(6, b"/s/top", parent=4),
    )
    with built(specs) as fds:
        live = check(specs, fds)
        top = inside(fds[0], lambda: (os.stat("/s").st_dev, os.listdir("/s")))
    assert top == (live[4].device, ["top"])


@pytest.mark.parametrize("hidden_first", [True, False])
def test_hidden_child(hidden_first: bool) -> None:
    """A mount below another one's mount point, both on one parent, is on that parent."""
    below, above = tmpfs(2, b"/a/b"), tmpfs(3, b"/a")
    pair = (below, above) if hidden_first else (above, below)
    specs = one(*pair, tmpfs(4, b"/a/b", parent=3))
    with built(specs) as fds:
        live = check(specs, fds)
        assert inside(fds[0], lambda: os.stat("/a/b").st_dev) == live[4].device


def test_mount_on_the_root() -> None:
    """What is stacked on the root is what a process that enters sees as the root."""
    specs = one(
        tmpfs(2, b"/", shared_group=5), tmpfs(3, b"/x", parent=2), tmpfs(4, b"/under", parent=1)
    )
    with built(specs) as fds:
        table = mountinfo(fds[0])
    assert {mount.mountpoint: mount.source for mount in table} == {b"/": "t2", b"/x": "t3"}
    assert [mount.shared_group > 0 for mount in table] == [True, False]


def test_peer_group_across_namespaces() -> None:
    """Peers in two namespaces are one group: what is mounted in one appears in the other."""
    specs = (
        NamespaceSpec(7, (ROOT._replace(shared_group=3), tmpfs(2, b"/p", shared_group=9))),
        NamespaceSpec(
            8,
            (
                ROOT._replace(id=11, shared_group=3),
                tmpfs(12, b"/p", superblock=2, source="t2", parent=11, shared_group=9),
                tmpfs(13, b"/q", parent=11),
            ),
        ),
    )
    with built(specs) as fds:
        live = check(specs, fds)
        assert live[2].shared_group == live[12].shared_group
        assert propagates(fds[0], fds[1], b"/p")
        assert propagates(fds[1], fds[0], b"/p")
        check(specs, fds)


def test_slave_in_another_namespace() -> None:
    """A slave receives what is mounted on its master, and gives nothing back."""
    specs = (
        NamespaceSpec(7, (ROOT, tmpfs(2, b"/m", shared_group=9))),
        NamespaceSpec(
            8,
            (
                ROOT._replace(id=11),
                tmpfs(12, b"/s", superblock=2, source="t2", parent=11, master_group=9),
                tmpfs(
                    13,
                    b"/both",
                    superblock=2,
                    source="t2",
                    parent=11,
                    master_group=9,
                    shared_group=4,
                ),
                tmpfs(14, b"/again", superblock=2, source="t2", parent=11, master_group=4),
            ),
        ),
    )
    with built(specs) as fds:
        check(specs, fds)
        assert propagates(fds[0], fds[1], b"/m", b"/s")
        assert propagates(fds[0], fds[1], b"/m", b"/again")
        assert not propagates(fds[1], fds[0], b"/s", b"/m")
        assert propagates(fds[1], fds[1], b"/both", b"/again")
        check(specs, fds)


def propagates(source: int, target: int, path: bytes, other: bytes | None = None) -> bool:
    """A tmpfs mounted on `path` in `source` appears on `other` in `target`; gone afterwards."""

    def child() -> bool:
        def device(namespace: int, where: bytes) -> int:
            enter(namespace)
            return os.stat(where).st_dev

        before = device(target, other or path)
        enter(source)
        _linux.mount(b"probe", path, b"tmpfs", 0)
        try:
            return device(target, other or path) != before
        finally:
            enter(source)
            _linux.umount2(path, 0)

    return bool(in_child(child))


def test_master_without_members() -> None:
    """A slave whose master is nowhere in the build becomes private; a shared one stays shared."""
    specs = one(tmpfs(2, b"/a", master_group=9), tmpfs(3, b"/b", master_group=8, shared_group=5))
    with built(specs) as fds:
        check(specs, fds)


def test_masters_in_a_circle_end() -> None:
    """Contradictory groups neither hang nor crash the builder."""
    specs = one(
        tmpfs(2, b"/a", shared_group=1, master_group=2),
        tmpfs(3, b"/b", superblock=2, shared_group=2, master_group=1),
    )
    with built(specs) as fds:
        assert len(mountinfo(fds[0])) == 3


@pytest.mark.parametrize(
    "attributes",
    [
        Attr.NOSYMFOLLOW,
        Attr.NOATIME,
        Attr.STRICTATIME,
        Attr(0),
        Attr.NODIRATIME,
        Attr.NOATIME | Attr.NODIRATIME,
        Attr.RDONLY | Attr.NOSUID | Attr.NODEV | Attr.NOEXEC | Attr.STRICTATIME,
    ],
    ids=str,
)
def test_attributes(attributes: Attr) -> None:
    """The attributes are exactly those of the spec, on the mount and on a bind of it."""
    other = int(Attr.NOSUID) if attributes & ATIME_MASK else int(Attr.STRICTATIME)
    specs = one(
        tmpfs(2, b"/a", attributes=int(attributes)),
        tmpfs(3, b"/b", superblock=2, source="t2", attributes=other),
    )
    with built(specs) as fds:
        check(specs, fds)


def test_unbindable() -> None:
    """An unbindable mount refuses to be bound, and is no one's peer."""
    specs = one(tmpfs(2, b"/a", unbindable=True))

    def bind() -> None:
        os.mkdir("/b")
        _linux.mount(b"/a", b"/b", None, _linux.MS_BIND)

    with built(specs) as fds:
        check(specs, fds)
        with pytest.raises(OSError, match=rf"Errno {errno.EINVAL}\]"):
            inside(fds[0], bind)


def test_file_bind_mount() -> None:
    """A file can be mounted on a file; both are made where they are missing."""
    node = Node(b"/a/f", stat.S_IFREG | 0o640, data=b"content")
    specs = one(
        tmpfs(2, b"/a", nodes=(node,)),
        tmpfs(3, b"/etc/f", superblock=2, source="t2", root=b"/f", is_file=True),
        tmpfs(4, b"/g", superblock=2, source="t2", root=b"/new/g", is_file=True),
    )
    with built(specs) as fds:
        check(specs, fds)
        text, mode, size = inside(
            fds[0],
            lambda: (
                Path("/etc/f").read_text(),
                os.stat("/etc/f").st_mode,
                os.path.getsize("/g"),
            ),
        )
    assert (text, mode, size) == ("content", node.mode, 0)


def test_bind_of_a_directory_made_later() -> None:
    """The root of a bind mount may be a node that is made after it; its mode is the node's."""
    specs = one(
        tmpfs(2, b"/z/deep", superblock=9, source="t9", root=b"/x/y"),
        tmpfs(
            9,
            b"/t",
            nodes=(
                Node(b"/t/x", stat.S_IFDIR | 0o711, 4, 5),
                Node(b"/t/x/y", stat.S_IFDIR | 0o700, mtime_ns=10**9),
                Node(b"/t/x/y/f", stat.S_IFLNK | 0o777, target=b"there"),
            ),
        ),
    )

    def look() -> tuple[Any, ...]:
        st = os.stat("/z/deep")
        x = os.stat("/t/x")
        return (
            stat.S_IMODE(st.st_mode),
            st.st_mtime_ns,
            os.readlink("/z/deep/f"),
            stat.S_IMODE(x.st_mode),
            x.st_uid,
            x.st_gid,
        )

    with built(specs) as fds:
        check(specs, fds)
        assert inside(fds[0], look) == (0o700, 10**9, "there", 0o711, 4, 5)


def test_external_directory_and_file(tmp_path: Path) -> None:
    """A path of the caller's is mounted in the namespace, with the spec's attributes."""
    (tmp_path / "dir" / "sub").mkdir(parents=True)
    (tmp_path / "dir" / "sub" / "f").write_text("inner")
    (tmp_path / "file").write_text("outer")
    names = sorted(tmp_path.rglob("*"))
    directory, file = os.fsencode(tmp_path / "dir"), os.fsencode(tmp_path / "file")
    specs = one(
        tmpfs(2, b"/d", external=directory, attributes=int(Attr.RDONLY), shared_group=3),
        tmpfs(3, b"/s", superblock=2, external=directory, root=b"/sub", shared_group=3),
        tmpfs(4, b"/f", external=file, is_file=True, read_only_superblock=True),
    )
    with built(specs) as fds:
        table = mountinfo(fds[0])
        texts = inside(
            fds[0],
            lambda: [Path(p).read_text() for p in ("/d/sub/f", "/s/f", "/f")],
        )
    assert texts == ["inner", "inner", "outer"]
    found = {mount.mountpoint: mount for mount in table}
    assert found[b"/d"].attributes == Attr.RDONLY
    assert found[b"/s"].attributes == 0
    assert found[b"/d"].shared_group == found[b"/s"].shared_group != 0
    # The superblock is the machine's: the mount is read-only in its place.
    assert found[b"/f"].attributes == Attr.RDONLY
    assert not found[b"/f"].superblock_read_only
    assert sorted(tmp_path.rglob("*")) == names


def test_nothing_is_made_below_an_external_path(tmp_path: Path) -> None:
    """A mount point that an external directory lacks is an error, and stays missing."""
    specs = one(tmpfs(2, b"/d", external=os.fsencode(tmp_path)), tmpfs(3, b"/d/missing", parent=2))
    with pytest.raises(BuildError, match="missing") as caught, built(specs):
        pass
    assert (caught.value.errno, caught.value.mount_id) == (errno.ENOENT, 3)
    assert not os.listdir(tmp_path)


def test_external_supplies_the_root(tmp_path: Path) -> None:
    """A directory can be the root, also of two namespaces."""
    (tmp_path / "mnt").mkdir()
    root = ROOT._replace(external=os.fsencode(tmp_path))
    specs = (
        NamespaceSpec(1, (root, tmpfs(2, b"/mnt"))),
        NamespaceSpec(2, (root._replace(id=11), tmpfs(12, b"/mnt", parent=11))),
    )
    with built(specs) as fds:
        check(specs, fds, frozenset((1, 11)))


def test_read_only_superblock() -> None:
    """It stays writable until the last namespace has its files; then it refuses even root."""
    first = tmpfs(2, b"/a", read_only_superblock=True)
    later = tmpfs(
        12,
        b"/b",
        superblock=2,
        source="t2",
        parent=11,
        read_only_superblock=True,
        nodes=(Node(b"/b/f", stat.S_IFREG | 0o600, data=b"x"),),
    )
    specs = (
        NamespaceSpec(7, (ROOT, first)),
        NamespaceSpec(8, (ROOT._replace(id=11), later)),
    )
    with built(specs) as fds:
        check(specs, fds)
        assert inside(fds[0], lambda: os.listdir("/a")) == ["f"]
        with pytest.raises(OSError, match=rf"Errno {errno.EROFS}\]"):
            inside(fds[1], lambda: os.mkdir("/b/new"))


def test_missing_mount_points() -> None:
    """Missing directories are made on the parent mount, mode 0755, whatever the umask."""
    specs = one(tmpfs(2, b"/x/y/z", parent=1), tmpfs(3, b"/x/y/z/w v", parent=2))

    def look() -> list[int]:
        return [stat.S_IMODE(os.stat(path).st_mode) for path in ("/x", "/x/y", "/x/y/z/w v")]

    with built(specs, before=lambda: os.umask(0o077) and None) as fds:
        check(specs, fds)
        assert inside(fds[0], look) == [0o755] * 3


def test_kernel_file_systems() -> None:
    """proc, devpts and a file system of the kernel's own, binds of their parts included."""
    specs = one(
        tmpfs(2, b"/proc", fstype="proc", source="proc", options=""),
        tmpfs(
            3,
            b"/proc/sys",
            parent=2,
            superblock=2,
            fstype="proc",
            source="proc",
            options="",
            root=b"/sys",
            attributes=int(Attr.RDONLY),
        ),
        tmpfs(
            4,
            b"/dev/pts",
            fstype="devpts",
            source="devpts",
            options="mode=620,ptmxmode=666",
            read_only_superblock=True,
        ),
        tmpfs(
            5,
            b"/dev/ptmx",
            superblock=4,
            fstype="devpts",
            source="devpts",
            root=b"/ptmx",
            options="mode=620,ptmxmode=666",
            read_only_superblock=True,
        ),
        tmpfs(6, b"/sys", fstype="sysfs", options="", read_only_superblock=True),
    )
    with built(specs) as fds:
        table = {mount.mountpoint: mount for mount in mountinfo(fds[0])}
        ptmx = inside(fds[0], lambda: os.stat("/dev/ptmx").st_mode)
    assert table[b"/proc/sys"].parent == table[b"/proc"].mnt_id
    assert table[b"/proc/sys"].device == table[b"/proc"].device
    assert table[b"/proc/sys"].attributes == Attr.RDONLY
    assert table[b"/dev/pts"].superblock_read_only
    assert ptmx == stat.S_IFCHR | 0o666
    # The machine's own sysfs must not turn read-only; the mount does.
    assert table[b"/sys"].fstype == "sysfs"
    assert not table[b"/sys"].superblock_read_only
    assert table[b"/sys"].attributes & Attr.RDONLY


def test_many_namespaces_share_superblocks() -> None:
    """A hundred namespaces over one root, each with a mount of its own."""
    specs = [
        NamespaceSpec(
            number,
            (
                ROOT._replace(id=10 * number + 1),
                tmpfs(10 * number + 2, b"/own", parent=10 * number + 1),
            ),
        )
        for number in range(1, 101)
    ]
    with built(specs) as fds:
        check(specs, fds)


@pytest.mark.parametrize(
    ("mounts", "number", "mount_id"),
    [
        ((tmpfs(2, b"/a", fstype="nonesuch"),), errno.ENODEV, 2),
        ((tmpfs(2, b"/a", options="nonesuch=1"),), errno.EINVAL, 2),
        ((tmpfs(2, b"/a"), tmpfs(3, b"/b", parent=2)), errno.EINVAL, 3),
        ((tmpfs(2, b"/a", parent=99),), errno.ENOENT, 2),
        ((tmpfs(2, b"/a", external=b"/nonesuch"),), errno.ENOENT, 2),
        (
            (
                tmpfs(2, b"/a", nodes=(Node(b"/a/l", stat.S_IFLNK | 0o777, target=b"/"),)),
                tmpfs(3, b"/a/l", parent=2),
            ),
            errno.ELOOP,
            3,
        ),
    ],
)
def test_errors_name_the_mount(mounts: tuple[MountSpec, ...], number: int, mount_id: int) -> None:
    """A failure carries errno, system call, path and mount as fields."""
    with pytest.raises(BuildError, match=errno.errorcode[number]) as caught, built(one(*mounts)):
        pass
    assert (caught.value.errno, caught.value.mount_id) == (number, mount_id)
    assert caught.value.syscall
    assert caught.value.path.startswith("/")


def test_the_builder_leaves_nothing(tmp_path: Path) -> None:
    """Mounts and descriptors of the process are as before; no child is left, dead or alive."""

    def state() -> tuple[bytes, list[str], list[str]]:
        mounts = Path("/proc/self/mountinfo").read_bytes()
        return mounts, sorted(os.listdir("/proc/self/fd")), os.listdir(tmp_path)

    before = state()
    good = one(tmpfs(2, b"/a", shared_group=1), tmpfs(3, b"/d", external=os.fsencode(tmp_path)))
    bad = one(*good[0].mounts[1:], tmpfs(4, b"/b", fstype="nonesuch"))
    with built(good):
        assert state()[0] == before[0]
    with pytest.raises(BuildError, match="ENODEV"), built(bad):
        pass
    assert state() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_namespace_needs_a_root() -> None:
    with pytest.raises(BuildError, match="pivot_root"), built([NamespaceSpec(1, ())]):
        pass


def test_marshal_gives_back_the_specs() -> None:
    specs = (*load(CASES[0]), *one(tmpfs(2, b"/a", nodes=(Node(b"/a/f", stat.S_IFREG),))))
    assert unmarshal(marshal(specs)) == specs


@pytest.mark.needs_userns
def test_as_an_ordinary_user(tmp_path: Path) -> None:
    """In an unprivileged user namespace proc and sysfs are the caller's own, bound."""
    tmp_path.chmod(0o755)
    node = Node(b"/t/d/f", stat.S_IFREG | 0o600, data=b"x")
    specs = one(
        tmpfs(2, b"/t", nodes=(node,), attributes=int(Attr.RDONLY), shared_group=2),
        tmpfs(3, b"/t2", superblock=2, source="t2", master_group=2),
        tmpfs(4, b"/proc", fstype="proc", options="", attributes=int(Attr.NOSUID)),
        tmpfs(5, b"/sys", fstype="sysfs", options=""),
        tmpfs(6, b"/ro", read_only_superblock=True),
        tmpfs(7, b"/dev/pts", fstype="devpts", options=""),
    )
    with built(specs, before=become_ordinary_user) as fds:
        table = {mount.mountpoint: mount for mount in mountinfo(fds[0])}
        assert table[b"/t"].attributes == Attr.RDONLY
        assert table[b"/t2"].master_group == table[b"/t"].shared_group != 0
        assert table[b"/ro"].superblock_read_only
        assert table[b"/dev/pts"].fstype == "devpts"
        assert table[b"/proc"].fstype == "proc"
        assert table[b"/proc"].attributes & Attr.NOSUID
        assert table[b"/sys"].fstype == "sysfs"
        assert inside(fds[0], lambda: Path("/t2/d/f").read_bytes()) == b"x"
