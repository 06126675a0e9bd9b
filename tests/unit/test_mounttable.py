"""A mount table finds the same lines whether it searches for them or has indexed all of them."""

from __future__ import annotations

import pytest

from ghostpool import LiveMount, MountTable
from ghostpool._mountinfo import escape, unescape

POINTS = [
    b"/",
    b"/data",
    b"/data/deep",
    b"/ro",
    b"/with space",
    b"/tab\tnewline\nback\\slash",
    b"/looks\\040escaped",
    b"/not\xffutf8",
    *(b"/m/%d" % number for number in range(50)),
]


def line(number: int, mountpoint: bytes, root: bytes = b"/", source: bytes = b"none") -> bytes:
    place = b"%d 1 0:%d %b %b" % (number, number, escape(root), escape(mountpoint))
    return place + b" ro,relatime shared:3 - tmpfs %b rw\n" % escape(source)


# Each root and each source is somebody else's mount point: only the fifth field counts.
RAW = b"".join(
    line(number, point, root=POINTS[number - 110], source=POINTS[number - 111])
    for number, point in enumerate(POINTS, 100)
)


def test_searching_finds_what_the_index_has() -> None:
    indexed = MountTable(RAW)
    everything = list(indexed)
    assert len(everything) == len(indexed) == len(POINTS)
    for number, point in enumerate(POINTS, 100):
        for table in (MountTable(RAW), indexed):
            (mount,) = table.stack(point)
            assert (mount.mnt_id, mount.mountpoint) == (number, point)
            assert mount.root == POINTS[number - 110]
            assert table.with_id(number) == mount
    for table in (MountTable(RAW), indexed):
        assert table.stack(b"/m") == table.stack(b"/dat") == table.stack(b"") == []
        assert table.with_id(10) is table.with_id(99) is None
        assert table.containing(b"/m/1/file") == table.stack(b"/m/1")[0]
        assert table.containing(b"/m/file") == table.stack(b"/")[0]


def test_many_questions_to_one_table() -> None:
    """However many there are, and whatever was asked before."""
    table = MountTable(RAW)
    for _ in range(3):
        for number, point in enumerate(POINTS, 100):
            assert [mount.mnt_id for mount in table.stack(point)] == [number]
            assert table.stack(point + b"x") == []


def test_a_stack_that_is_as_deep_as_one_likes() -> None:
    """Bottom first by the parents, whatever the order of the lines."""
    lines = [b"%d %d 0:5 / /deep rw - tmpfs none rw\n" % (n, n - 1) for n in range(60, 0, -1)]
    table = MountTable(b"1 0 0:5 / / rw - tmpfs none rw\n" + b"".join(lines[:-1]))
    assert [mount.mnt_id for mount in table.stack(b"/deep")] == list(range(2, 61))


def test_a_table_without_its_last_newline() -> None:
    table = MountTable(line(7, b"/data").rstrip(b"\n"))
    assert isinstance(table.stack(b"/data")[0], LiveMount)
    assert len(table) == 1
    assert table.with_id(7) == table.stack(b"/data")[0]


@pytest.mark.parametrize("raw", [b"nonsense\n", b"1 2 3:4 / /data\n"])
def test_what_is_no_mountinfo(raw: bytes) -> None:
    with pytest.raises(ValueError, match="not a line of mountinfo"):
        list(MountTable(raw))


@pytest.mark.parametrize("path", POINTS)
def test_escaping_there_and_back(path: bytes) -> None:
    shown = escape(path)
    assert unescape(shown) == path
    assert not set(shown) & set(b" \t\n")
