"""Whose a name is that looks like a leftover: a living run's, a dead one's, a running criu's.

Journals tell of ghostpool's runs: each is locked as long as its run is alive, says what it owes,
and its name is a part of the run's temporary names. CRIU leaves no such record, but its process
has its name.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field

from ghostpool import _journal
from ghostpool._errors import PlanError
from ghostpool._journal import Journal, JournalError
from ghostpool._protocol import Remnant, RemoveOp


@dataclass(eq=False, slots=True)
class Claims:
    """As things are when it is made."""

    alive: set[str] = field(default_factory=set)
    """Runs that go on."""
    dead: dict[str, set[tuple[int, int]]] = field(default_factory=dict)
    """Runs that recover undoes, and the files (device, inode) that they owe."""
    criu: list[int] = field(default_factory=list)
    """Processes."""

    @classmethod
    def now(cls, directory: int) -> Claims:
        """By the run directory, and /proc. PlanError: a journal can not be read."""
        claims = cls()
        for name in _journal.pending(directory):
            claims._add(directory, name)
        claims.criu = [pid for pid in _pids() if _command_of(pid) == b"criu"]
        return claims

    def _add(self, directory: int, name: str) -> None:
        token = name.removesuffix(_journal.SUFFIX)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            return  # it has just ended, with nothing owed
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                self.alive.add(token)
                return
            debts = Journal.read(fd).debts
        except (JournalError, OSError) as error:
            raise PlanError(
                f"the journal of run {token} can not be read ({error}), so nobody knows what is "
                "its own: see ghostpool recover"
            ) from error
        finally:
            os.close(fd)
        owed = [RemoveOp(*fields) for debt in debts.values() for fields in debt.removals]
        self.dead[token] = {(one.device, one.inode) for one in owed if one.inode}

    def reason(self, found: Remnant) -> str | None:
        """Why this is not a leftover to be removed; None: it is one."""
        if found.kind == "ghostpool":
            token = found.name.split(b"-")[1].decode()
            if token in self.alive:
                return f"run {token} is alive"
            if token in self.dead:
                return f"ghostpool recover removes it: it is of run {token}, which is dead"
            return None
        for token, files in self.dead.items():
            if (found.device, found.inode) in files:
                return f"ghostpool recover removes it: it is of run {token}, which is dead"
        if found.kind in ("cr_link", "link_remap") and self.alive:
            what = "have made" if found.kind == "cr_link" else "need"
            return f"run {min(self.alive)} is alive, and may {what} it"
        if self.criu:
            return f"criu is running (process {self.criu[0]}), and may have made it"
        return None


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())


def _command_of(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().rstrip(b"\n")
    except OSError:
        return b""  # it has ended


__all__ = ["Claims"]
