"""`ghostpool inspect`: the command, as root and as an ordinary user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import pytest

from ghostpool import read_images
from ghostpool._inspection import inspection
from tests.support.archives import PACKED, packed
from tests.support.corpus import CORPUS
from tests.support.imagewriter import head, small
from tests.support.ordinary import ordinary_user
from tests.support.restore import ghostpool

IMAGES = CORPUS / "06-nested-mntns" / "images"


def test_tables_tree_and_document(tmp_path: Path) -> None:
    for arguments in ((IMAGES,), ("-D", IMAGES)):
        done = ghostpool("inspect", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "4 tasks, 9 ghosts (52,791 bytes, 52,791 of them stored)" in done.stdout
    done = ghostpool("inspect", cwd=IMAGES)
    assert "4 tasks, 9 ghosts" in done.stdout
    done = ghostpool("inspect", "--tree", IMAGES)
    assert "    fd 28: /data/common/reef-heron.idx (ghost 1, file, 2000)\n" in done.stdout
    document = json.loads(ghostpool("inspect", "--json", IMAGES).stdout)
    assert document["schema"] == 1
    assert [len(document[key]) for key in ("tasks", "ghosts", "link_remaps")] == [4, 9, 0]


def test_what_can_not_be_read_is_one_line(tmp_path: Path) -> None:
    small().write(tmp_path)
    (tmp_path / "files.img").write_bytes(head("files.img") + b"\x09\0\0\0")
    done = ghostpool("inspect", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ghostpool: files.img, record 0: ")
    assert done.stderr.count("\n") == 1
    done = ghostpool("inspect", tmp_path / "missing")
    assert done.returncode == 2
    assert "name the directory" in done.stderr
    for usage in (("-D", IMAGES, IMAGES), ("--tree", "--json", IMAGES)):
        done = ghostpool("inspect", *usage)
        assert done.returncode == 2
        assert "exclude each other" in done.stderr


@pytest.mark.parametrize("case", ["05-link-remap", "08-mmap"])
@pytest.mark.parametrize("how", PACKED)
def test_of_archives(how: str, case: str, tmp_path: Path) -> None:
    """The same as of the directory, but for its name."""
    images = CORPUS / case / "images"
    archive = packed(images, how, tmp_path / "archive")

    async def read(path: Path) -> dict[str, Any]:
        return inspection(await read_images(path))

    found, expected = (anyio.run(read, path, backend="trio") for path in (archive, images))
    assert found == {**expected, "images": str(archive)}


@pytest.mark.needs_mount_ns
def test_of_an_archive_as_an_ordinary_user(tmp_path: Path) -> None:
    archive = packed(IMAGES, "podman", tmp_path / "archive")
    tmp_path.chmod(0o755)
    with ordinary_user(tmp_path) as user:
        done = ghostpool("inspect", archive, prefix=user)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 tasks, 9 ghosts" in done.stdout


@pytest.mark.needs_mount_ns
def test_as_an_ordinary_user(tmp_path: Path) -> None:
    """The same to the byte, of images that he may read."""
    with ordinary_user(IMAGES) as user:
        for mode in ((), ("--tree",), ("--json",)):
            as_user = ghostpool("inspect", *mode, IMAGES, prefix=user)
            assert (as_user.returncode, as_user.stderr) == (0, "")
            assert as_user.stdout == ghostpool("inspect", *mode, IMAGES).stdout
