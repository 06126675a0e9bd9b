"""The image reader on damaged dumps: cut, missing, flipped, and what is no image at all."""

from __future__ import annotations

import os
import re
import shutil
import struct
from pathlib import Path
from typing import Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostpool._errors import ImageError, PlanError
from ghostpool._images import read_images
from ghostpool._model import Images
from tests.support.corpus import CORPUS, corpus
from tests.support.imagewriter import (
    head,
)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    read_images(CORPUS / "02-types" / "images")
    broken = shutil.copytree(CORPUS / "02-types" / "images", tmp_path / "images")
    for name in ("pstree.img", "ghost-file-1.img", "files.img"):
        with (broken / name).open("r+b") as file:
            file.truncate(9)
        with pytest.raises(ImageError, match=re.escape(name)):
            read_images(broken)
        shutil.copy(CORPUS / "02-types" / "images" / name, broken / name)
    assert os.listdir("/proc/self/fd") == before


class Victim:
    """A copy of a corpus case whose images can be changed one at a time."""

    def __init__(self, case: str, directory: Path) -> None:
        self.directory = shutil.copytree(CORPUS / case / "images", directory)
        self.names = sorted(path.name for path in directory.iterdir())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.directory)

    def read_with(self, name: str, data: bytes | None) -> Images | PlanError:
        """What reading gives while `name` holds `data` (None: while it is missing)."""
        path = self.directory / name
        good = path.read_bytes()
        path.unlink()
        try:
            if data is not None:
                path.write_bytes(data)
            return read_images(self.directory)
        except PlanError as error:
            return error
        finally:
            path.write_bytes(good)


def boundaries(name: str, data: bytes) -> set[int]:
    """Offsets right after the head and after each record, with the raw bytes that follow it."""
    at = len(head(name))
    found = {at}
    while at < len(data):
        start = at + 4
        (length,) = struct.unpack_from("<I", data, at)
        payload = data[start : start + length]
        at = start + length
        if name.startswith("ghost-file"):
            if len(found) > 1:
                at += numbers(payload)[1]
            elif not numbers(payload).get(9):
                found.add(at)  # raw content has no structure
                break
        elif name == "fifo-data.img":
            at += numbers(payload)[2]
        found.add(at)
    return found


