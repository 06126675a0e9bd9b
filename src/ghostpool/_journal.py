"""The journal: how to undo what a run changes, on disk before it is changed.

    file   := MAGIC, record…
    record := u32 length, u32 CRC-32 of the payload, <length> bytes of marshal (version 4)

One file a run, written by its guardian. A record is a tuple that begins with its kind: `run`,
`namespace`, `mount`, `guardian` and `process` say who and what is meant in terms that outlive the
run, `owe` what is about to be changed, `settle` what is undone or was never done. An `owe` reaches
the disk before the change is asked for; nothing else needs to, because undoing twice is harmless.

A record that is cut, or whose sum is wrong, ends the journal where it begins: what it would have
said had not been done yet, or was only the news that something is settled.

The lock of a run is flock(2) on this file, held by the open file description that guardian and
coordinator share: the kernel lets go of it when both are gone, however they went.
"""

from __future__ import annotations

import binascii
import fcntl
import marshal
import os
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

from ghostpool import _linux
from ghostpool._failed import Work

MAGIC = b"ghostpool journal 1\n"
SUFFIX = ".journal"
_HEAD = struct.Struct("<II")
_MARSHAL = 4
"""The version of marshal that every CPython from 3.4 on reads."""


class JournalError(ValueError):
    """The file is no journal that this version can act on."""


class JournalRun(NamedTuple):
    """Whose journal it is."""

    token: str
    """Part of the temporary names of the run."""
    pid: int
    start_time: int
    pid_namespace: int
    boot_id: str
    begun: int
    """Seconds since 1970."""


class JournalNamespace(NamedTuple):
    """A mount namespace that is worked in."""

    number: int
    """As in the plan and in the debts."""
    inode: int
    unique_id: int
    """0 where the kernel has none (before Linux 6.11)."""
    label: str
    enter: str | None
    """Pid or path that the operator named it by."""


class JournalMount(NamedTuple):
    """A mount that is worked on, as it was found."""

    handle: int
    namespace: int
    unique_id: int
    """0 before Linux 6.8."""
    mnt_id: int
    mountpoint: bytes
    root: bytes
    device: int
    attributes: int
    fsid: int
    """Number of the file system: the device number of one without a disk is used again."""


class JournalProcess(NamedTuple):
    """A worker: as long as it lives, it may be in the middle of a change. Or the guardian."""

    pid: int
    start_time: int


class Anchor(NamedTuple):
    """The directory that names are in, or the deepest one above them that was there before."""

    path: bytes
    """Relative to the root of the mount."""
    device: int
    inode: int


class Debt(NamedTuple):
    """How to undo one change."""

    kind: str
    """`mount`: make it read-only again; `names`: remove them; `files`: likewise, for names of
    one directory, which are nearly all that there is."""
    target: int
    what: Any
    """Handle of the mount; removals, as the fields of RemoveOp; or mount, directory, and for each
    name (name, device, inode)."""
    anchor: tuple[bytes, int, int] | None

    @property
    def removals(self) -> list[tuple[Any, ...]]:
        """The fields of a RemoveOp for each name."""
        if self.kind == "mount":
            return []
        if self.kind == "names":
            return list(self.what)
        mount, directory, names = self.what
        return [(mount, directory, *name, (), None) for name in names]

    @property
    def changes(self) -> int:
        """How many changes are to be undone."""
        if self.kind == "mount":
            return 1
        return len(self.what if self.kind == "names" else self.what[2])


class Debts(dict[Any, Debt]):
    """What is owed, by key; what was changed last comes last, and is undone first."""

    def owe(self, records: Iterable[tuple[Any, ...]]) -> None:
        """Enter (key, kind, target, what, anchor)."""
        for key, *fields in records:
            # The latest word is about the latest change.
            self.pop(key, None)
            self[key] = Debt(*fields)

    def settle(self, keys: Iterable[Any] | str) -> None:
        """Strike out these keys, or everything of a kind: with "names", all kinds of them."""
        if isinstance(keys, str):
            kinds = ("names", "files") if keys == "names" else (keys,)
            keys = [key for key, debt in self.items() if debt.kind in kinds]
        for key in keys:
            self.pop(key, None)

    def undoing(self) -> list[Any]:
        """The keys in the order of undoing: last things first, but mounts before all names that do
        not need them writable, so that nobody who holds names up holds a mount writable."""
        needing, mounts, others = [], [], []
        for key, debt in reversed(self.items()):
            if debt.kind == "mount":
                mounts.append(key)
            elif any(("mount", operation[0]) in self for operation in debt.removals[:1]):
                needing.append(key)
            else:
                others.append(key)
        return [*needing, *mounts, *others]


