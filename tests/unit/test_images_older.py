"""Real dumps as older versions of CRIU and other machines would have written them: read alike."""

from __future__ import annotations

import os
import re
from itertools import pairwise, product

import pytest

from ghostpool._errors import ImageError, UnsupportedError
from ghostpool._images import read_source
from ghostpool._limits import Limits
from ghostpool._machine import flags_of
from ghostpool._model import Ghost, Images
from tests.support.corpus import CASES, CORPUS
from tests.support.imagewriter import PIPE, REG, ImageSet, head, message, record, small
from tests.support.memory import MemorySource, load
from tests.support.older import (
    VERSIONS,
    Record,
    Version,
    big_endian,
    inner,
    older,
    put_together,
    take_apart,
    without,
)

DUMPS = {case: load(CORPUS / case / "images") for case in CASES}
FEW = ("01-ro-basic", "02-types", "05-link-remap", "06-nested-mntns", "external")


def load_made(made: ImageSet) -> dict[str, bytes]:
    return {name: head(name) + b"".join(records) for name, records in made.images().items()}


def external() -> ImageSet:
    made = small()
    made.mount("/outside", id=502, ext_key="disk", root="/srv/disk")
    made.open(1, 5, "/outside/gone", ghost=made.ghost(b"x"))
    return made


DUMPS["external"] = load_made(external())


def read(images: dict[str, bytes]) -> Images:
    return read_source("images", MemorySource(images))


def content(image: bytes, ghost: Ghost) -> bytes:
    """The file that the extents describe, holes as zeros."""
    out = bytearray(ghost.size)
    for offset, length, position in ghost.extents:
        out[offset : offset + length] = image[position : position + length]
    return bytes(out)


def known(images: Images, version: Version) -> Images:
    """What images of `version` can say of these."""
    files = list(images.files.values())
    if version < (2, 4):
        files = [file._replace(mode=None) for file in files]
    # Where the content lies in an image is its own affair.
    ghosts = [ghost._replace(extents=()) for ghost in images.ghosts.values()]
    if version < (2, 0):
        ghosts = [ghost._replace(atime=None, mtime=None) for ghost in ghosts]
    mounts = dict(images.mounts)
    for number, table in images.mounts.items():
        if version < (3, 0):
            mounts[number] = tuple(m._replace(root=b"") if m.external_key else m for m in table)
        if version < (1, 8):  # a read-only superblock is a read-only mount
            mounts[number] = tuple(m._replace(superblock_flags=0) for m in mounts[number])
    return images._replace(
        files={file.id: file for file in files},
        ghosts={ghost.id: ghost for ghost in ghosts},
        mounts=mounts,
        fifo_data={reg: data._replace(position=0) for reg, data in images.fifo_data.items()},
    )


def test_the_versions_differ() -> None:
    """Each is another one in some case: or nothing would be tested below."""
    written = [[older(DUMPS[case], version) for case in FEW] for version in ((4, 2), *VERSIONS)]
    assert all(one != other for one, other in pairwise(written))


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: ".".join(map(str, version)))
@pytest.mark.parametrize("case", FEW)
def test_older_versions(case: str, version: Version) -> None:
    """All that an older version has written is read as of a newer one."""
    images = read(DUMPS[case])
    now = older(DUMPS[case], version)
    got = read(now)
    assert known(got, version) == known(images, version)
    for ghost in got.ghosts.values():
        before = images.ghosts[ghost.id]
        assert content(now[ghost.file], ghost) == content(DUMPS[case][ghost.file], before)


@pytest.mark.parametrize("case", CASES)
def test_big_endian(case: str) -> None:
    """The words of the framing are turned round, and nothing else is."""
    images = DUMPS[case]
    now = big_endian(images)
    assert all(now[name] != data and len(now[name]) == len(data) for name, data in images.items())
    assert read(now) == read(images)


def test_another_byte_order_in_one_image() -> None:
    images = DUMPS["01-ro-basic"]
    mixed = {**images, "files.img": big_endian(images)["files.img"]}
    with pytest.raises(ImageError, match=r"^files\.img: is in another byte order than inventory"):
        read(mixed)


# -- What is one thing in one image, and another in another -------------------------------------


def lists(made: ImageSet, **more: list[Record]) -> dict[str, bytes]:
    """Images of CRIU 3.3, with further records in some of them."""
    images = older(load_made(made), (3, 3))
    for kind, records in more.items():
        name = f"{kind.replace('_', '-')}.img"
        images[name] = images.get(name, head(name)) + b"".join(
            record(message(*entry.fields)) for entry in records
        )
    return images


def test_ids_of_one_type_only() -> None:
    """A pipe may have the id of a ghost; whoever holds the pipe does not hold the ghost."""
    made = small()
    made.fd(1, 9, 4, kind=PIPE)
    made.file(PIPE, 40, (18, message((1, 40), (2, 5))))
    images = lists(made, pipes=[Record([(1, 4), (2, 6)])])
    assert [row.number for row in read(images).tasks[0].descriptors] == [3, 4]