def numbers(payload: bytes) -> dict[int, int]:
    """Top-level integers of a message, by field number; no other use than `boundaries`."""
    found = {}
    at = 0

    def take() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = payload[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(payload):
        tag = take()
        value = take()
        if tag & 7 == 2:
            at += value
        else:
            found[tag >> 3] = value
    return found


def is_raw_ghost(name: str, data: bytes) -> bool:
    """Content without chunks, of which only the size in files.img tells that it is cut."""
    return name.startswith("ghost-file") and max(boundaries(name, data)) < len(data)


def offsets(name: str, data: bytes) -> list[int]:
    """Every offset of a small image; of a large one the edges of its records and a sample."""
    if len(data) <= 160:
        return list(range(len(data)))
    edges = {at + step for at in sorted(boundaries(name, data))[:40] for step in (-1, 0, 1, 5)}
    sample = {*range(12), *range(12, len(data), len(data) // 12), len(data) - 1}
    return sorted(at for at in edges | sample if 0 <= at < len(data))


# Images whose every record is referred to from elsewhere: no cut of them passes.
GUARDED = re.compile(r"(inventory|pstree|files|(core|ids|mm|fs|mountpoints)-\d+)\.img")


@pytest.mark.long
@pytest.mark.parametrize(
    "case", ["01-ro-basic", "02-types", "03-sparse", "04-shared", "05-link-remap", "08-mmap"]
)
def test_cut_images(case: str, tmp_path: Path) -> None:
    """An image cut anywhere but between records is refused by name; nothing else is raised."""
    with Victim(case, tmp_path / "images") as victim:
        for name in victim.names:
            data = (victim.directory / name).read_bytes()
            whole = boundaries(name, data)
            for at in offsets(name, data):
                result = victim.read_with(name, data[:at])
                if isinstance(result, Images):
                    assert at in whole or is_raw_ghost(name, data), f"{name} cut at {at}"
                    assert not GUARDED.fullmatch(name), f"{name} cut at {at}"
                else:
                    assert isinstance(result, ImageError), f"{name} cut at {at}: {result}"
                    assert name in str(result), f"cut at {at}"


@pytest.mark.parametrize("case", ["06-nested-mntns", "11-deep-parents", "13-many"])
def test_cut_between_records(case: str, tmp_path: Path) -> None:
    """Between two records a cut is noticed wherever something refers to what is missing."""
    with Victim(case, tmp_path / "images") as victim:
        for name in victim.names:
            if name.startswith("ghost-file-") and case == "13-many":
                continue  # all of one kind, and each read opens 400 of them
            data = (victim.directory / name).read_bytes()
            whole = sorted(boundaries(name, data) - {len(data)})
            for at in whole[:: max(1, len(whole) // 12)]:
                result = victim.read_with(name, data[:at])
                if name.startswith(("fdinfo", "ghost-file")) and isinstance(result, Images):
                    continue
                assert isinstance(result, ImageError), f"{name} cut at {at}"
                assert name in str(result)


def test_a_raw_ghost_that_lost_content_is_noticed(tmp_path: Path) -> None:
    """Raw content has no length of its own: the open file's recorded size tells."""
    with Victim("01-ro-basic", tmp_path / "images") as victim:
        data = (victim.directory / "ghost-file-3.img").read_bytes()
        result = victim.read_with("ghost-file-3.img", data[:-1])
    assert isinstance(result, ImageError)
    assert str(result) == (
        "ghost-file-3.img, record 0: the ghost has 136 bytes, files.img, record 4 says 137"
    )


@pytest.mark.parametrize("case", ["01-ro-basic", "02-types", "06-nested-mntns", "08-mmap"])
def test_missing_images(case: str, tmp_path: Path) -> None:
    """Only an image whose absence means "empty" may be missing, and only if nobody needs it."""
    with Victim(case, tmp_path / "images") as victim:
        for name in victim.names:
            result = victim.read_with(name, None)
            if name == "fifo-data.img":
                assert isinstance(result, Images)
            elif name == "fdinfo-2.img" and case == "06-nested-mntns":
                # No trace of this table is left: the children inherited all of it.
                assert isinstance(result, Images)
                held = [{row.reg_id for row in task.descriptors} for task in result.tasks[1:]]
                table = {row.reg_id for row in corpus(case)[0].tasks[0].descriptors}
                assert table <= set.union(*held)
            else:
                assert isinstance(result, ImageError), name
                assert name in str(result)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_flipped_bytes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever a byte is changed to, the answer is values or a PlanError."""
    case = data.draw(st.sampled_from(["01-ro-basic", "02-types", "04-shared", "08-mmap"]))
    with Victim(case, tmp_path_factory.mktemp("flipped") / "images") as victim:
        for _ in range(4):
            name = data.draw(st.sampled_from(victim.names))
            image = bytearray((victim.directory / name).read_bytes())
            places = st.integers(0, min(len(image), 2000) - 1)
            for at in data.draw(st.lists(places, min_size=1, max_size=3)):
                image[at] = data.draw(st.integers(0, 255))
            assert isinstance(victim.read_with(name, bytes(image)), (Images, PlanError))


@pytest.mark.parametrize("name", [n.name for n in (CORPUS / "02-types/images").iterdir()])
def test_wrong_magic(name: str, tmp_path: Path) -> None:
    with Victim("02-types", tmp_path / "images") as victim:
        data = bytearray((victim.directory / name).read_bytes())
        last = len(head(name)) - 1
        data[last] ^= 1
        result = victim.read_with(name, bytes(data))
    assert isinstance(result, ImageError)
    assert result.file == name
    assert result.record is None
    assert "begins with" in result.problem


def test_a_record_beyond_the_file_allocates_nothing(tmp_path: Path) -> None:
    with Victim("01-ro-basic", tmp_path / "images") as victim:
        result = victim.read_with("pstree.img", head("pstree.img") + b"\xff\xff\xff\x7f\0\0")
    assert isinstance(result, ImageError)
    assert "should have 2147483647 bytes, the file has 2 more" in result.problem


def test_a_huge_record_is_refused(tmp_path: Path) -> None:
    with Victim("01-ro-basic", tmp_path / "images") as victim:
        path = victim.directory / "pstree.img"
        with path.open("wb") as file:
            file.write(head("pstree.img") + struct.pack("<I", 17 << 20))
            file.truncate(20 << 20)
        with pytest.raises(
            ImageError, match=r"a record of 17,825,792 bytes: the limit is 1,048,576"
        ):
            read_images(victim.directory)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"is this the directory given to criu dump -D\?"):
        read_images(tmp_path / "missing")
    with pytest.raises(ImageError, match=r"inventory\.img: is missing in .* criu dump -D\?"):
        read_images(tmp_path)


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_no_regular_file_is_no_image(kind: str, tmp_path: Path) -> None:
    """A fifo does not block the reader, and no link leads it out of the directory."""
    images = shutil.copytree(CORPUS / "01-ro-basic" / "images", tmp_path / "images")
    path = images / "files.img"
    path.rename(tmp_path / "elsewhere")
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(ImageError, match=r"files\.img: is (a symbolic link|not a regular file)"):
        read_images(images)


def test_a_descriptor_that_is_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(ImageError, match="can not be listed: Not a directory"):
            read_images(path, directory_fd=fd)
    finally:
        os.close(fd)
