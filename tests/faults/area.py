"""Memory that a run under test and its observer share: what happened, and what is to happen.

A file mapped by the coordinator, the fork server and all its children. Every process writes into
a region of its own, so a process that is killed while it writes harms no other; what has to happen
once is a semaphore in the mapping, since two workers may come to a step at the same time. The
mapping survives the closing of all descriptors and the loss of all rights.
Standard library only: the children load it before their imports are sealed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from typing import Any, NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)
REGIONS = 128
REGION = 1 << 15
TOKENS = 4
_HEAD = 4096
_ACKNOWLEDGED, _FIRED = 2048, 2049
SIZE = _HEAD + REGIONS * REGION


class Process(NamedTuple):
    """One process that has written into its region."""

    pid: int
    kind: str
    lines: tuple[str, ...]


class Area:
    """The mapping of the file at `path`, which `create` makes."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(fd, SIZE)
        finally:
            os.close(fd)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._region = 0
        self._end = 8

    @classmethod
    def create(cls, path: str) -> Area:
        """A fresh one: nothing has happened."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, SIZE)
        os.close(fd)
        area = cls(path)
        for number in range(TOKENS):
            _libc.sem_init(ctypes.c_void_p(area._address + 32 * number), 1, 1)
        return area

    def take(self, token: int) -> bool:
        """Whether the caller is the first one: sem_trywait(3)."""
        return bool(_libc.sem_trywait(ctypes.c_void_p(self._address + 32 * token)) == 0)

    def enter(self, region: int, kind: str) -> None:
        """Write into this region from now on."""
        if region >= REGIONS:
            raise RuntimeError("too many processes for one run")
        self._region, self._end = region, 8
        self._map[self._at(4) : self._at(8)] = struct.pack("I", os.getpid())
        self.note(kind)

    def note(self, line: str) -> None:
        """Remember a line; those beyond the region's end are lost, the first ones matter."""
        data = line.encode() + b"\n"
        if self._end + len(data) > REGION:
            return
        self._map[self._at(self._end) : self._at(self._end + len(data))] = data
        self._end += len(data)
        self._map[self._at(0) : self._at(4)] = struct.pack("I", self._end)

    def _at(self, offset: int) -> int:
        return _HEAD + self._region * REGION + offset

    def processes(self) -> list[Process]:
        """Every process so far, in the order of their forks."""
        found = []
        for region in range(REGIONS):
            at = _HEAD + region * REGION
            end, pid = struct.unpack_from("II", self._map, at)
            if end:
                kind, *lines = self._map[at + 8 : at + end].decode().splitlines()
                found.append(Process(pid, kind, tuple(lines)))
        return found

    def pids(self, *kinds: str) -> list[int]:
        """Processes of these kinds; they may have ended."""
        return [one.pid for one in self.processes() if one.kind in kinds]

    def _flag(self, at: int, value: int | None) -> bool:
        if value is not None:
            self._map[at] = value
        return bool(self._map[at])

    def acknowledged(self, value: int | None = None) -> bool:
        """Set by a coordinator that was cancelled from a worker's step."""
        return self._flag(_ACKNOWLEDGED, value)

    def fired(self, value: int | None = None) -> bool:
        """Set when a fault has happened."""
        return self._flag(_FIRED, value)


Fault = tuple[Any, ...]
"""("errno", number), ("kill", whom), ("stop",) or ("cancel",)."""
