"""Ghosts on the file systems that containers have: ext4, xfs, btrfs and its subvolumes, overlayfs.

Each is a fresh one, on a loop device over a tmpfs, or over directories of a tmpfs, in a private
mount namespace that is gone with it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ghostpool import _linux
from ghostpool.testing import Namespace, private_namespace
from tests.support.imagewriter import ImageSet
from tests.support.live import run
from tests.support.restore import fetched, serving

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.long]

Maker = Callable[[Path, Path], None]
"""Mounts a fresh one on the second path, with what it is made of below the first."""
SIZE = 512 << 20


def command(*words: object) -> None:
    subprocess.run(list(map(str, words)), check=True, capture_output=True)


def on_loop(kind: str, *options: str) -> Maker:
    def make(home: Path, mountpoint: Path) -> None:
        image = home / "image"
        image.touch()
        os.truncate(image, SIZE)
        command(f"mkfs.{kind}", "-q", *options, image)
        command("mount", "-t", kind, "-o", "loop", image, mountpoint)
        fill(mountpoint)

    return make


def subvolume(home: Path, mountpoint: Path) -> None:
    """Its files have another device number than the mount table says."""
    top = home / "top"
    top.mkdir()
    on_loop("btrfs")(home, top)
    command("btrfs", "-q", "subvolume", "create", top / "sub")
    command("mount", "-o", "subvol=sub", home / "image", mountpoint)
    command("umount", top)
    fill(mountpoint)


def overlay(home: Path, mountpoint: Path) -> None:
    """All that is there is of the lower layer."""
    for name in ("lower", "upper", "work"):
        (home / name).mkdir()
    fill(home / "lower")
    layers = f"lowerdir={home}/lower,upperdir={home}/upper,workdir={home}/work"
    command("mount", "-t", "overlay", "overlay", "-o", layers, mountpoint)


def fill(root: Path) -> None:
    (root / "dir").mkdir()
    (root / "dir/living").write_text("living")


LOOP = pytest.mark.needs_loop
KINDS = [
    pytest.param(on_loop("ext4", "-F"), id="ext4", marks=LOOP),
    pytest.param(on_loop("xfs"), id="xfs", marks=pytest.mark.needs_xfs),
    pytest.param(on_loop("btrfs"), id="btrfs", marks=pytest.mark.needs_btrfs),
    pytest.param(subvolume, id="btrfs subvolume", marks=pytest.mark.needs_btrfs),
    pytest.param(overlay, id="overlay"),
]


@contextmanager
def mounted(make: Maker, home: Path, *, read_only: bool) -> Iterator[Namespace]:
    point = home / "m"
    point.mkdir()

    def setup() -> None:
        made_of = home / "made-of"
        made_of.mkdir()
        _linux.mount(b"tmpfs", os.fsencode(made_of), b"tmpfs", 0)
        make(made_of, point)
        if read_only:
            command("mount", "-o", "remount,bind,ro", point)

    with private_namespace(setup) as target:
        yield target


def images(home: Path) -> Path:
    point = str(home / "m")
    made = ImageSet()
    made.mount("/")
    made.mount(point, device=(0, 70), fstype="", flags=0x200001)
    made.task(1)
    made.open(1, 3, f"{point}/dir/gone", ghost=made.ghost(b"one", mode=0o100640, uid=7, gid=8))
    made.open(1, 4, f"{point}/dir/living", ghost=made.ghost(b"two"))
    made.open(1, 5, f"{point}/missing/parent/gone", ghost=made.ghost(b"three"))
    made.open(1, 6, f"{point}/gone", ghost=made.ghost(mode=0o40750), flags=0o200000)
    chunks = [(0, b"a" * 4096), (1 << 20, b"b" * 4096)]
    made.open(1, 7, f"{point}/sparse", ghost=made.ghost(chunks=chunks, size=2 << 20))
    return made.write(home / "images")


def names(target: Namespace, point: Path) -> list[tuple[str, int, int, bytes]]:
    def look() -> list[tuple[str, int, int, bytes]]:
        found = []
        for where, _, files in os.walk(point):
            status = os.lstat(where)
            found.append((where, status.st_mode, status.st_uid, b""))
            for name in files:
                path = Path(where, name)
                status = path.lstat()
                found.append((str(path), status.st_mode, status.st_uid, path.read_bytes()))
        return sorted(found)

    return target.run(look)


@pytest.mark.parametrize("strategy", ["remount", "detached"])
@pytest.mark.parametrize("make", KINDS)
def test_ghosts_of_all_kinds(make: Maker, strategy: str, tmp_path: Path) -> None:
    point = tmp_path / "m"
    with mounted(make, tmp_path, read_only=True) as target:
        before, table = names(target, point), target.mountinfo()
        where = ("-D", images(tmp_path), "-t", target.pid, "--strategy", strategy)
        with serving(*where) as served, fetched(served.socket, [1]) as probes:
            seen = probes[1].descriptors
            told = probes[1].ask("content")
        assert {fd: one["link"].removeprefix(str(point)) for fd, one in seen.items() if fd > 2} == {
            3: "/dir/gone (deleted)",
            4: "/dir/living.cr_link (deleted)",
            5: "/missing/parent/gone (deleted)",
            6: "/gone (deleted)",
            7: "/sparse (deleted)",
        }
        assert [(seen[3][key]) for key in ("mode", "uid", "gid", "size")] == [0o100640, 7, 8, 3]
        assert seen[7]["size"] == 2 << 20
        assert len(told) >= 4
        assert names(target, point) == before
        assert target.mountinfo() == table


def test_no_whiteout_stays_in_the_upper_layer(tmp_path: Path) -> None:
    """Directories of the lower layer are copied up, as with any file that is made in them."""
    with mounted(overlay, tmp_path, read_only=False) as target:
        done = run("restore", "-D", images(tmp_path), "-t", target.pid, "--discard")
        assert done.status == 0, done
        upper = names(target, tmp_path / "made-of" / "upper")
    assert [path.partition("/upper")[2] for path, *_ in upper] == ["", "/dir"]
