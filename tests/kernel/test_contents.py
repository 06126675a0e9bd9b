"""Rebuilt namespaces have in their tmpfs mounts what the images have of them."""

from __future__ import annotations

import gzip
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.support.imagewriter import ImageSet
from tests.support.live import Run, run

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.long]

ROOT, DATA = (0, 70), (0, 71)
NAME = f"tmpfs-dev-{DATA[1]}.tar.gz.img"
Entry = tuple[str, bytes, dict[str, object]]
"""Name, kind of tar(5) and the rest of the header, `data` being the content."""


def pack(
    path: Path,
    entries: Iterable[Entry],
    form: int = tarfile.GNU_FORMAT,
    change: Callable[[bytes], bytes] = bytes,
) -> Path:
    """An image of a tmpfs; `change` is done to what is packed."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=form) as tar:
        for name, kind, fields in entries:
            member = tarfile.TarInfo(name)
            member.type = kind
            data = b""
            for field, value in ({"mtime": 1_500_000_000} | fields).items():
                if field == "data":
                    assert isinstance(value, bytes)
                    data = value
                else:
                    setattr(member, field, value)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    path.write_bytes(gzip.compress(change(raw.getvalue()), 1))
    return path


def images(directory: Path, *, flags: int = 0x200001) -> Path:
    """A task with a ghost on /data, below a root that has the programs of the machine."""
    made = ImageSet()
    made.mount("/", device=ROOT)
    made.mount("/usr", device=(0, 72), ext_key="usr")
    made.mount("/data", device=DATA, flags=flags)
    made.task(1)
    made.open(1, 3, "/data/dir/gone", ghost=made.ghost(b"content"))
    made.write(directory)
    links = [name for name in ("bin", "lib", "lib64", "sbin") if os.path.islink(f"/{name}")]
    pack(
        directory / f"tmpfs-dev-{ROOT[1]}.tar.gz.img",
        [(f"./{name}", tarfile.SYMTYPE, {"linkname": os.readlink(f"/{name}")}) for name in links],
    )
    return directory


def restore(directory: Path, script: str, *options: str) -> Run:
    """Run a shell as the task. That it runs at all is due to links in the image of the root."""
    where: tuple[str | Path, ...] = ("-D", directory, "--external", "usr=/usr", *options)
    return run("restore", *where, "--", "/bin/sh", "-c", script)


LONG = "long/" + "n" * 200 + "/" + "m" * 120
CONTENTS: list[Entry] = [
    (".", tarfile.DIRTYPE, {"mode": 0o1751, "uid": 7, "gid": 8}),
    ("./dir", tarfile.DIRTYPE, {"mode": 0o2750, "uid": 1000, "gid": 100}),
    ("./dir/file", tarfile.REGTYPE, {"mode": 0o640, "uid": 1000, "gid": 5, "data": b"hello\n"}),
    ("./other", tarfile.DIRTYPE, {"mode": 0o700}),
    ("./other/of", tarfile.REGTYPE, {}),
    ("./dir/again", tarfile.LNKTYPE, {"linkname": "./dir/file"}),
    ("./link", tarfile.SYMTYPE, {"linkname": "dir/file", "uid": 9}),
    ("./fifo", tarfile.FIFOTYPE, {"mode": 0o620}),
    ("./empty", tarfile.REGTYPE, {"mode": 0o400}),
    (f"./{LONG}", tarfile.REGTYPE, {"data": b"x" * 3_000_001, "uid": 3_000_000_000}),
]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_files_of_every_kind(form: int, tmp_path: Path) -> None:
    """With owners, modes, times and names; the ghost among them, on a read-only mount."""
    pack(images(tmp_path) / NAME, CONTENTS, form)
    names = "dir/file other link fifo empty dir/again"
    done = restore(
        tmp_path,
        f"cd /data && stat -c '%n %a %u %g %Y %h %F' {names} && stat -c '%a %u %g' . dir && "
        f"stat -c '%s %u' {LONG} && cat dir/again link && readlink link && ls dir && cat <&3",
    )
    assert done.status == 0, done
    assert done.out.splitlines() == [
        "dir/file 640 1000 5 1500000000 2 regular file",
        "other 700 0 0 1500000000 2 directory",
        "link 777 9 0 1500000000 1 symbolic link",
        "fifo 620 0 0 1500000000 1 fifo",
        "empty 400 0 0 1500000000 1 regular empty file",
        "dir/again 640 1000 5 1500000000 2 regular file",
        "1751 7 8",
        "2750 1000 100",
        "3000001 3000000000",
        "hello",
        "hello",
        "dir/file",
        "again",
        "file",
        "content",
    ]
    assert "left out" not in done.err


def test_link_remaps_are_there(tmp_path: Path) -> None:
    """Their hidden names are in the image of the tmpfs."""
    made = ImageSet()
    made.mount("/", device=ROOT)
    made.mount("/data", device=DATA)
    made.task(1)
    origin = made.open(1, 3, "/data/gone", mode=0o100600, size=6)
    made.link(origin, "/data")
    made.write(tmp_path)
    assert run("plan", "-D", tmp_path).status == 2
    hidden = [f"./link_remap.{number}" for number in range(1, 10)]
    pack(
        tmp_path / NAME,
        [(name, tarfile.REGTYPE, {"data": b"hidden", "mode": 0o600}) for name in hidden],
    )
    done = run("restore", "-D", tmp_path, "--discard")
    assert done.status == 0, done


@pytest.mark.parametrize("allowed", [True, False])
def test_what_is_left_out_unless_it_is_allowed(allowed: bool, tmp_path: Path) -> None:
    pack(
        images(tmp_path) / NAME,
        [
            ("./null", tarfile.CHRTYPE, {"devmajor": 1, "devminor": 3, "mode": 0o666}),
            ("./su", tarfile.REGTYPE, {"mode": 0o4755, "data": b"#!"}),
            ("./alias", tarfile.LNKTYPE, {"linkname": "./su"}),
            ("./last", tarfile.REGTYPE, {"data": b"last"}),
        ],
    )
    options = ("--allow-devices", "--allow-setuid") if allowed else ()
    done = restore(tmp_path, "cd /data && cat last && stat -c ' %n %a %h %t:%T' null su", *options)
    if allowed:
        assert done.status == 0, done
        assert done.out.splitlines() == ["last null 666 1 1:3", " su 4755 2 0:0"]
        return
    assert done.out == "last"
    for words in ("devices, without --allow-devices: null", "without --allow-setuid: su", "alias"):
        assert words in done.err


def test_what_is_too_much_is_left_out(tmp_path: Path) -> None:
    """By name; what comes after it is there."""
    big = b"\0" * (9 << 20)
    entries: list[Entry] = [(f"./{n}", tarfile.REGTYPE, {"data": big}) for n in ("one", "two")]
    pack(images(tmp_path) / NAME, [*entries, ("./three", tarfile.REGTYPE, {"data": b"3"})])
    done = restore(tmp_path, "cd /data && stat -c '%n %s' one three; ls two")
    assert done.out.splitlines() == ["one 9437184", "three 1"]
    assert "left out: more than 16M of all tmpfs contents together: two" in done.err


def cut(data: bytes) -> bytes:
    return data[:700]


def damaged(data: bytes) -> bytes:
    return b"\xff" + data[1:]


FILE: Entry = ("./x", tarfile.REGTYPE, {"data": b"x" * 1000})
AWAY: Entry = ("./away", tarfile.SYMTYPE, {"linkname": "/usr"})


@pytest.mark.parametrize(
    ("entries", "change", "words"),
    [
        ([("../x", tarfile.REGTYPE, {})], bytes, "../x is no path inside it"),
        ([("/x", tarfile.REGTYPE, {})], bytes, "/x is no path inside it"),
        ([("a/../x", tarfile.REGTYPE, {})], bytes, "is no path inside it"),
        ([FILE, FILE], bytes, "holds x twice"),
        ([("x", tarfile.FIFOTYPE, {}), FILE], bytes, "holds x twice"),
        ([(".", tarfile.SYMTYPE, {"linkname": "/"})], bytes, "makes no sense"),
        (
            [AWAY, ("./away/x", tarfile.REGTYPE, {})],
            bytes,
            "/data/away/x: openat2: Too many levels",
        ),
        ([FILE, ("./x/y", tarfile.REGTYPE, {})], bytes, "/data/x/y: openat: Not a directory"),
        ([("d", tarfile.DIRTYPE, {}), ("e", tarfile.LNKTYPE, {"linkname": "d"})], bytes, "hard"),
        ([FILE], cut, "it is cut"),
        ([FILE], damaged, "is no member of a tar archive"),
    ],
)
def test_malformed(
    entries: list[Entry], change: Callable[[bytes], bytes], words: str, tmp_path: Path
) -> None:
    """One error that names the image, or the path in the builder; nothing outside is touched."""
    before = os.stat("/usr")
    pack(images(tmp_path) / NAME, entries, change=change)
    done = restore(tmp_path, "true")
    assert done.status == 2, done
    assert words in done.err
    assert NAME in done.err or "/data/" in done.err
    assert os.stat("/usr").st_mtime_ns == before.st_mtime_ns


def test_what_is_sparse_is_left_out(tmp_path: Path) -> None:
    """By name, with the further names that it has."""
    sparse: Entry = ("./holes", tarfile.GNUTYPE_SPARSE, {})
    alias: Entry = ("./alias", tarfile.LNKTYPE, {"linkname": "holes"})
    pack(images(tmp_path) / NAME, [sparse, alias, FILE])
    done = restore(tmp_path, "ls /data")
    assert done.status == 0, done
    assert done.out.split() == ["x"]
    assert f"{NAME}: left out: sparse files: holes\n" in done.err
    assert "what is not there: alias" in done.err


def test_what_gnu_tar_writes(tmp_path: Path) -> None:
    """With the options that CRIU gives it; the map of one file goes on in further headers."""
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "file").write_text("file")
    os.link(inside / "file", inside / "other")
    os.symlink("file", inside / "link")
    with (inside / "holes").open("wb") as file:
        for at in range(0, 4 << 20, 1 << 18):
            os.pwrite(file.fileno(), b"x" * 4096, at)
    options = "--no-unquote --no-wildcards --one-file-system --check-links --preserve-permissions"
    words = f"tar --create --gzip {options} --sparse --numeric-owner --directory".split()
    packed = subprocess.run([*words, inside, "."], check=True, capture_output=True).stdout
    (images(tmp_path / "images") / NAME).write_bytes(packed)
    done = restore(tmp_path / "images", "cd /data && ls && stat -c %h other && cat link")
    assert done.status == 0, done
    assert done.out.split() == ["file", "link", "other", "2", "file"]
    assert "left out: sparse files: holes" in done.err


def test_hard_links_through_a_link(tmp_path: Path) -> None:
    """They lead to members, never along links."""
    pack(
        images(tmp_path) / NAME,
        [AWAY, ("./got", tarfile.LNKTYPE, {"linkname": "away/bin/sh"})],
    )
    done = restore(tmp_path, "ls /data")
    assert done.out.split() == ["away"]
    assert "a hard link to what is not there: got" in done.err


def test_out_of_an_archive(tmp_path: Path) -> None:
    """Not read yet, which is said."""
    made = ImageSet()
    made.mount("/", device=ROOT)
    made.task(1)
    made.open(1, 3, "/gone", ghost=made.ghost(b"content"))
    made.write(tmp_path / "checkpoint")
    with tarfile.open(tmp_path / "archive", "w") as tar:
        tar.add(tmp_path / "checkpoint", "checkpoint")
    done = run("restore", "-D", tmp_path / "archive", "--discard")
    assert done.status == 0, done
    assert "contents of tmpfs mounts are not read from archives" in done.err


def test_an_image_that_is_no_file(tmp_path: Path) -> None:
    os.symlink("/etc/passwd", images(tmp_path) / NAME)
    done = restore(tmp_path, "true")
    assert done.status == 2
    assert f"{NAME}: can not be opened" in done.err
    assert stat.S_ISLNK(os.lstat(tmp_path / NAME).st_mode)
