"""The image reader on what no dump of the corpus shows, made by the image writer."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ghostpool._errors import ImageError
from ghostpool._images import read_images
from ghostpool._model import HOST_NS, NsId, RegId
from tests.support.corpus import content
from tests.support.imagewriter import (
    LINKED,
    PIPE,
    PROCFS,
    TTY,
    ImageSet,
    message,
    small,
)


def test_the_writer_makes_what_the_reader_reads(tmp_path: Path) -> None:
    images = read_images(small().write(tmp_path))
    (task,) = images.tasks
    assert [row.number for row in task.descriptors] == [3, 4]
    (ghost,) = images.ghosts.values()
    assert (ghost.size, ghost.uid, ghost.mode) == (7, 7, 0o100644)
    assert (ghost.atime, ghost.mtime) == (1_600_000_000_000_001, 1_500_000_000_000_002)
    assert b"".join(content(tmp_path, ghost)) == b"content"
    assert [mount.mountpoint for mount in images.mounts[NsId(10)]] == [b"/", b"/data"]


def test_one_magic_word_in_format_1(tmp_path: Path) -> None:
    made = ImageSet(version=1)
    made.task()
    made.open(1, 3, "/gone", ghost=made.ghost(b"x"))
    assert len(read_images(made.write(tmp_path)).ghosts) == 1


def test_images_without_an_own_mount_namespace(tmp_path: Path) -> None:
    made = ImageSet(own_mounts=False)
    made.task()
    made.task(2)
    made.open(2, 3, "/gone", ghost=made.ghost(b"x"))
    images = read_images(made.write(tmp_path))
    assert images.mounts == {}
    assert images.root_namespace == HOST_NS
    assert {task.namespace for task in images.tasks} == {HOST_NS}
    assert {reg.mnt_id for reg in images.files.values()} == {None}


def test_own_user_namespace(tmp_path: Path) -> None:
    made = ImageSet(own_user_namespace=True)
    made.task()
    assert read_images(made.write(tmp_path)).own_user_namespace


def test_zombies_are_left_out(tmp_path: Path) -> None:
    made = small()
    made.task(2, zombie=True)
    made.task(3, threads=(4,))
    assert [task.pid for task in read_images(made.write(tmp_path)).tasks] == [1, 3]


def test_a_shared_descriptor_table(tmp_path: Path) -> None:
    made = small()
    made.task(2, files_id=101)
    first, second = read_images(made.write(tmp_path)).tasks
    assert first.descriptors == second.descriptors != ()


def test_holders(tmp_path: Path) -> None:
    """Mappings and directories hold ghosts too; holders of living files are not kept."""
    made = small()
    mapped = made.reg("/data/mapped", flags=0, size=3)
    made.remap(mapped, made.ghost(b"abc"))
    made.map(1, 0x1000, 0x2000, mapped)
    made.map(1, 0x2000, 0x3000, 99, status=0x201)  # anonymous: shmid is no file
    made.map(1, 0x3000, 0x4000, 99, status=0x4081)  # memfd: shmid is no reg file
    made.map(1, 0x4000, 0x5000, made.reg("/lib/so"))
    gone = made.reg("/data/dir", flags=0, mode=0o40755)
    made.remap(gone, made.ghost(mode=0o40755))
    made.cwd(1, gone)
    (task,) = read_images(made.write(tmp_path)).tasks
    assert [(holder.key, holder.reg_id, holder.flags) for holder in task.holders] == [
        ("cwd", gone, None),
        ("map:1000-2000", mapped, os.O_RDONLY),
    ]


@pytest.mark.parametrize(
    ("prot", "flags", "told", "expected"),
    [
        (1, 1, None, os.O_RDONLY),
        (3, 1, None, os.O_RDWR),
        (2, 1, None, os.O_RDWR),
        (3, 2, None, os.O_RDONLY),
        (3, 1, os.O_RDONLY, os.O_RDONLY),
        (1, 1, os.O_RDWR, os.O_RDWR),
    ],
)
def test_flags_of_mappings(
    tmp_path: Path, prot: int, flags: int, told: int | None, expected: int
) -> None:
    """What the image says, or what such a mapping takes."""
    made = small()
    mapped = made.reg("/data/mapped", flags=0, size=3)
    made.remap(mapped, made.ghost(b"abc"))
    made.map(1, 0x1000, 0x2000, mapped, prot=prot, flags=flags, fdflags=told)
    (holder,) = read_images(made.write(tmp_path)).tasks[0].holders
    assert holder.flags == expected


@pytest.mark.parametrize(
    ("second", "words"), [(0, "repeats map:1000-2000"), (1 << 31, "are no open flags")]
)
def test_mappings_that_can_not_be(tmp_path: Path, second: int, words: str) -> None:
    made = small()
    mapped = made.reg("/data/mapped", flags=0, size=3)
    made.remap(mapped, made.ghost(b"abc"))
    made.map(1, 0x1000, 0x2000, mapped, fdflags=second)
    made.map(1, 0x1000, 0x2000, mapped)
    with pytest.raises(ImageError, match=words):
        read_images(made.write(tmp_path))


def test_a_fifo_is_reached_through_its_reg_file(tmp_path: Path) -> None:
    made = small()
    ghost = made.ghost(mode=0o10600)
    reg = made.open_fifo(1, 5, "/data/fifo", ghost=ghost, pipe=9)
    made.open_fifo(1, 6, "/data/fifo", ghost=ghost, pipe=9)
    made.fifo_data(9, b"pending", size=4096)
    images = read_images(made.write(tmp_path))
    assert [row.fifo for row in images.tasks[0].descriptors] == [False, False, True, True]
    assert images.tasks[0].descriptors[2].reg_id == reg
    data = images.fifo_data[RegId(reg)]
    assert (list(images.fifo_data), data.length, data.pipe_size) == ([reg], 7, 4096)
    image = (tmp_path / "fifo-data.img").read_bytes()
    assert image[data.position :] == b"pending"


def test_a_terminal_is_reached_through_its_reg_file(tmp_path: Path) -> None:
    made = small()
    reg = made.reg("/dev/pts/0", mode=0o20620)
    made.fd(1, 7, made.file(TTY, 90, (19, message((1, 90), (6, reg)))), kind=TTY)
    made.fd(1, 8, made.file(TTY, 91, (19, message((1, 91)))), kind=TTY)
    rows = read_images(made.write(tmp_path)).tasks[0].descriptors
    assert [(row.number, row.reg_id) for row in rows][2:] == [(7, reg)]


def test_sockets(tmp_path: Path) -> None:
    """Those whose names were removed are descriptors; the others are left out."""
    made = small()
    made.socket(1, 5, b"/run/gone\0")
    made.socket(1, 6, b"/run/there", deleted=False)
    # The id of a reg file: before CRIU 3.4 each type had ids of its own.
    same = made.socket(1, 7, b"name", directory=b"/base", id=1, perms=(0o140640, 7, 8), type=2)
    images = read_images(made.write(tmp_path))
    assert same in images.files
    assert [one.path for one in images.sockets.values()] == [b"/run/gone", b"/base/name"]
    assert images.sockets.keys().isdisjoint(images.files)
    rows = images.tasks[0].descriptors
    assert [row.number for row in rows] == [3, 4, 5, 7]
    relative = images.sockets[rows[3].reg_id]
    assert (relative.name, relative.type, relative.owner) == (b"name", 2, (0o140640, 7, 8))


def test_pipes_are_only_known_to_be_there(tmp_path: Path) -> None:
    made = small()
    made.fd(1, 5, made.file(PIPE, 60), kind=PIPE)
    images = read_images(made.write(tmp_path))
    assert [row.number for row in images.tasks[0].descriptors] == [3, 4]


def test_external_files_have_any_name(tmp_path: Path) -> None:
    made = small()
    made.fd(1, 5, made.reg("file[1f5:2a]", ext=True, mnt_id=9999))
    reg = read_images(made.write(tmp_path)).files
    assert [file.name for file in reg.values() if file.external] == [b"file[1f5:2a]"]


def test_position_that_means_no_seek(tmp_path: Path) -> None:
    made = small()
    reg = made.open(1, 9, "/data/seekless", ghost=made.ghost(), pos=(1 << 64) - 1)
    files = read_images(made.write(tmp_path)).files
    assert next(file.position for file in files.values() if file.id == reg) is None


@pytest.mark.parametrize(
    ("written", "kind", "target"),
    [((1, None), "ghost", 1), ((1, 1), "ghost", 1), ((1, PROCFS), "procfs", 1)],
)
def test_kinds_of_remaps(
    written: tuple[int, int | None], kind: str, target: int, tmp_path: Path
) -> None:
    """Without a type, as before CRIU 1.4, the top bit of the id says that it is a ghost."""
    made = ImageSet()
    made.task()
    if kind == "ghost":
        made.ghost(b"x", id=1)
    reg = made.open(1, 3, "/gone")
    made.remap(reg, written[0] | (1 << 31 if written[1] is None else 0), written[1])
    (remap,) = read_images(made.write(tmp_path)).remaps
    assert (remap.kind, remap.target, remap.record) == (kind, target, 0)


@pytest.mark.parametrize("kind", [LINKED, None])
def test_linked_remaps(kind: int | None, tmp_path: Path) -> None:
    made = ImageSet()
    made.task()
    hidden = made.reg("/link_remap.77", id=77, flags=0, mode=None, with_mount=False)
    made.remap(made.open(1, 3, "/gone"), hidden, kind)
    (remap,) = read_images(made.write(tmp_path)).remaps
    assert (remap.kind, remap.target) == ("linked", 77)


def test_a_ghost_that_nothing_holds_is_kept(tmp_path: Path) -> None:
    """An inotify mark can be all that is left of a file."""
    made = small()
    made.remap(made.reg("/data/watched", size=0), made.ghost())
    assert len(read_images(made.write(tmp_path)).ghosts) == 2


def test_chunks(tmp_path: Path) -> None:
    """Extents point at the payloads; chunks without content are dropped."""
    made = ImageSet()
    made.task()
    chunks = [(0, b"a" * 10), (10, b""), (10, b"b" * 9000), (20_000, b"c")]
    ghost_id = made.ghost(chunks=chunks, size=30_000)
    made.open(1, 3, "/gone", ghost=ghost_id)
    (ghost,) = read_images(made.write(tmp_path)).ghosts.values()
    assert [(extent.offset, extent.length) for extent in ghost.extents] == [
        (0, 10),
        (10, 9000),
        (20_000, 1),
    ]
    expected = b"a" * 10 + b"b" * 9000 + bytes(10_990) + b"c" + bytes(9999)
    assert b"".join(content(tmp_path, ghost)) == expected


def test_times(tmp_path: Path) -> None:
    """Times before 1970 are negative, absent ones None."""
    made = ImageSet()
    made.task()
    made.open(1, 3, "/gone", ghost=made.ghost(atime=-1, mtime=None))
    (ghost,) = read_images(made.write(tmp_path)).ghosts.values()
    assert (ghost.atime, ghost.mtime) == (-1, None)


def test_mount_fields(tmp_path: Path) -> None:
    made = ImageSet()
    made.mount("/", device=(254, 3))
    made.mount("/a", flags=0x21 | 0x20000, sb_flags=0x85, fstype_code=16, fsname="btrfs")
    made.mount("/b", ext_key="key", shared=5, master=6, flags=0x100000 | 0x80000, deleted=True)
    made.mount("/c", ext_mount=True, root="old", fstype="")
    made.task()
    root, a, b, c = read_images(made.write(tmp_path)).mounts[NsId(10)]
    assert root.device == os.makedev(254, 3)
    assert (a.fstype, a.flags, a.unbindable, a.superblock_flags) == ("btrfs", 0x21, True, 0x91)
    assert (b.external_key, b.shared_group, b.master_group, b.flags) == ("key", 5, 6, 0)
    assert b.deleted_root
    assert (c.external_key, c.fstype, c.unbindable) == ("old", "", False)


def test_mounts_stacked_on_the_root(tmp_path: Path) -> None:
    """The root is the one whose parent is not there, not whatever lies at "/"."""
    made = ImageSet()
    made.mount("/", id=500)
    made.mount("/", id=501, parent=500)
    made.mount("/a", id=502, parent=501)
    made.task()
    made.open(1, 3, "/a/gone", ghost=made.ghost())
    mounts = read_images(made.write(tmp_path)).mounts[NsId(10)]
    assert [mount.id for mount in mounts] == [500, 501, 502]


def test_mounts_listed_before_their_parents(tmp_path: Path) -> None:
    """A moved mount can come before the mount that it lies on."""
    made = small()
    images = made.images()
    made.mount("/data/deep", id=502)
    images["mountpoints-10.img"] = made.images()["mountpoints-10.img"]
    images["mountpoints-10.img"].reverse()
    for _ in range(3):
        images["mountpoints-10.img"].append(images["mountpoints-10.img"].pop(0))
        mounts = read_images(made.write(tmp_path, images)).mounts[NsId(10)]
        assert [mount.id for mount in mounts] == [500, 501, 502]


def test_reading_grows_with_the_images_only(tmp_path: Path) -> None:
    """Four times the ghosts take about four times as long, not sixteen times."""

    def seconds(ghosts: int) -> float:
        made = ImageSet()
        made.task()
        for number in range(ghosts):
            made.open(1, number + 3, f"/gone{number}", ghost=made.ghost(b"x"))
        directory = made.write(tmp_path / str(ghosts))
        times = []
        for _ in range(3):
            start = time.process_time()
            assert len(read_images(directory).ghosts) == ghosts
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(2000) < 10 * seconds(500)
