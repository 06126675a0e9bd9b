"""The archive of /dev/shm: what is found in it, in every format, and what is wrong with it."""

from __future__ import annotations

import io
import random
import tarfile
from typing import Any

import pytest

from ghostpool._devshm import read_devshm
from ghostpool._errors import ImageError
from ghostpool._limits import Limits, Tally
from ghostpool._model import ShmFile

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


class Memory:
    """An open image in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read(self, at: int, length: int) -> bytes:
        return self._data[at : at + length]

    def close(self) -> None:
        pass


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode, info.uid, info.gid, info.mtime = 0o600, 7, 8, 1_500_000_000
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.LNKTYPE, linkname=target)


def packed(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def found(data: bytes, limits: Limits | None = None) -> dict[bytes, ShmFile]:
    files = read_devshm("devshm.tar", Memory(data), Tally(limits or Limits()))
    return {file.name: file for file in files}


def content_of(data: bytes, file: ShmFile) -> bytes:
    return data[file.position : file.position + file.size]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("above", ["", "./", "dev/shm/", "/dev/shm/", "shm/", "./shm/"])
def test_link_remaps_are_found_where_runtimes_put_them(form: int, above: str) -> None:
    data = packed(
        member(above or ".", type=tarfile.DIRTYPE),
        member(f"{above}sem.living", b"living" * 100),
        member(f"{above}link_remap.7", b"x" * 32),
        member(f"{above}link_remap.12", b""),
        form=form,
    )
    files = found(data)
    assert sorted(files) == [b"link_remap.12", b"link_remap.7"]
    file = files[b"link_remap.7"]
    assert content_of(data, file) == b"x" * 32
    assert (file.mode, file.uid, file.gid) == (0o100600, 7, 8)
    assert file.mtime == 1_500_000_000_000_000


@pytest.mark.parametrize("form", FORMATS)
def test_hard_links_are_one_file(form: int) -> None:
    """To another link remap, or to a name that the file has besides."""
    data = packed(
        member("a", b"named"),
        member("./link_remap.1", b"hidden"),
        link("link_remap.2", "./link_remap.1"),
        link("link_remap.3", "a"),
        link("link_remap.4", "nowhere"),
        form=form,
    )
    files = found(data)
    assert sorted(files) == [b"link_remap.1", b"link_remap.2", b"link_remap.3"]
    assert files[b"link_remap.2"].position == files[b"link_remap.1"].position
    assert content_of(data, files[b"link_remap.3"]) == b"named"


@pytest.mark.parametrize("form", FORMATS[1:])
def test_what_takes_extended_headers(form: int) -> None:
    long = "n" * 200
    data = packed(
        member(long, b"long"),
        member("link_remap.1", b"content", uid=1 << 22, mtime=1_500_000_000.25),
        link("link_remap.2", long),
        form=form,
    )
    files = found(data)
    assert files[b"link_remap.1"].uid == 1 << 22
    micros = 1_500_000_000_250_000 if form == tarfile.PAX_FORMAT else 1_500_000_000_000_000
    assert files[b"link_remap.1"].mtime == micros
    assert content_of(data, files[b"link_remap.2"]) == b"long"


def test_an_archive_of_nothing() -> None:
    assert found(packed()) == found(bytes(1024)) == {}


def test_nothing_else_is_taken() -> None:
    data = packed(
        member("sub/link_remap.1", b"x"),
        member("../link_remap.2", b"x"),
        member("link_remap.3x", b"x"),
        member("link_remap.4", type=tarfile.SYMTYPE, linkname="/etc/shadow"),
        member("link_remap.5", type=tarfile.CHRTYPE),
        member("link_remap.6", type=tarfile.FIFOTYPE),
        member("link_remap.7", type=tarfile.DIRTYPE),
        member("etc/dev/shm/link_remap.8", b"x"),
        member("link_remap.9", b"x" * 512, pax_headers={"GNU.sparse.major": "1"}),
    )
    assert found(data) == {}


def damaged(at: int, value: bytes) -> bytes:
    """A field of the only header, with the sum that belongs to it."""
    block = bytearray(packed(member("link_remap.1", b"x" * 600), form=tarfile.USTAR_FORMAT))
    block[at : at + len(value)] = value
    total = sum(block[:148]) + 256 + sum(block[156:512])
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def extended(records: bytes) -> bytes:
    header = member("x", records, type=tarfile.XHDTYPE)
    return packed(header, member("link_remap.1", b"x"), form=tarfile.USTAR_FORMAT)


BROKEN = {
    "empty": b"",
    "text": b"no archive at all\n" * 100,
    "gzip": b"\x1f\x8b" + bytes(1000),
    "sum": packed(member("link_remap.1"))[:100] + b"\xff" + packed(member("link_remap.1"))[101:],
    "digits": damaged(124, b"0000000x001\0"),
    "negative": damaged(124, b"\xff" * 12),
    "huge": damaged(124, b"\x80" + b"\xff" * 11),
    "cut": packed(member("link_remap.1", b"x" * 5000))[:1024],
    "pax length": extended(b"0 path=a\n"),
    "pax cut": extended(b"99 path=a\n"),
    "pax text": extended(b"path=a\n"),
    "pax size": extended(b"20 size=1x000000000\n"),
    "pax negative": extended(b"11 size=-1\n"),
    "pax long": extended(b"x" * 100_000),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_archive_is_refused(kind: str) -> None:
    with pytest.raises(ImageError, match=r"devshm\.tar"):
        found(BROKEN[kind])


@pytest.mark.parametrize("form", FORMATS[1:])
def test_whatever_is_changed_it_is_read_or_refused(form: int) -> None:
    """And what is found lies in the archive."""
    whole = packed(
        member("n" * 150, b"long"),
        member("link_remap.1", b"x" * 700, uid=1 << 22, mtime=1.5),
        link("link_remap.2", "n" * 150),
        form=form,
    )[:5120]
    chance = random.Random(form)
    outcomes = set()
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.choice((0, 0x20, 0x31, 0x80, 0xFF))
        for at in range(0, len(data), 512):  # or next to nothing would come behind the sums
            if chance.random() < 0.9:
                block = data[at : at + 512]
                data[at + 148 : at + 156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
        try:
            files = found(bytes(data[: chance.choice((len(data), chance.randrange(len(data))))]))
        except ImageError:
            outcomes.add("refused")
            continue
        outcomes.add("read")
        assert all(file.position + file.size <= len(data) for file in files.values())
    assert outcomes == {"read", "refused"}


def test_limits() -> None:
    data = packed(member("link_remap.1", b"x" * 2000))
    assert len(found(data, Limits(size=2000))) == 1
    with pytest.raises(ImageError, match="a ghost of 2,000 bytes"):
        found(data, Limits(size=1999))
    with pytest.raises(ImageError, match="2 ghosts"):
        found(packed(member("link_remap.1"), member("link_remap.2")), Limits(ghosts=1))


def test_a_name_that_comes_twice() -> None:
    """Which of them was meant nobody knows."""
    data = packed(member("link_remap.1", b"one"), member("./dev/shm/link_remap.1", b"another"))
    with pytest.raises(ImageError, match=r"link_remap\.1 is in it twice"):
        found(data)
