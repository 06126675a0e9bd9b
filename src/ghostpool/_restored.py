"""The descriptors that a restore gives, until somebody takes them or they are closed.

One descriptor here is one open file description of the images. Tasks may share it, and one task
may have it at several numbers.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from ghostpool import _linux
from ghostpool._errors import VerificationError
from ghostpool._lease import MountUsage
from ghostpool._model import MountHandle, Pid, RegId
from ghostpool._paths import text
from ghostpool._planned import Plan, PlannedTask

_Name = TypeVar("_Name", int, str)
_ABOVE = 3
"""Numbers below it are never given to a descriptor that somebody takes."""


class Restored:
    """One descriptor for each reg file, until `close`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.fds: dict[RegId, int] = {}
        self.opened = 0
        """Files that were opened, whether they are held here or not."""
        self.usage: dict[MountHandle, MountUsage] = {}
        self.writable_attributes: Mapping[MountHandle, int] = {}
        """Attributes of each leased mount while it was writable, as the kernel gave them."""
        self.left: list[str] = []
        """What could not be removed because somebody else uses it now, for people."""
        self.consumed = 0
        """Hidden names of link remaps that were taken away."""
        self.closed: bool = False
        self.complete: bool = False
        """Everything is open, put back and verified."""
        self._taken: set[tuple[Pid, str]] = set()
        self._wanted: Counter[RegId] | None = None
        """How many numbers and keys of tasks that nobody has taken lead to each reg file."""

    def of_task(self, planned: PlannedTask) -> dict[int, int]:
        """Number in the task to descriptor here; numbers that share one were dup'ed."""
        return {
            descriptor.number: self.fds[descriptor.reg_id]
            for descriptor in planned.task.descriptors
            if descriptor.reg_id in self.fds
        }

    def of_keys(self, planned: PlannedTask) -> dict[str, int]:
        """What the task holds besides descriptors, by key: descriptor here, which some share."""
        return {key.key: self.fds[key.reg_id] for key in planned.keys if key.reg_id in self.fds}

    def take(self, planned: PlannedTask) -> dict[int, int]:
        """As `of_task`, but each number has a descriptor of its own, which is the caller's.

        RuntimeError if it is done twice, or when they have been closed. OSError (EMFILE): nothing
        was taken.
        """
        return self._take(planned, "descriptors", _numbers(planned))

    def take_keys(self, planned: PlannedTask) -> dict[str, int]:
        """As `of_keys`, but with a descriptor for each; raises what `take` does."""
        return self._take(planned, "keys", _keys(planned))

    def _take(
        self, planned: PlannedTask, what: str, rows: Iterable[tuple[_Name, RegId]]
    ) -> dict[_Name, int]:
        pid = planned.task.pid
        if self.closed:
            raise RuntimeError("the block of the restore has been left: everything is closed")
        if (pid, what) in self._taken:
            raise RuntimeError(f"the {what} of task {pid} have been taken already")
        names = [(name, reg) for name, reg in rows if reg in self.fds]
        wanted = self._wanted_by_tasks()
        mine = Counter(reg for _, reg in names)
        # Nobody else wants these. But until all is verified they are needed here.
        to_give = {reg for reg, count in mine.items() if self.complete and wanted[reg] == count}
        own: dict[_Name, int] = {}
        given: set[RegId] = set()
        try:
            for name, reg in names:
                if reg in to_give and reg not in given:
                    given.add(reg)
                    own[name] = self.fds[reg]
                else:
                    own[name] = fcntl.fcntl(self.fds[reg], fcntl.F_DUPFD_CLOEXEC, _ABOVE)
        except BaseException:
            _linux.close_all(set(own.values()) - {self.fds[reg] for reg in given})
            raise
        wanted.subtract(mine)
        for reg in given:
            del self.fds[reg]
        self._taken.add((pid, what))
        return own

    def _wanted_by_tasks(self) -> Counter[RegId]:
        if self._wanted is None:
            self._wanted = Counter(reg for task in self.plan.tasks for reg in task.held)
        return self._wanted

    def verify(self) -> None:
        """VerificationError if a ghost has a name that we did not give it."""
        links = self.plan.links
        for planned in self.plan.opens:
            fd = self.fds.get(planned.opening.file.id)
            if fd is None:
                continue  # whoever closed it has looked
            if planned.opening.ghost.id in links:
                continue  # it has the names that it had
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                # Not every file system counts a directory's links down to zero.
                gone = os.readlink(f"/proc/self/fd/{fd}").endswith(" (deleted)")
            else:
                gone = status.st_nlink == 0
            if not gone:
                raise VerificationError(
                    f"{text(planned.opening.file.name)}: still has {status.st_nlink} names "
                    "after the restore: another process has linked it"
                )

    def close(self) -> None:
        """Close every descriptor, which frees the ghosts that nobody else holds."""
        self.closed = True
        _linux.close_all(self.fds.values())
        self.fds.clear()


def _numbers(planned: PlannedTask) -> Iterator[tuple[int, RegId]]:
    return ((one.number, one.reg_id) for one in planned.task.descriptors)


def _keys(planned: PlannedTask) -> Iterator[tuple[str, RegId]]:
    return ((one.key, one.reg_id) for one in planned.keys)
