"""`ghostpool extract`: contents and holes, nothing outside, and nothing left of what failed."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from ghostpool import KernelError, PlanError, _extract
from ghostpool._limits import Limits
from ghostpool._model import Images
from ghostpool._reading import read_apart
from ghostpool._startreader import Reading
from tests.support.archives import packed
from tests.support.corpus import CASES, CORPUS, content, corpus
from tests.support.imagewriter import ImageSet, ghosts_on
from tests.support.ordinary import ordinary_user
from tests.support.restore import ghostpool, keeps_holes

SIZE = Limits().size


def extract(images: Path, output: Path, *only: str) -> _extract.Extracted:
    """In this process."""

    async def run() -> _extract.Extracted:
        return await _extract.extract(str(images), str(output), only, max_size=SIZE)

    return anyio.run(run, backend="trio")


def manifest(output: Path) -> list[dict[str, Any]]:
    ghosts: list[dict[str, Any]] = json.loads((output / "manifest.json").read_text())["ghosts"]
    return ghosts


def check(case: str, output: Path) -> None:
    """What is in `output` is what the images hold, and nothing else."""
    images, _ = corpus(case)
    listed = manifest(output)
    assert [ghost["id"] for ghost in listed] == sorted(images.ghosts)
    names = {ghost["extracted"] for ghost in listed} - {None}
    assert {*os.listdir(output)} == {*names, "manifest.json"}
    for entry in listed:
        ghost = images.ghosts[entry["id"]]
        assert (entry["extracted"] is None) == (not stat.S_ISREG(ghost.mode))
        if entry["extracted"] is None:
            continue
        file = output / entry["extracted"]
        assert file.read_bytes() == b"".join(content(CORPUS / case / "images", ghost))
        status = file.lstat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert ghost.mtime is not None
        assert status.st_mtime_ns == ghost.mtime * 1000


@pytest.mark.parametrize("case", CASES)
def test_what_it_writes_is_what_the_images_hold(case: str, tmp_path: Path) -> None:
    extract(CORPUS / case / "images", tmp_path / "out")
    check(case, tmp_path / "out")


@pytest.mark.parametrize("how", ["podman", "podman-gzip", "podman-zstd", "oci"])
def test_from_an_archive(how: str, tmp_path: Path) -> None:
    images = packed(CORPUS / "03-sparse" / "images", how, tmp_path / "archive")
    extract(images, tmp_path / "out")
    check("03-sparse", tmp_path / "out")


def _fails_with(code: int) -> Callable[..., int]:
    def fails(*_: object) -> int:
        raise OSError(code, "")

    return fails


@pytest.mark.parametrize("broken", [("copy_file_range",), ("copy_file_range", "sendfile")])
def test_where_the_kernel_can_not_copy_between_the_files(
    broken: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in broken:
        monkeypatch.setattr(os, name, _fails_with(errno.EXDEV))
    monkeypatch.setattr(_extract, "_PIECE", 1000)
    extract(CORPUS / "03-sparse" / "images", tmp_path / "out")
    check("03-sparse", tmp_path / "out")


def test_holes_stay_holes(tmp_path: Path) -> None:
    if not keeps_holes(str(tmp_path)):
        pytest.fail("this file system has no holes")
    made = ImageSet()
    made.task(1)
    chunks = [(1 << 20, b"a" * 4096), (1 << 29, b"b")]
    made.open(1, 3, "/sparse", ghost=made.ghost(chunks=chunks, size=1 << 30))
    made.open(1, 4, "/hole", ghost=made.ghost(chunks=[], size=1 << 33))
    made.open(1, 5, "/empty", ghost=made.ghost(chunks=[], size=0))
    done = ghostpool("extract", made.write(tmp_path / "img"), "-o", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"3 files, 4,097 bytes of content, in {tmp_path}/out\n"
    sparse, hole, empty = (
        (tmp_path / "out" / name).stat() for name in ("1-sparse", "2-hole", "3-empty")
    )
    assert (sparse.st_size, hole.st_size, empty.st_size) == (1 << 30, 1 << 33, 0)
    assert sparse.st_blocks * 512 <= 64 << 10
    assert hole.st_blocks == 0


def test_what_is_no_file_is_in_the_manifest_only(tmp_path: Path) -> None:
    made = ImageSet()
    made.task(1)
    made.open(1, 3, "/link", ghost=made.ghost(mode=0o120777, target="/etc/passwd"))
    made.open(1, 4, "/null", ghost=made.ghost(mode=0o020666, rdev=0x103))
    made.open(1, 5, "/dir", ghost=made.ghost(mode=0o040755))
    made.open(1, 6, "/setuid", ghost=made.ghost(b"x", mode=0o104755, uid=5))
    done = ghostpool("extract", "-D", made.write(tmp_path / "img"), "-o", tmp_path / "out")
    assert done.returncode == 0
    assert "1 file, 1 bytes of content" in done.stdout
    assert "3 without content in manifest.json only" in done.stdout
    assert sorted(os.listdir(tmp_path / "out")) == ["4-setuid", "manifest.json"]
    link, null, directory, setuid = manifest(tmp_path / "out")
    assert (link["kind"], link["target"], link["extracted"]) == ("symlink", "/etc/passwd", None)
    assert (null["device"], directory["kind"]) == ([1, 3], "directory")
    assert (setuid["mode"], setuid["owner"]) == ("4755", [5, 0])
    assert stat.S_IMODE((tmp_path / "out" / "4-setuid").stat().st_mode) == 0o600


def test_names_of_images_choose_no_place(tmp_path: Path) -> None:
    """A name is the ghost's number and harmless characters, whatever it was called."""
    made = ImageSet()
    made.task(1)
    names = [".hidden", "-rf *", "a\nb\x1b[2J", "n" * 255, "$(id)", "manifest.json", "..", "ü"]
    for number, name in enumerate(names, 3):
        above = "/x" if name == ".." else ""
        made.open(1, number, f"{above}/{name.replace('..', '...')}", ghost=made.ghost(b"x"))
    output = tmp_path / "out"
    assert extract(made.write(tmp_path / "img"), output).files == len(names)
    assert sorted(os.listdir(output)) == [
        "1-.hidden",
        "2--rf__",
        "3-a_b__2J",
        "4-" + "n" * 80,
        "5-__id_",
        "6-manifest.json",
        "7-...",
        "8-__",
        "manifest.json",
    ]
    assert sorted(os.listdir(tmp_path)) == ["img", "out"]


