"""The journal's format: what is written is read, and a cut loses the last record only."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ghostpool import _linux
from ghostpool._journal import MAGIC, Debts, Journal, JournalError, JournalFile
from ghostpool._protocol import RemoveOp

RUN = ("run", "0123456789ab", 17, 1000, 4026531836, "boot", 1_700_000_000)
NAMESPACE = ("namespace", 0, 4026532100, 12, "mnt:[4026532100] (pid 17)", "17")
MOUNT = ("mount", 0, 0, 1 << 32, 41, b"/data", b"/", 2049, 0x27, 77)
REMOVAL = (1, b"d", b".ghostpool-0123456789ab-1", 0, 0, (), None)
NAMES: tuple[Any, ...] = (("ghost", 1), "names", 0, [REMOVAL], (b"d", 2049, 77))
OTHER_NAMES: tuple[Any, ...] = (("ghost", 2), "names", 0, [REMOVAL], (b"d", 2049, 77))
WRITABLE: tuple[Any, ...] = (("mount", 0), "mount", 0, 0, None)
APPENDED: list[tuple[Any, ...]] = [
    ("guardian", 19, 1002),
    ("process", 18, 1001),
    ("owe", [NAMES, OTHER_NAMES]),
    ("owe", [WRITABLE]),
    ("settle", [("ghost", 2)]),
    ("owe", [NAMES]),
    ("settle", [("mount", 0)]),
    ("settle", "names"),
]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def written(directory: int, records: list[tuple[Any, ...]]) -> bytes:
    file = JournalFile.create(directory, "0123456789ab", [RUN, NAMESPACE, MOUNT])
    try:
        for record in records:
            file.append(*record, sync=record[0] == "owe")
        return os.pread(file.fileno(), 1 << 20, 0)
    finally:
        file.remove()
        os.close(file.fileno())


def test_what_is_written_is_read(directory: int) -> None:
    journal = Journal(written(directory, APPENDED[:6]))
    assert tuple(journal.run) == RUN[1:]
    assert {n: tuple(found) for n, found in journal.namespaces.items()} == {0: NAMESPACE[1:]}
    assert {n: tuple(found) for n, found in journal.mounts.items()} == {0: MOUNT[1:]}
    assert [tuple(found) for found in journal.processes] == [(18, 1001)]
    assert journal.guardian == (19, 1002)
    # What was said last is about the latest change, and is undone first.
    assert list(journal.debts) == [("mount", 0), ("ghost", 1)]
    assert tuple(journal.debts["ghost", 1]) == NAMES[1:]
    assert not journal.is_cut


def test_everything_is_settled(directory: int) -> None:
    assert not Journal(written(directory, APPENDED)).debts


def test_cut_at_every_byte(directory: int) -> None:
    """It says what its whole records say, and never anything else."""
    whole = written(directory, APPENDED)
    ends = [len(MAGIC)]
    while ends[-1] < len(whole):
        ends.append(ends[-1] + 8 + int.from_bytes(whole[ends[-1] : ends[-1] + 4], "little"))
    assert len(ends) == len(APPENDED) + 4
    read = 0
    for length in range(len(whole)):
        cut = whole[:length]
        if length < ends[1]:
            with pytest.raises(JournalError, match=r"begin as a journal|cut before"):
                Journal(cut)
            continue
        last = max(end for end in ends if end <= length)
        journal, expected = Journal(cut), Journal(whole[:last])
        assert (journal.end, journal.is_cut) == (last, last != length)
        assert journal.debts == expected.debts
        assert list(journal.debts) == list(expected.debts)
        read += 1
    assert read > 100


def test_any_byte_changed(directory: int) -> None:
    """A sum that is wrong ends the journal; what was said before holds."""
    whole = written(directory, APPENDED)
    for at in range(len(MAGIC), len(whole)):
        broken = bytearray(whole)
        broken[at] ^= 0x41
        try:
            journal = Journal(bytes(broken))
        except JournalError:
            continue
        assert journal.end <= at
        assert journal.debts == Journal(whole[: journal.end]).debts


def test_damage_in_the_middle(directory: int) -> None:
    """What follows may be owed, too: that is no journal to act on."""
    whole = bytearray(written(directory, APPENDED))
    whole[len(MAGIC) + 20] ^= 1
    with pytest.raises(JournalError, match="is damaged, and more follows"):
        Journal(bytes(whole))


def test_order_of_undoing() -> None:
    """Last things first; but names that need their mount writable, then mounts, then the rest."""
    live_names = (("ghost", 3), "names", 0, [(0, *REMOVAL[1:])], (b"d", 2049, 77))
    debts = Debts()
    debts.owe([live_names, NAMES, WRITABLE, OTHER_NAMES])
    assert debts.undoing() == [("ghost", 3), ("mount", 0), ("ghost", 2), ("ghost", 1)]


def test_names_of_one_directory(directory: int) -> None:
    """In short form they are the same removals, in the order of undoing of all names."""
    what = (0, b"d", [(b"a", 0, 0), (b"b", 2049, 78)])
    files = (("names", 4), "files", 0, what, (b"d", 2049, 77))
    debts = Journal(written(directory, [("owe", [files, WRITABLE])])).debts
    debt = debts["names", 4]
    assert debt.changes == 2
    assert [tuple(RemoveOp(*fields)) for fields in debt.removals] == [
        (0, b"d", b"a", 0, 0, (), None, ()),
        (0, b"d", b"b", 2049, 78, (), None, ()),
    ]
    assert debts.undoing() == [("names", 4), ("mount", 0)]
    debts.settle("names")
    assert list(debts) == [("mount", 0)]
    assert (debts["mount", 0].removals, debts["mount", 0].changes) == ([], 1)


@pytest.mark.parametrize("data", [b"", b"\0" * 100, MAGIC, MAGIC[:5], b"ghostpool journal 2\n"])
def test_no_journal(data: bytes) -> None:
    with pytest.raises(JournalError, match=r"begin as a journal|cut before"):
        Journal(data)


def test_a_record_of_an_unknown_kind(directory: int) -> None:
    """A later version's: what it means is not known, so nothing is acted on."""
    with pytest.raises(JournalError, match="unknown kind, 'borrow'"):
        Journal(written(directory, [("borrow", 1)]))


