"""Checkpoint archives: what is found in them, and what becomes of broken and hostile ones."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ghostpool import _archive, _tar, _unpack
from ghostpool._archive import open_archive
from ghostpool._errors import ImageError
from ghostpool._images import read_images, read_source
from ghostpool._limits import Limits
from ghostpool._model import Images
from ghostpool._unpack import FileStream, unpack
from tests.support.archives import (
    PACKED,
    crio,
    images_below,
    layout,
    packed,
    podman,
    tar,
    zstd_frame,
)
from tests.support.corpus import CASES, CORPUS
from tests.support.imagewriter import ImageSet, small

BLOCK = 512


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    _unpack.load()


def read(path: Path, limits: Limits | None = None) -> Images:
    """The images of an archive, read in this process."""
    fd = os.open(path, os.O_RDONLY)
    try:
        source = open_archive(str(path), fd, limits or Limits(), lambda: None)
        return read_source(str(path), source, limits)._replace(unpacking=source.steps)
    finally:
        os.close(fd)


def contents(path: Path, images: Images) -> dict[str, list[tuple[int, bytes]]]:
    """What the extents of each ghost lead to, by the name of its image."""
    found: dict[str, list[tuple[int, bytes]]] = {}
    for ghost in images.ghosts.values():
        for offset, length, position in ghost.extents:
            fd = os.open(path if path.is_file() else path / ghost.file, os.O_RDONLY)
            try:
                stream = unpack(
                    FileStream(fd, 0, os.fstat(fd).st_size), images.unpacking or (), lambda: None
                )
                assert stream.skip(position)
                data = b""
                while len(data) < length:
                    data += stream.read(length - len(data))
            finally:
                os.close(fd)
            found.setdefault(ghost.file, []).append((offset, data))
    return found


def placeless(images: Images) -> Images:
    """The same without where it came from."""
    ghosts = {
        ident: ghost._replace(extents=tuple(e._replace(position=0) for e in ghost.extents))
        for ident, ghost in images.ghosts.items()
    }
    fifos = {reg: data._replace(position=0) for reg, data in images.fifo_data.items()}
    return images._replace(directory="", unpacking=None, ghosts=ghosts, fifo_data=fifos)


@pytest.mark.parametrize("how", PACKED)
@pytest.mark.parametrize("case", CASES)
def test_the_same_images_in_an_archive(case: str, how: str, tmp_path: Path) -> None:
    directory = CORPUS / case / "images"
    archive = packed(directory, how, tmp_path / "archive")
    images, plain = read(archive), read_images(directory)
    assert placeless(images) == placeless(plain)
    if case != "13-many":
        assert contents(archive, images) == contents(directory, plain)


@pytest.mark.parametrize("how", ["podman", "podman-zstd"])
def test_a_ghost_of_many_chunks(how: str, tmp_path: Path) -> None:
    made = small()
    chunks = [(3 * number, b"%d" % (number % 10)) for number in range(5000)]
    made.open(1, 9, "/data/holes", ghost=made.ghost(chunks=chunks, size=15_000))
    directory = made.write(tmp_path / "images")
    archive = packed(directory, how, tmp_path / "archive")
    images = read(archive)
    assert placeless(images) == placeless(read_images(directory))
    (last,) = (g for g in images.ghosts.values() if len(g.extents) == 5000)
    found = contents(
        archive, images._replace(ghosts={last.id: last._replace(extents=last.extents[::1000])})
    )
    assert found[last.file] == chunks[::1000]


def some(tmp_path: Path) -> Path:
    return small().write(tmp_path / "images")


def refused(tmp_path: Path, data: bytes, match: str, limits: Limits | None = None) -> str:
    """The one error for these bytes, which names the archive."""
    archive = tmp_path / "archive"
    archive.write_bytes(data)
    with pytest.raises(ImageError, match=match) as caught:
        read(archive, limits)
    assert str(archive) in str(caught.value)
    return str(caught.value)


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "zstd": zstd_frame,
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_archive_that_is_cut_anywhere(packing: str, tmp_path: Path) -> None:
    """One error that names the archive; never fewer images, never anything else."""
    whole = crio(some(tmp_path))
    end = len(whole.rstrip(b"\0"))
    data = PACKINGS[packing](whole)
    cuts = range(0, end, 301) if packing == "plain" else range(1, len(data), len(data) // 50)
    for length in cuts:
        refused(tmp_path, data[:length], r"can not be read as a checkpoint archive")


def test_an_archive_that_is_cut_between_two_members(tmp_path: Path) -> None:
    whole = crio(some(tmp_path))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        last = archive.getmembers()[-1]
    cut = whole[: last.offset]
    refused(tmp_path, cut, "cut before its end, after the member 'dump.log'")


def test_what_is_no_archive(tmp_path: Path) -> None:
    remedy = "name a directory of images, or a checkpoint archive"
    refused(tmp_path, b"", remedy)
    refused(tmp_path, b"#!/bin/sh\n" * 100, remedy)
    refused(tmp_path, gzip.compress(b"#!/bin/sh\n" * 100), remedy)
    refused(tmp_path, b"\xfd7zXZ\0" + bytes(600), "packed by xz, which is not read")
    refused(tmp_path, b"BZh9" + bytes(600), "packed by bzip2, which is not read")
    refused(tmp_path, tar([("etc/passwd", b"root")]), r"inventory\.img: is missing in ")


def members_of(tmp_path: Path) -> list[tuple[str, bytes | None]]:
    return images_below(some(tmp_path))


def test_an_image_that_is_there_twice(tmp_path: Path) -> None:
    twice = [*members_of(tmp_path), ("checkpoint/pstree.img", b"x")]
    refused(tmp_path, tar(twice), "'checkpoint/pstree.img' is in it twice")
    elsewhere = [*members_of(tmp_path), ("./checkpoint//./pstree.img", b"x")]
    refused(tmp_path, tar(elsewhere), "is in it twice")
    shm = ("devshm-checkpoint.tar", b"")
    refused(tmp_path, tar([*members_of(tmp_path), shm, shm]), "is in it twice")


def test_only_images_that_are_asked_for_take_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_archive, "KEPT_MAX", 1 << 18)
    others = ("pagemap-1", "sk-queues", "pipes-data", "tcp-stream-1f", "cgroup", "pages-1")
    large = [(f"checkpoint/{name}.img", bytes((1 << 18) - 3000)) for name in others]
    (tmp_path / "archive").write_bytes(zstd_frame(tar([*large, *members_of(tmp_path)])))
    read(tmp_path / "archive")


def test_images_of_two_dumps(tmp_path: Path) -> None:
    directory = some(tmp_path)
    two = [*images_below(directory, "a/"), *images_below(directory, "b/c/")]
    refused(tmp_path, tar(two), "holds the images of 2 dumps, in a and b/c")
    layers = [("x", tar(images_below(directory))), ("y", zstd_frame(podman(directory)))]
    refused(tmp_path, tar(layout(layers, {})), "holds the images of 2 dumps")


def test_names_that_lead_elsewhere(tmp_path: Path) -> None:
    """They are no images, and nothing else either: a name of a member is only compared."""
    more = [
        ("checkpoint/../inventory.img", b"x"),
        ("checkpoint/../../etc/pstree.img", b"x"),
        ("/etc/shadow", b"x"),
    ]
    archive = tmp_path / "archive"
    archive.write_bytes(tar([*more, *members_of(tmp_path)]))
    assert placeless(read(archive)) == placeless(read_images(tmp_path / "images"))


@pytest.mark.parametrize(
    ("kind", "what"), [(tarfile.SYMTYPE, "a link"), (tarfile.LNKTYPE, "a link"),
                       (tarfile.FIFOTYPE, "no file"), (tarfile.DIRTYPE, "no file")]
)  # fmt: skip
def test_an_image_that_is_no_file(kind: bytes, what: str, tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members_of(tmp_path):
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            if name.endswith("/pstree.img"):
                info.type, info.linkname, info.size = kind, "/etc/passwd", 0
            archive.addfile(info, io.BytesIO(content or b""))
    refused(tmp_path, out.getvalue(), rf"pstree\.img: is {what} in .*, not an image")


def member(name: bytes, content: bytes = b"", *, kind: bytes = b"0", size: bytes = b"") -> bytes:
    """One member of a tar archive, with any size field."""
    size = size or b"%011o\0" % len(content)
    head = name.ljust(100, b"\0") + b"0000600\0" * 3 + size.ljust(12, b"\0") + b"00000000000\0"
    rest = kind + bytes(100) + b"ustar\x0000"
    head = (head + b" " * 8 + rest).ljust(BLOCK, b"\0")
    head = head[:148] + b"%06o\0 " % sum(head) + head[156:]
    return head + content + bytes(-len(content) % BLOCK)


HOSTILE = {
    "checksum": (b"x" * 1024, "no tar archive"),
    "sparse of GNU": (member(b"inventory.img", kind=b"S") + bytes(1024), "is a sparse file"),
    "sparse of pax": (
        member(b"p", b"22 GNU.sparse.major=1\n", kind=b"x") + member(b"inventory.img", b"y")
        + bytes(1024),
        "is a sparse file",
    ),
    "exabytes": (
        member(b"inventory.img", size=b"\x80" + b"\0" * 3 + b"\x10" + b"\0" * 7) + bytes(1024),
        "cut inside the member 'inventory.img'",
    ),
    "negative": (member(b"inventory.img", size=b"\xff" * 12) + bytes(1024), "no size of a member"),
    "more than there are": (
        member(b"inventory.img", size=b"\x80" + b"\x7f" * 11) + bytes(1024),
        "no size of a member",
    ),
    "no number": (member(b"inventory.img", size=b"99999999999\0"), "no size of a member"),
    "long name": (member(b"l", b"a/" * 4000, kind=b"L") + member(b"x"), "no file can have"),
    "long header": (member(b"l", size=b"00100000000\0", kind=b"x"), "a header of 16,777,216 bytes"),
    "headers without end": (member(b"l", b"a", kind=b"L") * 99, "too many headers"),
    "pax without length": (member(b"p", b"path=x\n", kind=b"x") + member(b"x"), "malformed"),
    "pax of length 0": (member(b"p", b"0 path=x\n", kind=b"x") + member(b"x"), "malformed"),
    "pax beyond": (member(b"p", b"99 path=x\n", kind=b"x") + member(b"x"), "malformed"),
    "pax with a size that is none": (
        member(b"p", b"14 size=-12345\n", kind=b"x") + member(b"x"),
        "for a number|malformed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers(kind: str, packing: str, tmp_path: Path) -> None:
    data, match = HOSTILE[kind]
    refused(tmp_path, PACKINGS[packing](data), match)


def test_members_beyond_the_limit(tmp_path: Path) -> None:
    many = tar([(f"{number}", b"") for number in range(200)])
    refused(tmp_path, many, "more than 100 members", Limits(names=100))


def test_what_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an archive that is not packed nothing is kept; of a packed one no more than so much."""
    monkeypatch.setattr(_archive, "KEPT_MAX", 3_000)
    data = crio(some(tmp_path))
    (tmp_path / "plain").write_bytes(data)
    read(tmp_path / "plain")
    refused(tmp_path, zstd_frame(data), "unpack it")