class JournalFile(Work):
    """The open journal of a run, locked; appends to it."""

    def __init__(self, directory: int, fd: int, name: str, end: int) -> None:
        self._directory = directory
        self._fd = fd
        self._name = name
        self._end = end

    @classmethod
    def create(cls, directory: int, token: str, records: Iterable[tuple[Any, ...]]) -> JournalFile:
        """A new journal in the run directory, which is borrowed; on disk when this returns.

        OSError: it can not be written, so nothing may be changed.
        """
        name = token + SUFFIX
        journal = cls(directory, -1, name, 0)
        journal._step = "openat"
        # Without a name until it is locked and whole: a journal without a lock is a dead run's.
        fd = journal._fd = os.open(
            ".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=directory
        )
        try:
            journal._step = "flock"
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            data = MAGIC + b"".join(map(_frame, records))
            journal._step = "pwrite"
            _linux.write_all(fd, data, 0)
            journal._end = len(data)
            journal._step = "fdatasync"
            os.fdatasync(fd)
            journal._step = "linkat"
            # By its magic link: AT_EMPTY_PATH would take CAP_DAC_READ_SEARCH.
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)
            journal._step = "fsync"
            os.fsync(directory)
        except BaseException:
            os.close(fd)
            journal._undo_step = "unlinkat"
            discard(directory, name)
            raise
        return journal

    def fileno(self) -> int:
        return self._fd

    def append(self, *record: Any, sync: bool = False) -> None:
        """Write one record; with `sync`, it is on disk when this returns.

        OSError: it is not in the journal, which is as it was.
        """
        data = _frame(record)
        try:
            self._step = "pwrite"
            _linux.write_all(self._fd, data, self._end)
            if sync:
                self._step = "fdatasync"
                os.fdatasync(self._fd)
        except OSError:
            # Half a record would end the journal for those that follow it.
            self._undo_step = "ftruncate"
            os.ftruncate(self._fd, self._end)
            raise
        self._end += len(data)

    def remove(self) -> None:
        """Nothing is owed any more."""
        self._step = "unlinkat"
        remove(self._directory, self._name)


def pending(directory: int) -> list[str]:
    """Names of the journals in a run directory, of living runs too."""
    return sorted(name for name in os.listdir(directory) if name.endswith(SUFFIX))


def remove(directory: int, name: str) -> None:
    """Take the journal `name` away; one that is gone already is as good."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return
    os.fsync(directory)


def discard(directory: int, name: str) -> None:
    """Take away a journal that may be there, as far as that is possible."""
    try:
        remove(directory, name)
    except OSError:
        pass


def _frame(record: tuple[Any, ...]) -> bytes:
    payload = marshal.dumps(tuple(record), _MARSHAL)
    return _HEAD.pack(len(payload), binascii.crc32(payload)) + payload


class Journal:
    """What a journal says: `debts`, and who and what is meant by their numbers."""

    @classmethod
    def read(cls, fd: int) -> Journal:
        """The journal at a descriptor. JournalError, OSError."""
        return cls(os.pread(fd, os.fstat(fd).st_size, 0))

    def __init__(self, data: bytes) -> None:
        """JournalError: not even the run can be told from it."""
        self.namespaces: dict[int, JournalNamespace] = {}
        self.mounts: dict[int, JournalMount] = {}
        self.processes: list[JournalProcess] = []
        self.guardian: JournalProcess | None = None
        self.debts = Debts()
        run: JournalRun | None = None
        if not data.startswith(MAGIC):
            raise JournalError("it does not begin as a journal of this version does")
        at = len(MAGIC)
        try:
            while (record := _record(data, at)) is not None:
                (kind, *fields), at = record
                if kind == "run":
                    run = JournalRun(*fields)
                elif kind == "namespace":
                    self.namespaces[fields[0]] = JournalNamespace(*fields)
                elif kind == "mount":
                    self.mounts[fields[0]] = JournalMount(*fields)
                elif kind == "process":
                    self.processes.append(JournalProcess(*fields))
                elif kind == "guardian":
                    self.guardian = JournalProcess(*fields)
                elif kind == "owe":
                    self.debts.owe(fields[0])
                elif kind == "settle":
                    self.debts.settle(fields[0])
                else:
                    raise JournalError(f"it holds a record of an unknown kind, {kind!r}")
        except (TypeError, ValueError, EOFError) as error:
            raise JournalError(f"its record at byte {at} can not be read: {error}") from error
        self.end = at
        """Bytes up to the end of the last whole record: where one goes on writing."""
        self.is_cut = at < len(data)
        """Part of a record follows the last whole one."""
        if len(data) - at >= _HEAD.size:
            length, _ = _HEAD.unpack_from(data, at)
            if at + _HEAD.size + length < len(data):
                # Not cut, which loses the last record only: what follows may be owed, too.
                raise JournalError(f"its record at byte {at} is damaged, and more follows")
        if run is None:
            raise JournalError("it was cut before it says whose it is")
        self.run = run


def _record(data: bytes, at: int) -> tuple[tuple[Any, ...], int] | None:
    """The record at `at` and where it ends; None if there is no whole one."""
    if len(data) - at < _HEAD.size:
        return None
    length, checksum = _HEAD.unpack_from(data, at)
    payload = data[at + _HEAD.size : at + _HEAD.size + length]
    if len(payload) < length or binascii.crc32(payload) != checksum:
        return None
    return marshal.loads(payload), at + _HEAD.size + length  # noqa: S302  root's own file
