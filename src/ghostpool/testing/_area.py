"""Memory that a run under test and its observer share: what happened, and what is to happen.

A mapping of the test process, the fork server and all its children. Every process writes into a
region of its own, so a process that is killed while it writes harms no other; what has to happen
a given number of times is a semaphore in the mapping, since two workers may come to a step at the
same time. The mapping survives the closing of all descriptors and the loss of all rights.
Standard library only: the children load it before their imports are sealed.
"""

from __future__ import annotations

import ctypes
import marshal
import mmap
import os
import struct
from typing import Any, NamedTuple

Fault = tuple[Any, ...]
"""What is to happen: ("errno", number), ("kill", whom) or ("stop",)."""

REGIONS = 256
"""Processes that are told apart; those beyond come to faults, but nothing is noted of them."""
REGION = 1 << 15
FAULTS = 32
ALWAYS = 2**31 - 1
"""As many times as a semaphore counts."""

_SEMAPHORE = 32  # sizeof(sem_t)
_SLOT = 512
_FREE = 0  # a semaphore for each region: taken by whoever writes there
_SKIP = _FREE + REGIONS * _SEMAPHORE  # for each fault, arrivals that go by before it
_LEFT = _SKIP + FAULTS * _SEMAPHORE  # and how many times it still happens
_FLAGS = _LEFT + FAULTS * _SEMAPHORE
_SLOTS = 1 << 14
_HEAD = 1 << 15
SIZE = _HEAD + REGIONS * REGION
_START = 12  # end, pid, run

_libc = ctypes.CDLL(None, use_errno=True)


class Process(NamedTuple):
    """One process that has written into its region."""

    pid: int
    run: int
    """Processes of one fork server have the same number."""
    kind: str
    lines: tuple[str, ...]


class Area:
    """The mapping of a file in memory, for one process. Made by `create` and by `at`."""

    def __init__(self, fd: int) -> None:
        self.path: str = f"/proc/{os.getpid()}/fd/{fd}"
        """By which other processes find it, as long as the one that made it does not close it."""
        self._fd = fd
        self._map = mmap.mmap(fd, SIZE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._region = -1
        self._end = _START
        self._run = -1
        self._read: list[tuple[str, Fault]] = []
        self._last: tuple[list[Process], list[int]] | None = None

    @classmethod
    def create(cls) -> Area:
        """A fresh one: nothing has happened, nothing is to happen."""
        fd = os.memfd_create("ghostpool-faults")
        os.ftruncate(fd, SIZE)
        area = cls(fd)
        for number in range(REGIONS):
            area._semaphore("init", _FREE, number, 1)
        return area

    @classmethod
    def at(cls, path: str) -> Area:
        """The one that another process has made."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go of it; who has mapped it keeps it. What happened can still be asked for."""
        self._last = self.processes(), [self.left(number) for number in range(len(self.faults()))]
        os.close(self._fd)
        self._map.close()

    def _semaphore(self, function: str, table: int, number: int, value: int | None = None) -> bool:
        """sem_init(3), sem_trywait(3) or sem_post(3) of a semaphore that processes share."""
        at = ctypes.c_void_p(self._address + table + number * _SEMAPHORE)
        if value is not None:
            return bool(_libc.sem_init(at, 1, value) == 0)
        return bool(getattr(_libc, f"sem_{function}")(at) == 0)

    # -- What is to happen -----------------------------------------------------------------------

    def arm(self, step: str, fault: Fault, *, after: int = 0, times: int = 1) -> int:
        """Let it happen at a step, to the `times` arrivals after the first `after`; its number."""
        number = len(self.faults())
        if number == FAULTS:
            raise RuntimeError(f"more than {FAULTS} faults")
        self._semaphore("init", _SKIP, number, after)
        self._semaphore("init", _LEFT, number, times)
        data = marshal.dumps((step, fault))
        at = _SLOTS + number * _SLOT
        self._map[at + 4 : at + 4 + len(data)] = data
        self._map[at : at + 4] = struct.pack("I", len(data))  # last: from now on it is there
        return number

    def faults(self) -> list[tuple[str, Fault]]:
        """All that were armed so far, by number."""
        while len(self._read) < FAULTS:
            at = _SLOTS + len(self._read) * _SLOT
            (length,) = struct.unpack_from("I", self._map, at)
            if not length:
                break
            data = self._map[at + 4 : at + 4 + length]
            self._read.append(marshal.loads(data))  # noqa: S302  our own words
        return self._read

    def take(self, number: int) -> bool:
        """Whether the caller, who has arrived at its step, is one that the fault happens to."""
        return not self._semaphore("trywait", _SKIP, number) and self._semaphore(
            "trywait", _LEFT, number
        )

    def give_back(self, number: int) -> None:
        """It could not happen this time."""
        self._semaphore("post", _LEFT, number)

    def left(self, number: int) -> int:
        """How many times it is still to happen."""
        if self._last is not None:
            return self._last[1][number]
        value = ctypes.c_int()
        at = self._address + _LEFT + number * _SEMAPHORE
        _libc.sem_getvalue(ctypes.c_void_p(at), ctypes.byref(value))
        return value.value

    # -- What happened ---------------------------------------------------------------------------

    def enter(self, kind: str, run: int | None = None) -> int:
        """Write into a region of one's own from now on; the number of the run.

        `run`: that of the fork server; None if the caller is it.
        """
        self._region, self._end = -1, _START
        for number in range(REGIONS):
            if self._semaphore("trywait", _FREE, number):
                self._region = number
                break
        self._run = self._region if run is None else run
        if self._region >= 0:
            struct.pack_into("II", self._map, self._at(4), os.getpid(), self._run)
            self.note(kind)
        return self._run

    def note(self, line: str) -> None:
        """Remember a line; those beyond the region's end are lost, the first ones matter."""
        data = line.encode() + b"\n"
        if self._region < 0 or self._end + len(data) > REGION:
            return
        self._map[self._at(self._end) : self._at(self._end + len(data))] = data
        self._end += len(data)
        self._map[self._at(0) : self._at(4)] = struct.pack("I", self._end)

    def _at(self, offset: int) -> int:
        return _HEAD + self._region * REGION + offset

    def processes(self) -> list[Process]:
        """Every process so far, about in the order of their forks."""
        if self._last is not None:
            return self._last[0]
        found = []
        for region in range(REGIONS):
            at = _HEAD + region * REGION
            end, pid, run = struct.unpack_from("III", self._map, at)
            if end:
                kind, *lines = self._map[at + _START : at + end].decode().splitlines()
                found.append(Process(pid, run, kind, tuple(lines)))
        return found

    def pids(self, *kinds: str) -> list[int]:
        """Processes of these kinds, in a process of a run those of the same; some have ended."""
        return [
            one.pid
            for one in self.processes()
            if one.kind in kinds and (self._run < 0 or one.run == self._run)
        ]

    def _flag(self, number: int, value: int | None) -> bool:
        if value is not None:
            self._map[_FLAGS + number] = value
        return bool(self._map[_FLAGS + number])

    def acknowledged(self, value: int | None = None) -> bool:
        """Set by a coordinator that was cancelled from a worker's step."""
        return self._flag(0, value)

    def fired(self, value: int | None = None) -> bool:
        """Set when a fault has happened."""
        return self._flag(1, value)
