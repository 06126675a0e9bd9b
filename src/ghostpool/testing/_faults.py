"""Faults in a real run: a chosen system call fails, or its process dies or stops there.

A run's fork server is started by `_launch`, from a line of Python; for the time of the block that
line starts the observed one instead (`_faultserver`). So faults come about in nothing but runs of
the process that has entered the block, and only its code can enter it: no variable of the
environment, no file and no option of a command leads here.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from ghostpool import _launch
from ghostpool.testing._area import ALWAYS, Area
from ghostpool.testing._area import Fault as _What
from ghostpool.testing._faultserver import BOOT

Victim = Literal["worker", "guardian", "forkserver"]
"""Who is killed: the process that is at the step, or another one of the same run."""


class Step(NamedTuple):
    """A place where a fault can be: a system call that a child makes for a request."""

    request: str
    """What the coordinator asked for: "create", "open", "make_writable", …"""
    call: str
    """The system call, as its manual page is called, but for a few: "read of the image"."""
    where: str
    """Module and function that make it. For the reader: it may change with any version."""

    def __str__(self) -> str:
        return f"{self.request} {self.call}"


class Fault:
    """One fault that a test has asked for."""

    def __init__(self, area: Area, number: int, times: int, what: str) -> None:
        self._area = area
        self._number = number
        self._times = times
        self._what = what

    @property
    def count(self) -> int:
        """How often it has happened so far."""
        return self._times - self._area.left(self._number)

    def __repr__(self) -> str:
        return f"<Fault {self._what}, happened {self.count} times>"


class Faults:
    """The faults of one test. Made by `injected_faults`; asked for before a run or during it."""

    def __init__(self, area: Area) -> None:
        self._area = area
        self._faults: list[Fault] = []

    def fail(
        self, request: str, call: str, errno: int, *, after: int = 0, times: int | None = 1
    ) -> Fault:
        """Let the system call fail with `errno`, without being made.

        `after`: so many arrivals at the step go by first, of whatever process. `times`: so many
        arrivals fail then; None: all.
        """
        if errno not in _errno.errorcode:
            raise ValueError(f"{errno} is no errno")
        what = f"{request} {call} fails with {_errno.errorcode[errno]}"
        return self._arm(request, call, ("errno", errno), after, times, what)

    def kill(self, request: str, call: str, victim: Victim = "worker", *, after: int = 0) -> Fault:
        """Kill a process by SIGKILL when a child is about to make the system call.

        The child itself, or the guardian or the fork server of the same run; where that is not
        there yet, the next arrival does it. The call is made if the child lives.
        """
        what = f"{request} {call} kills the {victim}"
        return self._arm(request, call, ("kill", victim), after, 1, what)

    def stop(self, request: str, call: str, *, after: int = 0) -> Fault:
        """Stop the child by SIGSTOP when it is about to make the system call.

        The run takes it for hung when the stall time is over; give the run a short one.
        """
        return self._arm(request, call, ("stop",), after, 1, f"{request} {call} stops")

    def _arm(
        self, request: str, call: str, fault: _What, after: int, times: int | None, what: str
    ) -> Fault:
        most = ALWAYS if times is None else times
        if after < 0 or most < 1:
            raise ValueError(f"after {after} arrivals, {times} times")
        number = self._area.arm(f"{request} {call}", fault, after=after, times=most)
        made = Fault(self._area, number, most, what)
        self._faults.append(made)
        return made

    @property
    def steps(self) -> list[Step]:
        """Every step that the runs in the block have come to, each once.

        A run without a fault tells here where faults can be; one with a fault, what it did
        because of it.
        """
        lines = (line for one in self._area.processes() for line in one.lines)
        return [_step(line) for line in dict.fromkeys(lines)]

    def check(self) -> None:
        """AssertionError if a fault has not happened: the test was not what it seems to be."""
        idle = [fault for fault in self._faults if not fault.count]
        if idle:
            known = ", ".join(dict.fromkeys(map(str, self.steps)))
            raise AssertionError(f"{idle} did not happen; the steps were: {known or 'none'}")


def _step(line: str) -> Step:
    request, _, rest = line.partition(" ")
    where, _, call = rest.partition(": ")
    return Step(request, call, where)


@contextmanager
def injected_faults() -> Iterator[Faults]:
    """Faults in the runs that this process starts in the block, on any thread.

    A run that has begun before, or another process's, has none: neither has `ghostpool` as a
    command. RuntimeError in a block of its own. Needs nothing; the runs need what they always do.
    """
    usual = _launch._BOOT
    if "_faultserver" in usual:
        raise RuntimeError("faults are injected already")
    area = Area.create()
    try:
        _launch._BOOT = BOOT.format(area=area.path)
        yield Faults(area)
    finally:
        _launch._BOOT = usual
        area.close()