def test_a_window_that_is_too_large(tmp_path: Path) -> None:
    """It is how much memory unpacking takes, and the archive says it."""
    # A frame of one raw block, whose window is 1 KiB << 17, and one of 1 KiB << 15.
    body = struct.pack("<I", 1024 << 3 | 1)[:3] + bytes(1024)
    data = b"\x28\xb5\x2f\xfd\0" + bytes([17 << 3]) + body
    refused(tmp_path, data, "zstd data can not be unpacked: .*memory")
    data = b"\x28\xb5\x2f\xfd\0" + bytes([15 << 3]) + body
    refused(tmp_path, data, r"inventory\.img: is missing")


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    """A gibibyte of nothing as an image that is kept: only its length is looked at."""
    nothing = zstd_frame(bytes(4 << 20))
    first = zstd_frame(member(b"files.img", size=b"10000000000\0"))
    bomb = first + 256 * nothing + zstd_frame(member(b"inventory.img", b"x") + bytes(1024))
    assert len(bomb) < 1 << 20
    (tmp_path / "archive").write_bytes(bomb)
    with pytest.raises(ImageError, match=r"inventory\.img: begins with 78"):
        read(tmp_path / "archive")


def test_several_frames_and_what_may_be_skipped(tmp_path: Path) -> None:
    """zstd:chunked writes many frames, and metadata in some that are skipped."""
    directory = some(tmp_path)
    data = crio(directory)
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0meta"
    pieces = [data[at : at + 5000] for at in range(0, len(data), 5000)]
    archive = tmp_path / "archive"
    for pack in (zstd_frame, gzip.compress):
        between = skipped if pack is zstd_frame else b""
        archive.write_bytes(between + between.join(pack(piece) for piece in pieces))
        assert placeless(read(archive)) == placeless(read_images(directory))


def test_ghosts_of_devices_and_of_nothing(tmp_path: Path) -> None:
    made = ImageSet()
    made.task(1)
    made.open(1, 3, "/empty", ghost=made.ghost())
    made.open(1, 4, "/hole", ghost=made.ghost(chunks=[], size=1 << 30))
    directory = made.write(tmp_path / "images")
    for how in ("crio", "podman-gzip"):
        archive = packed(directory, how, tmp_path / "archive")
        assert placeless(read(archive)) == placeless(read_images(directory))


def test_a_pax_header_of_many_records_takes_time_by_its_length_alone() -> None:
    content = b"5 a=\n" * ((1 << 20) // 5)
    begin = time.process_time()
    assert _tar._pax(content, b"") == {b"a": b""}
    assert time.process_time() - begin < 1