def test_a_record_of_another_shape(directory: int) -> None:
    with pytest.raises(JournalError, match="can not be read"):
        Journal(written(directory, [("mount", 1)]))


def test_half_a_record_is_taken_back(directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the middle of a record: the next one is written where it began."""
    file = JournalFile.create(directory, "0123456789ab", [RUN])
    write_all = _linux.write_all

    def half(fd: int, data: bytes, offset: int) -> None:
        write_all(fd, data[: len(data) // 2], offset)
        raise OSError(28, "No space left on device")

    try:
        with monkeypatch.context() as patch:
            patch.setattr(_linux, "write_all", half)
            with pytest.raises(OSError, match="No space"):
                file.append("owe", [NAMES], sync=True)
        file.append("owe", [WRITABLE], sync=True)
        journal = Journal(os.pread(file.fileno(), 1 << 20, 0))
    finally:
        file.remove()
        os.close(file.fileno())
    assert list(journal.debts) == [("mount", 0)]
    assert not journal.is_cut


def test_created_whole_or_not_at_all(directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output"):
        JournalFile.create(directory, "0123456789ab", [RUN])
    assert os.listdir(directory) == []


def test_it_has_its_name_only_once_it_is_whole(
    directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And locked: who finds it must not take it for a dead run's."""
    link = os.link
    seen: list[list[str]] = []

    def look(*arguments: Any, **keywords: Any) -> None:
        seen.append(os.listdir(directory))
        link(*arguments, **keywords)
        name = "0123456789ab.journal"
        assert Journal(Path(f"/proc/self/fd/{directory}", name).read_bytes()).run.pid == RUN[2]
        other = os.open(name, os.O_RDONLY, dir_fd=directory)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)

    monkeypatch.setattr(os, "link", look)
    file = JournalFile.create(directory, "0123456789ab", [RUN])
    os.close(file.fileno())
    file.remove()
    assert seen == [[]]


def test_settling_twice_is_harmless() -> None:
    debts = Debts()
    debts.owe([NAMES, WRITABLE])
    debts.settle([("ghost", 1), ("ghost", 9)])
    debts.settle([("ghost", 1)])
    assert list(debts) == [("mount", 0)]
    debts.settle("names")
    assert list(debts) == [("mount", 0)]
    debts.settle("mount")
    assert not debts