def test_a_name_that_is_no_text_is_in_the_manifest_as_it_was(tmp_path: Path) -> None:
    made = ImageSet()
    made.task(1)
    made.open(1, 3, "/plain", ghost=made.ghost(b"x"))
    reg = made.reg(b"/\xff\x00".replace(b"\0", b"\n"), mode=0o100644, size=1)
    made.fd(1, 4, reg)
    made.remap(reg, made.ghost(b"x"))
    extract(made.write(tmp_path / "img"), tmp_path / "out")
    plain, odd = (ghost["names"][0] for ghost in manifest(tmp_path / "out"))
    assert "path_base64" not in plain
    assert (odd["path"], odd["path_base64"]) == (r"/\xff\n", "L/8K")


def test_only_some(tmp_path: Path) -> None:
    made = ghosts_on("/data", ["a/one", "a/two", "b/three", "7"], b"content")
    images = made.write(tmp_path / "img")
    for number, (only, expected) in enumerate(
        [
            (["2"], ["2-two"]),
            (["02"], ["2-two"]),
            (["/data/a/*"], ["1-one", "2-two"]),
            (["/data/a/*", "3", "3"], ["1-one", "2-two", "3-three"]),
            (["*three"], ["3-three"]),
            (["/data/7"], ["4-7"]),
        ]
    ):
        output = tmp_path / f"out{number}"
        extract(images, output, *only)
        assert sorted(os.listdir(output)) == [*expected, "manifest.json"]
        assert [ghost["extracted"] for ghost in manifest(output)] == expected
    for nothing in ("7", "/data", "data/a/one", "", "1" * 5000):
        with pytest.raises(PlanError, match="no ghost of"):
            extract(images, tmp_path / "none", "1", nothing)
    done = ghostpool("extract", images, "-o", tmp_path / "none", "--only", "1", "--only", "\x1b[2J")
    assert done.returncode == 2
    assert r"--only \x1b[2J: no ghost of" in done.stderr
    assert not (tmp_path / "none").exists()


