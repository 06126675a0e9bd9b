"""The fork server of a run under test: the real one, with faults put at its children's steps.

It is executed as the real one is, when the test process has put the code for it in the place of
the real one's. Descriptors (in Python's sense) on the class that all workers share see every
assignment of a step before the system call is made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from ghostpool import _forkserver, _guardian, _worker
from ghostpool._failed import Work
from ghostpool.testing._act import act
from ghostpool.testing._area import Area, Fault

BOOT = (
    "import sys; sys.path.append({{path!r}}); "
    "from ghostpool.testing import _faultserver as f; f.main(3, {area!r})"
)
"""What is executed: the template that `_launch` fills in, once the area's path is in it."""

Act = Callable[[Area, Fault, int], bool]


class Noted:
    """A data descriptor in the place of `_step` or `_undo_step`."""

    def __init__(self, name: str, run: Run) -> None:
        self._name = name
        self._run = run

    def __get__(self, work: Any, owner: Any) -> Any:
        return self if work is None else work.__dict__.get(self._name, "")

    def __set__(self, work: Any, call: str) -> None:
        work.__dict__[self._name] = call
        frame = sys._getframe(1)
        module = frame.f_globals["__name__"].rpartition(".")[2]
        self._run.reached(f"{module}.{frame.f_code.co_name}", call)


class Run:
    """What this process of a run is doing."""

    def __init__(self, area: Area, act: Act) -> None:
        self._area = area
        self._act = act
        self._number = area.enter("forkserver")
        self._noted: set[str] = set()
        self.request = "start"

    def reached(self, where: str, call: str) -> None:
        """A system call is about to be made; raises what it is to fail with."""
        key = f"{self.request} {where}: {call}"
        if key not in self._noted:
            self._noted.add(key)
            self._area.note(key)
        for number, (wanted, fault) in enumerate(self._area.faults()):
            if wanted not in (key, f"{self.request} {call}") or not self._area.take(number):
                continue
            if not self._act(self._area, fault, os.getpid()):
                self._area.give_back(number)

    def fork(self, original: Callable[[], int]) -> Callable[[], int]:
        """Every child of the fork server gets a region of its own."""

        def fork() -> int:
            pid = original()
            if pid == 0:
                self._area.enter(self.request, self._number)
                self._noted.clear()
                self.request = "start"
            return pid

        return fork


def _name_requests(run: Run) -> None:
    """Have `run.request` name what a worker, or the fork server, was asked for."""

    def named(name: str, request: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            run.request = name
            return request(*arguments)

        return call

    def naming(original: Callable[..., None]) -> Any:
        def init(self: Any, *arguments: Any) -> None:
            original(self, *arguments)
            self._requests = {name: named(name, do) for name, do in self._requests.items()}

        return init

    for kind in (_worker.Worker, _guardian.Guardian):
        kind.__init__ = naming(kind.__init__)  # type: ignore[method-assign]
    handle = _forkserver.ForkServer._handle

    def handled(self: Any, request: Any, fds: list[int]) -> None:
        run.request = request[0]
        handle(self, request, fds)

    _forkserver.ForkServer._handle = handled  # type: ignore[method-assign]


def main(fd: int, path: str, act: Act = act) -> None:
    """Serve as the fork server does, under observation."""
    run = Run(Area.at(path), act)
    os.fork = run.fork(os.fork)
    _name_requests(run)
    for name in ("_step", "_undo_step"):
        setattr(Work, name, Noted(name, run))
    _forkserver.main(fd)
