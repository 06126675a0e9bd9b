"""Dead directories, in all the ways that ghosts lie in them and share their names."""

from __future__ import annotations

import itertools
import stat
from pathlib import Path
from typing import Any

import anyio
import pytest

from ghostpool import _run
from ghostpool._buildspec import Node
from ghostpool._launch import launch
from ghostpool._model import NsId
from ghostpool._planned import Policy
from ghostpool._report import Report
from ghostpool._restored import Restored
from tests.kernel.test_places import (
    O_DIRECTORY,
    TREE,
    Outcome,
    directory,
    images_of,
    mount,
    namespace,
    restore,
)
from tests.support.imagewriter import ImageSet
from tests.support.restore import look

pytestmark = pytest.mark.needs_mount_ns


def links(outcome: Outcome) -> dict[int, str]:
    """Where the descriptors lead, below /data."""
    return {n: f.link.partition("/data/")[2] for n, f in sorted(outcome.files.items())}


def kept(images: Path, fd: int) -> dict[str, tuple[Any, ...]]:
    """The files of the namespace after a restore with --keep: mode, owner and group first."""
    request = _run.Request(
        str(images), 4, namespaces={NsId(10): f"/proc/self/fd/{fd}"}, policy=Policy(keep=True)
    )

    async def deliver(run: _run.Prepared, restored: Restored) -> None:
        pass

    async def story() -> None:
        await _run.run_restore(request, launch(), Report(), deliver)

    anyio.run(story, backend="trio")
    return look(fd, "/data").files


def test_many_in_one_dead_directory(tmp_path: Path) -> None:
    """It is made for them, whatever they are, and is gone when the last of them is."""
    images = images_of({"/data": "/"})
    for number in range(3, 7):
        images.open(1, number, f"/data/gone/deep/f{number}", ghost=images.ghost(b"%d" % number))
    images.open(1, 7, "/data/gone/beside", ghost=images.ghost(b"7"))
    images.open_fifo(1, 8, "/data/gone/deep/pipe", ghost=images.ghost(mode=0o10600))
    images.write(tmp_path)
    with namespace(mount(2, "/data")) as fd:
        outcome = restore(tmp_path, fd)
    assert links(outcome) == {
        **{number: f"gone/deep/f{number} (deleted)" for number in range(3, 7)},
        7: "gone/beside (deleted)",
        8: "gone/deep/pipe (deleted)",
    }
    assert all(outcome.files[n].content == b"%d" % n for n in range(3, 8))
    assert {f.nlink for f in outcome.files.values()} == {0}


def nested(order: tuple[int, ...]) -> ImageSet:
    """A dead directory in a dead one in a missing one, and a file in it, recorded in this order."""
    images = images_of({"/data": "/"})
    outer = images.ghost(mode=0o41750, uid=7, gid=8, mtime=1_300_000_000_000_009)
    inner = images.ghost(mode=0o40711, uid=9, gid=10, mtime=1_400_000_000_000_007)
    file = images.ghost(b"deep", uid=11, gid=12)
    opens = (
        ("/data/gone/outer", outer, O_DIRECTORY),
        ("/data/gone/outer/inner", inner, O_DIRECTORY),
        ("/data/gone/outer/inner/file", file, 0o100000),
    )
    for which in order:
        name, ghost, flags = opens[which]
        images.open(1, 3 + which, name, ghost=ghost, flags=flags)
    return images


@pytest.mark.long
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_dead_directories_recorded_in_any_order(tmp_path: Path, order: tuple[int, ...]) -> None:
    """A directory of the images is the parent of what lay in it: there is no other beside it."""
    nested(order).write(tmp_path)
    with namespace(mount(2, "/data")) as fd:
        outcome = restore(tmp_path, fd)
    assert links(outcome) == {
        3: "gone/outer (deleted)",
        4: "gone/outer/inner (deleted)",
        5: "gone/outer/inner/file (deleted)",
    }
    assert outcome.files[3].mtime_us == 1_300_000_000_000_009
    assert outcome.files[4].mtime_us == 1_400_000_000_000_007
    assert outcome.files[5].content == b"deep"
    assert {f.nlink for f in outcome.files.values()} == {0}