def test_where_it_may_write(tmp_path: Path) -> None:
    """Into a new directory or an empty one; nothing that is there is touched."""
    images = ghosts_on("/data", ["a"], b"x").write(tmp_path / "img")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "1-a").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    for name, reason in (
        ("full", "is not empty"),
        ("file", "Not a directory"),
        ("dangling", "No such file or directory"),
        ("missing/out", "No such file or directory"),
    ):
        with pytest.raises(PlanError, match=reason):
            extract(images, tmp_path / name)
    done = ghostpool("extract", images, "-o", tmp_path / "full")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert (tmp_path / "full" / "1-a").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "full", "img"]
    (tmp_path / "empty").mkdir()
    assert extract(images, tmp_path / "empty").files == 1


def test_what_is_planted_meanwhile_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")

    def write() -> None:
        with _extract._output(str(tmp_path / "out")) as output:
            (tmp_path / "out" / "1-a").symlink_to(tmp_path / "victim")
            with output.file("1-a"):
                pass

    with pytest.raises(KernelError, match="1-a: open: EEXIST"):
        write()
    assert (tmp_path / "victim").read_text() == "mine"
    assert os.listdir(tmp_path / "out") == ["1-a"]  # not ours, so left


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_is_undone(there: bool, tmp_path: Path) -> None:
    """The second of three files is too large for this process."""
    made = ImageSet()
    made.task(1)
    for number, size in enumerate((10, 5000, 20)):
        made.open(1, 3 + number, f"/{number}", ghost=made.ghost(bytes(size)))
    output = tmp_path / "out"
    if there:
        output.mkdir()

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    done = ghostpool("extract", made.write(tmp_path / "img"), "-o", output, preexec_fn=little)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"ghostpool: {output}/2-1: write: EFBIG (File too large)\n"
    assert output.exists() == there
    assert not there or os.listdir(output) == []


def test_an_image_that_is_cut_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ghosts_on("/data", ["a"], bytes(100)).write(tmp_path / "img")

    async def cut_then(reading: Reading) -> Images:
        whole = await read_apart(reading)
        os.truncate(images / "ghost-file-1.img", 50)
        return whole

    monkeypatch.setattr(_extract, "read_apart", cut_then)
    with pytest.raises(PlanError, match="was cut while it was extracted"):
        extract(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cancelled_in_the_middle_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ghosts_on("/data", ["a", "b"], bytes(10_000)).write(tmp_path / "img")
    monkeypatch.setattr(_extract, "_PIECE", 1000)
    real = os.copy_file_range
    pieces = 0

    async def run() -> None:
        with anyio.CancelScope() as scope:

            def copy(*arguments: int) -> int:
                nonlocal pieces
                pieces += 1
                if pieces == 15:
                    scope.cancel()
                return real(*arguments)

            monkeypatch.setattr(os, "copy_file_range", copy)
            await _extract.extract(str(images), str(tmp_path / "out"), (), max_size=SIZE)
        assert scope.cancelled_caught

    anyio.run(run, backend="trio")
    assert pieces == 15
    assert not (tmp_path / "out").exists()


@pytest.mark.needs_mount_ns
def test_as_an_ordinary_user(tmp_path: Path) -> None:
    images = CORPUS / "03-sparse" / "images"
    with ordinary_user(images) as user:
        done = ghostpool("extract", images, "-o", "/mnt/out", prefix=user)
        assert (done.returncode, done.stderr) == (0, "")
        copied = subprocess.run(
            [*user, "tar", "-C", "/mnt/out", "--format=posix", "-cf", "-", "."],
            capture_output=True,
            check=True,
        )
    (tmp_path / "out").mkdir()
    unpack = ["tar", "-C", str(tmp_path / "out"), "-xf", "-"]
    subprocess.run(unpack, input=copied.stdout, check=True)
    check("03-sparse", tmp_path / "out")