def test_files_img_is_preferred() -> None:
    """The lists count only where files.img has no record at all, as for CRIU."""
    made = small()
    both = {**load_made(made), "reg-files.img": b"nonsense"}
    assert read(both) == read(load_made(made))
    empty = {**lists(made), "files.img": head("files.img")}
    assert read(empty) == read(lists(made))


BROKEN = {
    "repeated reg": (
        {"reg_files": [Record([(1, 4), (2, 0), (3, 0), (6, b"/x")])]},
        "reg-files.img, record 5: repeats file id 4",
    ),
    "repeated pipe": (
        {"pipes": [Record([(1, 1), (2, 1)])] * 2},
        "pipes.img, record 1: repeats file id 1",
    ),
    "fifo of nothing": (
        {"fifo": [Record([(1, 99), (2, 1)])]},
        "fifo.img, record 0: file id 99 was opened through id 99",
    ),
    "held pipe": (
        {"fdinfo_101": [Record([(1, 8), (2, 0), (3, PIPE), (4, 20)])]},
        "fdinfo-101.img, record 2: refers to file id 8 of type 2, which pipes.img does not hold",
    ),
    "held reg": (
        {"fdinfo_101": [Record([(1, 80), (2, 0), (3, REG), (4, 20)])]},
        "fdinfo-101.img, record 2: refers to file id 80, which reg-files.img does not hold",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_contradictions(name: str) -> None:
    """They are as wrong as in images of today, and the image that is wrong is named."""
    more, expected = BROKEN[name]
    with pytest.raises(ImageError, match="^" + re.escape(expected)):
        read(lists(small(), **more))


def test_limit_of_all_lists_together() -> None:
    images = lists(small(), pipes=[Record([(1, number)]) for number in range(1, 5)])
    read_source("images", MemorySource(images), Limits(files=9))
    with pytest.raises(ImageError, match=r"^pipes\.img, record 3: 9 open files: the limit is 8"):
        read_source("images", MemorySource(images), Limits(files=8))


# -- What only still older ones need ------------------------------------------------------------


def test_mappings_in_an_image_of_their_own() -> None:
    images = load_made(small())
    images["vmas-1.img"] = b""
    with pytest.raises(UnsupportedError, match=r"^vmas-1\.img: .* CRIU older than 1\.2"):
        read(images)


def test_files_without_mounts() -> None:
    """Before 1.3 no file said on which mount it was."""
    parts = {name: take_apart(name, data) for name, data in load_made(small()).items()}
    parts["files.img"] = [
        Record([*fields[:2], (3, message(*without(inner(fields, 3), 7)))])
        for fields, _ in parts["files.img"]
    ]
    images = {name: put_together(name, records) for name, records in parts.items()}
    with pytest.raises(UnsupportedError, match=r"^files\.img: .* CRIU older than 1\.3"):
        read(images)


# -- Open flags ---------------------------------------------------------------------------------

DIRECT, LARGEFILE, DIRECTORY, NOFOLLOW = 0o40000, 0o100000, 0o200000, 0o400000
"""As x86-64 has them."""
OTHERS = {
    2: (0o200000, 0o400000, 0o40000, 0o100000),
    3: (0o200000, 0o400000, 0o40000, 0o100000),
    4: (0o400000, 0o200000, 0o40000, 0o100000),
}


@pytest.mark.skipif(os.O_DIRECTORY != DIRECTORY, reason="the numbers are those of x86-64")
@pytest.mark.parametrize("machine", [1, 2, 3, 4, 5, 7, 8])
def test_flags_of_machines(machine: int) -> None:
    """Every combination of the four that differ is what it is here, and the others stay."""
    here = (DIRECT, LARGEFILE, DIRECTORY, NOFOLLOW)
    there = OTHERS.get(machine, here)
    ours = flags_of(machine, "core-1.img") or (lambda flags: flags)
    for chosen in product((0, 1), repeat=4):
        theirs = sum(bit for bit, on in zip(there, chosen, strict=True) if on)
        wanted = sum(bit for bit, on in zip(here, chosen, strict=True) if on)
        assert ours(theirs | os.O_RDWR | os.O_APPEND) == wanted | os.O_RDWR | os.O_APPEND


@pytest.mark.parametrize(("machine", "name"), [(0, "number 0"), (6, "MIPS"), (9, "number 9")])
def test_machine_whose_flags_nobody_knows(machine: int, name: str) -> None:
    images = big_endian(DUMPS["01-ro-basic"], machine=machine)
    with pytest.raises(UnsupportedError, match=rf"^core-1\.img: .* \({name}\) whose open flags"):
        read(images)


@pytest.mark.skipif(os.O_DIRECTORY != DIRECTORY, reason="the numbers are those of x86-64")
def test_flags_of_files() -> None:
    """They are made ours where they are read, in both kinds of lists."""
    made = small()
    made.open(1, 5, "/data", flags=0o440000, mode=0o40755)
    images = load_made(made)
    parts = {name: take_apart(name, data) for name, data in images.items()}
    parts["core-1.img"] = [Record([(1, 3), *parts["core-1.img"][0].fields[1:]])]
    arm = {name: put_together(name, records) for name, records in parts.items()}
    for dump in (arm, older(arm, (3, 3))):
        files = read(dump).files
        assert [file.flags for file in files.values() if file.name == b"/data"] == [0o300000]