def test_parents_have_the_recorded_owner_and_mode(tmp_path: Path) -> None:
    """Where the images know a directory; what they do not know is root's. Shown by keeping it."""
    nested((2, 1, 0)).write(tmp_path)
    with namespace(mount(2, "/data")) as fd:
        files = kept(tmp_path, fd)
    assert {path: seen[:3] for path, seen in files.items() if path != "/data"} == {
        "/data/gone": (stat.S_IFDIR | 0o755, 0, 0),
        "/data/gone/outer": (stat.S_IFDIR | 0o1750, 7, 8),
        "/data/gone/outer/inner": (stat.S_IFDIR | 0o711, 9, 10),
        "/data/gone/outer/inner/file": (stat.S_IFREG | 0o644, 11, 12),
    }


def test_nested_by_different_binds(tmp_path: Path) -> None:
    """The outer one is made first, though by the root of its own mount it lies deeper."""
    images = images_of({"/data/a": "/a", "/data/inner": "/a/inner"})
    whole = next(m.id for m in images._mounts if m.mountpoint == "/data/a")
    inner = images.ghost(mode=0o40711)
    images.open(1, 3, "/data/inner/x/y", ghost=inner, flags=O_DIRECTORY)
    outer = images.ghost(mode=0o40755)
    images.open(1, 4, "/data/a/inner/x", ghost=outer, flags=O_DIRECTORY, mnt_id=whole)
    images.write(tmp_path)
    base = mount(2, "/base", nodes=TREE, superblock=2)
    binds = (
        mount(3, "/data/a", superblock=2, root=b"/a"),
        mount(4, "/data/inner", superblock=2, root=b"/a/inner"),
    )
    with namespace(base, *binds) as fd:
        outcome = restore(tmp_path, fd)
    assert links(outcome) == {3: "inner/x/y (deleted)", 4: "a/inner/x (deleted)"}


@pytest.mark.parametrize("count", [2, 5])
def test_directories_of_one_name(tmp_path: Path, count: int) -> None:
    """They wait under names of their own, and each has the old one when it goes."""
    images = images_of({"/data": "/"})
    for number in range(3, 3 + count):
        ghost = images.ghost(mode=0o40700 + number)
        images.open(1, number, "/data/gone/same", ghost=ghost, flags=O_DIRECTORY)
    images.write(tmp_path)
    with namespace(mount(2, "/data")) as fd:
        outcome = restore(tmp_path, fd)
    assert set(links(outcome).values()) == {"gone/same (deleted)"}
    assert len({f.inode for f in outcome.files.values()}) == count


def test_directory_and_files_of_one_name(tmp_path: Path) -> None:
    """A directory had the name, and files before and after it: all have it again, in turn."""
    images = images_of({"/data": "/"})
    images.open(1, 3, "/data/same", ghost=images.ghost(b"before"))
    images.open(1, 4, "/data/same", ghost=images.ghost(mode=0o40755), flags=O_DIRECTORY)
    images.open(1, 5, "/data/same", ghost=images.ghost(b"after"))
    images.write(tmp_path)
    with namespace(mount(2, "/data")) as fd:
        outcome = restore(tmp_path, fd)
    assert set(links(outcome).values()) == {"same (deleted)"}
    assert {f.nlink for f in outcome.files.values()} == {0}


def test_file_in_a_directory_of_a_files_name(tmp_path: Path) -> None:
    """What lies in the directory needs it by its name; then the file has the one beside it."""
    images = images_of({"/data": "/"})
    images.open(1, 3, "/data/same", ghost=images.ghost(b"file"))
    images.open(1, 4, "/data/same", ghost=images.ghost(mode=0o40755), flags=O_DIRECTORY)
    images.open(1, 5, "/data/same/inner", ghost=images.ghost(b"inner"))
    images.write(tmp_path)
    with namespace(mount(2, "/data")) as fd:
        outcome = restore(tmp_path, fd)
    assert links(outcome) == {
        3: "same.cr_link (deleted)",
        4: "same (deleted)",
        5: "same/inner (deleted)",
    }


def test_living_directory_of_a_dead_ones_name(tmp_path: Path) -> None:
    """What lies in it is left alone, and so is its owner."""
    images = images_of({"/data": "/"})
    ghost = images.ghost(mode=0o40700, uid=7)
    images.open(1, 3, "/data/here", ghost=ghost, flags=O_DIRECTORY)
    images.open(1, 4, "/data/here/file", ghost=images.ghost(b"dead"))
    images.write(tmp_path)
    living = (directory("/data/here"), Node(b"/data/here/file", 0o100600, data=b"living"))
    with namespace(mount(2, "/data", nodes=living)) as fd:
        outcome = restore(tmp_path, fd)
    assert links(outcome) == {3: "here.cr_link (deleted)", 4: "here/file.cr_link (deleted)"}
    assert outcome.files[4].content == b"dead"
